"""Adapters in and out, joined with their base, and the gates that others released."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilevel.checkpoint import Checkpoint, load_model
from bilevel.errors import CheckpointError
from bilevel.export.route.adapter import ADAPTER, TUNED, Adapter, describe_base, load_adapter, save_adapter
from bilevel.export.route.gates import GateStack
from bilevel.export.route.merge import check_target, is_untrained, merge, merged, write_result
from tests.export.route.models import CONFIG, make_model, routing, save_checkpoint

SEER = {
    "seerattn_gate_block_size": 16,
    "seerattn_gate_hidden_size": 8,
    "seerattn_token_budget": 96,
    "seerattn_q_head_pooling_type": "Qproj",
    "seerattn_k_seq_pooling_type": "Kmaxminavg",
}


def make_adapter(checkpoint: Path, key: str = "gate") -> Adapter:
    """Random gates in layers 0 and 2; layer 1 stays dense."""
    chosen = routing(key, dense_layers=(1,))
    if key != "gate":
        return Adapter(chosen, describe_base(Checkpoint(checkpoint)), {}, {"seed": 0})
    torch.manual_seed(3)
    stack = GateStack(dataclasses.replace(CONFIG, routing=chosen), range(3))
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    gates = {layer: {name: tensor.half().float() for name, tensor in stack.state(layer).items()} for layer in range(3)}
    return Adapter(chosen, describe_base(Checkpoint(checkpoint)), gates, {"seed": 0})


def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(2, CONFIG.vocab_size, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("key", ["gate", "bounds"])
def test_adapter_and_base_are_the_checkpoint(key: str, tmp_path: Path) -> None:
    """Saved and joined, as links or as a folder of its own, it is the model that has these gates."""
    base = save_checkpoint(tmp_path / "base")
    adapter = make_adapter(base, key)
    model = make_model(dataclasses.replace(CONFIG, routing=adapter.routing))
    model.load_state_dict({**make_model().state_dict(), **adapter.tensors(routed=True)})
    save_adapter(adapter, tmp_path / "adapter")
    read = load_adapter(tmp_path / "adapter")
    assert read.routing == adapter.routing and read.base == adapter.base
    assert set(read.tensors()) == set(adapter.tensors())
    with merged(tmp_path / "adapter", base) as joined:
        assert torch.equal(logits(load_model(joined)), logits(model))
        assert joined.name == "base+adapter"
    assert not joined.exists()
    write_result(adapter, base, tmp_path / "whole", as_adapter=False)
    assert torch.equal(logits(load_model(tmp_path / "whole")), logits(model))
    assert (tmp_path / "whole" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "whole").iterdir())
    assert not is_untrained(tmp_path / "whole")


def test_sharded_and_pickled_bases(tmp_path: Path) -> None:
    """The gates become one more shard, whatever the base lies in."""
    base = save_checkpoint(tmp_path / "base")
    adapter = make_adapter(base)
    with_gates = tmp_path / "one"
    write_result(adapter, base, with_gates, as_adapter=False)
    weights = load_file(base / "model.safetensors")
    for kind in ("sharded", "pickled"):
        folder = save_checkpoint(tmp_path / kind)
        (folder / "model.safetensors").unlink()
        if kind == "pickled":
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            names = sorted(weights)
            for part, chosen in (("a", names[:5]), ("b", names[5:])):
                save_file({name: weights[name] for name in chosen}, folder / f"{part}.safetensors")
            listing = {name: "a.safetensors" if name in names[:5] else "b.safetensors" for name in names}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
        (tmp_path / f"{kind}-joined").mkdir()
        merge(adapter, folder, tmp_path / f"{kind}-joined")
        assert torch.equal(logits(load_model(tmp_path / f"{kind}-joined")), logits(load_model(with_gates)))


def test_of_another_model(tmp_path: Path) -> None:
    base, other = save_checkpoint(tmp_path / "base"), save_checkpoint(tmp_path / "other", seed=5)
    deeper = save_checkpoint(tmp_path / "deeper", dataclasses.replace(CONFIG, num_hidden_layers=4))
    save_adapter(make_adapter(base), tmp_path / "adapter")
    with (
        pytest.raises(CheckpointError, match="made for another model: .* another fingerprint"),
        merged(tmp_path / "adapter", other),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="num_hidden_layers=4, the adapter's base 3"),
        merged(tmp_path / "adapter", deeper),
    ):
        pass
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "routing": {"preset": "moba"}}))
    with pytest.raises(CheckpointError, match="has a routing section of its own"), merged(tmp_path / "adapter", base):
        pass


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, r"adapter\.json is of format 2, but this bilevel reads 1"),
        ({"base": {}}, r"adapter\.json does not give base\.vocab_size; make the adapter anew"),
        ({"routing": {"topk": 0}}, r"topk=0"),
    ],
)
def test_bad_adapters(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(make_adapter(save_checkpoint(tmp_path / "base")), tmp_path / "adapter")
    path = tmp_path / "adapter" / ADAPTER
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(Exception, match=message):
        load_adapter(tmp_path / "adapter")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter\.json.*bilevel route CHECKPOINT .* --adapter"):
        load_adapter(tmp_path / "adapter")


def test_targets(tmp_path: Path) -> None:
    check_target(tmp_path / "new", force=False)
    base = save_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match="exists; choose another folder or replace it with --force"):
        check_target(base, force=False)
    check_target(base, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor an adapter"):
        check_target(tmp_path / "mine", force=True)


def test_gates_that_are_missing(tmp_path: Path) -> None:
    """A routing section alone is no gate; the ledger says what makes one."""
    base = save_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    section = {"preset": "moba_gqa", "key": "gate", "block_size": 16, "topk": 4}
    (base / "config.json").write_text(json.dumps({**config, "routing": section}))
    with pytest.raises(CheckpointError, match=r"block_keys.* the gates .*train them with: bilevel route --method gate"):
        load_model(base)


@pytest.mark.parametrize(
    "section, expected",
    [
        ({"preset": "dense"}, False),
        ({"preset": "moba"}, True),
        ({"preset": "moba_gqa", "key": "bounds"}, True),
        ({"preset": "moba_gqa", "dense_layers": [1]}, False),
        ({"preset": "two_level", "route_dim": 4}, False),
        ({"preset": "two_level"}, True),
    ],
)
def test_untrained(section: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "routing": section}))
    assert is_untrained(base) == expected


def save_seer(folder: Path, adapter: Adapter, *, pickled: bool = False, **changes: Any) -> Path:
    """The adapter's gates as SeerAttention-R releases them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SEER, **changes}))
    names = {"query_weight": "linear_q", "key_weight": "linear_k", "query_norm.weight": "qnorm", "key_norm.weight": "knorm"}
    tensors = {}
    for layer, gate in adapter.gates.items():
        for name, tensor in gate.items() if layer not in adapter.routing.dense_layers else ():
            stored = tensor.unflatten(1, (2, 8)).contiguous() if name == "query_weight" else tensor
            tensors[f"model.layers.{layer}.self_attn.attn_gate.attngate_{names[name]}.weight"] = stored
    if pickled:
        torch.save(tensors, folder / "attn_gate_weights.pth")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("pickled", [False, True])
def test_released_gates(pickled: bool, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    adapter = make_adapter(base)
    adapter.routing = dataclasses.replace(adapter.routing, topk=6, local_blocks=1)  # 96 tokens in blocks of 16
    write_result(adapter, base, tmp_path / "whole", as_adapter=False)
    with merged(save_seer(tmp_path / "seer", adapter, pickled=pickled), base) as joined:
        assert torch.equal(logits(load_model(joined)), logits(load_model(tmp_path / "whole")))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"seerattn_k_seq_pooling_type": "Kavg"},
            "seerattn_k_seq_pooling_type='Kavg', but bilevel's gate computes 'Kmaxminavg'",
        ),
        ({"seerattn_q_head_pooling_type": "Qavg"}, "seerattn_q_head_pooling_type='Qavg'"),
        ({"seerattn_gate_hidden_size": 128}, "seerattn_gate_hidden_size=128, but bilevel's gate is as wide as a head, 8"),
        ({"seerattn_use_rope": False}, "seerattn_use_rope=false"),
    ],
)
def test_released_gates_of_another_kind(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    folder = save_seer(tmp_path / "seer", make_adapter(base), **changes)
    with pytest.raises(CheckpointError, match=message), merged(folder, base):
        pass


def test_released_gates_of_another_size(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    adapter = make_adapter(base)
    adapter.gates[0]["key_weight"] = adapter.gates[0]["key_weight"][:, :16].contiguous()
    folder = save_seer(tmp_path / "seer", adapter)
    message = r"attngate_linear_k.weight has shape \[2, 16, 8\], but the model needs \[2, 24, 8\]"
    with pytest.raises(CheckpointError, match=message), merged(folder, base):
        pass
    (tmp_path / "seer" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tensors model\.layers\.N"), merged(tmp_path / "seer", base):
        pass


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("foo", torch.zeros(2), "holds foo, which is no gate's"),
        ("model.word_router.proj.weight", torch.zeros(2).long(), "stored as I64"),
    ],
)
def test_a_file_of_other_tensors(name: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    save_adapter(make_adapter(base), tmp_path / "adapter")
    save_file({name: tensor}, tmp_path / "adapter" / "gates.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path / "adapter")


def make_updates(seed: int = 5) -> dict[str, Tensor]:
    """Low-rank updates of rank 2 in two of three layers, exact in half precision."""
    generator = torch.Generator().manual_seed(seed)
    heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
    return {
        f"model.layers.{layer}.self_attn.{name}.{factor}.weight": torch.randint(-8, 9, shape, generator=generator) / 16
        for layer in (0, 2)
        for name, count in heads.items()
        for factor, shape in (("lora_A", (2, CONFIG.hidden_size)), ("lora_B", (count * CONFIG.head_dim, 2)))
    }


@pytest.mark.parametrize("kind", ["safetensors", "bfloat16", "pickle", "shards"])
def test_updates_are_merged(kind: str, tmp_path: Path) -> None:
    """Queries and keys become the base's plus B A, in the base's own type; every other tensor stays as it is."""
    base, model = save_checkpoint(tmp_path / "base"), make_model()
    if kind != "safetensors":
        weights = load_file(base / "model.safetensors")
        if kind == "bfloat16":
            weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
            save_file(weights, base / "model.safetensors")
        elif kind == "pickle":
            (base / "model.safetensors").unlink()
            torch.save(weights, base / "pytorch_model.bin")
        else:
            (base / "model.safetensors").unlink()
            halves = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(weights))}
            for file in set(halves.values()):
                save_file({name: weights[name] for name in weights if halves[name] == file}, base / file)
            (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": halves}))
    updates = make_updates()
    adapter = dataclasses.replace(make_adapter(base), tuned=updates)
    save_adapter(adapter, tmp_path / "adapter")
    with merged(tmp_path / "adapter", base) as folder:
        found, before = (dict(load_model(each).named_parameters()) for each in (folder, base))
    write_result(adapter, base, tmp_path / "routed", as_adapter=False)
    again = dict(load_model(tmp_path / "routed").named_parameters())
    for name in dict(model.named_parameters()):
        expected, factors = before[name], name.removesuffix(".weight")
        if f"{factors}.lora_A.weight" in updates:
            expected = expected + updates[f"{factors}.lora_B.weight"] @ updates[f"{factors}.lora_A.weight"]
            assert not torch.equal(expected, before[name])
        if kind == "bfloat16":
            expected = expected.bfloat16().float()
        assert torch.equal(found[name], expected) and torch.equal(again[name], expected), name


def test_updates_that_do_not_fit(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, message in (
        ({name: torch.zeros(2, 5)}, "updates model.layers.0.self_attn.q_proj.weight of shape [32, 5]"),
        ({name: torch.zeros(3, CONFIG.hidden_size)}, "which do not multiply"),
        ({name: None}, "without model.layers.0.self_attn.q_proj.lora_A.weight"),
        ({"model.layers.0.mlp.lora_A.weight": torch.zeros(2, 5)}, "which is no update of q or k"),
    ):
        updates = {key: value for key, value in {**make_updates(), **change}.items() if value is not None}
        save_adapter(dataclasses.replace(make_adapter(base), tuned=updates), tmp_path / "adapter")
        with pytest.raises(CheckpointError) as error, merged(tmp_path / "adapter", base):
            pass
        assert message in str(error.value) and "bilevel route" in str(error.value)
    assert (tmp_path / "adapter" / TUNED).is_file()
