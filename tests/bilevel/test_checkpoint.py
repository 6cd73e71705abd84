"""The strict ledger, damaged files, and folders that are replaced whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import bilevel.checkpoint
import bilevel.folders
from bilevel.checkpoint import load_model, save_model
from bilevel.config import Experts, ModelConfig, RopeScaling, Routing
from bilevel.errors import BilevelError, CheckpointError, ConfigError
from bilevel.model import CausalLM

Weights = dict[str, Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def make_model(**changes: object) -> CausalLM:
    """Everything that a checkpoint may hold: level 1's projection, experts with a bias and centroids, q/k norms."""
    values: dict[str, object] = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "model_type": "qwen3",
        "rope_scaling": RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=16),
        "routing": Routing(block_size=4, coarse_topk=5, topk=3, window=2, route_dim=8),
        "experts": Experts(
            num_experts=6, top_k=2, intermediate_size=10, layers=(1,), n_group=3, topk_group=2, select_bias=True
        ),
    }
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{**values, **changes})).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make_model(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def split_experts(weights: Weights) -> None:
    """Stacked experts -> one tensor per expert and projection, as DeepSeek and Qwen3-MoE store them."""
    gate_up, down = weights.pop(GATE_UP), weights.pop(DOWN)
    width = down.shape[2]
    for expert in range(down.shape[0]):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        weights[f"{prefix}.gate_proj.weight"] = gate_up[expert, :width].clone()
        weights[f"{prefix}.up_proj.weight"] = gate_up[expert, width:].clone()
        weights[f"{prefix}.down_proj.weight"] = down[expert].clone()


def assert_same_weights(one: CausalLM, other: CausalLM) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("tied", [False, True])
def test_save_model_load_model_round_trip(tied: bool, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=tied)
    save_model(model, tmp_path / "new" / "checkpoint", files={"tokenizer.json": b"{}\n"})
    loaded = load_model(tmp_path / "new" / "checkpoint")
    assert loaded.config == model.config
    assert not loaded.training
    assert_same_weights(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "checkpoint" / "model.safetensors")) != tied
    files = {path.name for path in (tmp_path / "new" / "checkpoint").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "new" / "checkpoint" / "tokenizer.json").read_bytes() == b"{}\n"


def test_load_model_leaves_weights_trainable_and_file_free(folder: Path) -> None:
    model = load_model(folder)
    (folder / "model.safetensors").write_bytes(b"")  # the loaded model does not depend on the file any more
    model(torch.arange(9)[None]).sum().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_load_model_dtype(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # The selection bias decides which experts are kept: it is not rounded with the weights.
    assert model.state_dict()[BIAS].dtype == torch.float32
    assert torch.equal(model.state_dict()[BIAS], load_model(folder).state_dict()[BIAS])
    save_model(model, folder, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(load_model(folder, dtype=torch.bfloat16), model)


def test_load_model_experts_one_by_one(folder: Path) -> None:
    stacked = load_model(folder)
    rewrite(folder, split_experts)
    assert_same_weights(load_model(folder), stacked)


def test_load_model_tied_head_stored_twice(tmp_path: Path) -> None:
    save_model(make_model(tie_word_embeddings=True), tmp_path / "tied")
    expected = load_model(tmp_path / "tied")
    rewrite(tmp_path / "tied", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert_same_weights(load_model(tmp_path / "tied"), expected)
    rewrite(tmp_path / "tied", lambda w: w["lm_head.weight"][3, 4].add_(1))
    with pytest.raises(CheckpointError, match="lm_head.weight that differs .* set tie_word_embeddings to false"):
        load_model(tmp_path / "tied")


def test_load_model_ignores_only_rotary_buffers(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    assert_same_weights(load_model(folder), make_model())
    rewrite(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.scale": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="rotary_emb.scale, for which"):
        load_model(folder)


EDITS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "extra": (lambda w: w.update(surplus=torch.ones(2)), "stores surplus, for which the model"),
    "five-extra": (
        lambda w: w.update({f"surplus.{i}": torch.ones(2) for i in range(5)}),
        r"stores surplus\.0, surplus\.1, surplus\.2 and 2 more tensors",
    ),
    "missing": (lambda w: w.pop(Q_PROJ), f"lacks {Q_PROJ}"),
    "missing-head": (lambda w: w.pop("lm_head.weight"), "lacks lm_head.weight"),
    "missing-bias": (lambda w: w.pop(BIAS), f"lacks {BIAS}"),
    "transposed": (
        lambda w: w.update({Q_PROJ: w[Q_PROJ].T.contiguous()}),
        rf"{Q_PROJ} has shape \[16, 24\] in model.safetensors, but .* needs \[24, 16\]",
    ),
    "rank": (lambda w: w.update({Q_PROJ: w[Q_PROJ][None]}), rf"{Q_PROJ} has shape \[1, 24, 16\]"),
    "int8": (lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.int8)}), f"stores {Q_PROJ} as I8; .* before quantization"),
    "float8": (lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.float8_e4m3fn)}), f"stores {Q_PROJ} as F8_E4M3"),
    "nan": (lambda w: w[Q_PROJ][2, 1].fill_(torch.nan), f"{Q_PROJ} in model.safetensors holds NaN or infinite"),
    "inf": (lambda w: w[DOWN][5, 1, 1].fill_(-torch.inf), f"{DOWN} in model.safetensors holds NaN or infinite"),
    "one-stack-only": (lambda w: w.pop(DOWN), f"lacks {DOWN}"),
    "both-expert-layouts": (
        lambda w: w.update({"model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(10, 16)}),
        "stores model.layers.1.mlp.experts.0.up_proj.weight, for which",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_load_model_ledger(edit: str, folder: Path) -> None:
    change, message = EDITS[edit]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("model.layers.1.mlp.experts.4.up_proj.weight"), "lacks .*experts.4.up_proj.weight"),
        (lambda w: w.update({"model.layers.1.mlp.experts.6.up_proj.weight": torch.ones(10, 16)}), "experts.6.up_proj"),
        (lambda w: w["model.layers.1.mlp.experts.5.up_proj.weight"].fill_(torch.inf), "experts.5.up_proj.weight .* infinite"),
        (lambda w: w.update({"model.layers.1.mlp.experts.0.gate_proj.weight": torch.ones(1, 16)}), r"\[1, 16\].*\[10, 16\]"),
    ],
    ids=["missing", "extra", "inf", "broadcastable"],
)
def test_load_model_ledger_one_by_one_experts(change: Callable[[Weights], object], message: str, folder: Path) -> None:
    rewrite(folder, split_experts)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_load_model_overflow_in_dtype(folder: Path) -> None:
    rewrite(folder, lambda w: w[Q_PROJ][0, 0].fill_(1e6))
    load_model(folder)
    with pytest.raises(
        CheckpointError, match=f"{Q_PROJ} holds values too large for float16; load or export the model in float32"
    ):
        load_model(folder, dtype=torch.float16)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_load_model_truncated(size: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))} is damaged or truncated .*download"):
        load_model(folder)


def test_load_model_header_garbage(folder: Path) -> None:
    path = folder / "model.safetensors"
    contents = bytearray(path.read_bytes())
    contents[8:40] = b"\xff" * 32
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_model(folder)


def shard(folder: Path) -> dict[str, str]:
    """Split model.safetensors into two shards and an index; returns the index's weight map."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_load_model_shards(folder: Path) -> None:
    whole = load_model(folder)
    shard(folder)
    assert_same_weights(load_model(folder), whole)


def test_load_model_shard_missing_or_doubled(folder: Path) -> None:
    weight_map = shard(folder)
    second = load_file(folder / "model-2.safetensors")
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2.safetensors does not exist, but .*index.json names it"):
        load_model(folder)
    name = next(name for name, file in weight_map.items() if file == "model-1.safetensors")
    save_file({**second, name: torch.ones(1)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is stored twice, in model-1.safetensors and in model-2.safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "is not a weight index"),
        ("[]", "is not a weight index"),
        ('{"weight_map": []}', "is not a weight index"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "'../elsewhere.safetensors', which does not lie in the folder"),
        ('{"weight_map": {"a": 3}}', "names the file 3"),
    ],
)
def test_load_model_bad_index(index: str, message: str, folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_load_model_missing_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load_model(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        load_model(folder)
    (folder / "consolidated.00.pth").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(consolidated.00.pth\).* save_pretrained"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json does not exist"):
        load_model(folder)


def test_load_model_quantized_config(folder: Path) -> None:
    rewrite_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="quantization_config"):
        load_model(folder)


def test_load_model_config_of_another_model(folder: Path) -> None:
    rewrite_config(folder, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2.input_layernorm.weight, .* and \d+ more tensors"):
        load_model(folder)


def test_save_model_refuses_existing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        save_model(make_model(), folder)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    for target in ("home", "file"):
        with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
            save_model(make_model(), tmp_path / target, overwrite=True)
    assert (tmp_path / "home" / "diary.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "../outside", "a/b", "", "."])
def test_save_model_refuses_file_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        save_model(make_model(), tmp_path / "checkpoint", files={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_save_model_overwrites_whole_folder(folder: Path) -> None:
    (folder / "stale.txt").write_text("")
    model = make_model(vocab_size=41)
    save_model(model, folder, overwrite=True)
    assert_same_weights(load_model(folder), model)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("No space left on device"), KeyboardInterrupt()],
    ids=["full-disk", "full-disk-in-safetensors", "interrupt"],
)
def test_save_model_failure_keeps_the_old_one(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weights: Weights, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise error

    before = load_model(folder)
    monkeypatch.setattr(bilevel.checkpoint, "save_file", fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        save_model(make_model(vocab_size=41), folder, overwrite=True)
    if not isinstance(error, KeyboardInterrupt):
        assert re.search("checkpoint could not be written .*No space left on device", str(caught.value))
    assert_same_weights(load_model(folder), before)
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_save_model_failed_rename_restores_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if "partial" in path.name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    before = load_model(folder)
    monkeypatch.setattr(bilevel.folders, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(BilevelError, match="Permission denied"):
        save_model(make_model(vocab_size=41), folder, overwrite=True)
    assert_same_weights(load_model(folder), before)
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
