"""The files that weights come in: one or shards, safetensors or pickles, with the names that trainers leave."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilevel.checkpoint import Checkpoint, load_model
from bilevel.errors import CheckpointError
from bilevel.export.check.parity import _checkpoint_hash
from tests.bilevel.families.released import change_config, make
from tests.bilevel.test_checkpoint import assert_same_weights

Weights = dict[str, Tensor]
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("qwen2").save_pretrained(tmp_path / "released")
    return tmp_path / "released"


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def pickled(folder: Path, content: Any = None, **options: Any) -> None:
    """Put ``pytorch_model.bin`` in the place of the safetensors file."""
    path = folder / "model.safetensors"
    torch.save(load_file(path) if content is None else content, folder / "pytorch_model.bin", **options)
    path.unlink()


def test_tied_checkpoint_that_stores_the_head_alone(folder: Path) -> None:
    expected = load_model(folder)
    rename(folder, lambda name: HEAD if name == EMBEDDING else name)
    assert_same_weights(load_model(folder), expected)
    checkpoint = Checkpoint(folder)
    for part in ("lm_head", "model.embed_tokens"):
        model = checkpoint.skeleton()
        checkpoint.fill(model, part)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


@pytest.mark.parametrize("stored", ["embedding", "head", "both", "different"])
def test_tied_ends_with_factors_of_their_own(stored: str, tmp_path: Path) -> None:
    """Granite's head and embedding are one stored tensor and two in the model."""
    make("granite").save_pretrained(tmp_path)
    expected = load_model(tmp_path)
    assert not expected.config.tie_word_embeddings
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if stored != "embedding":
        weights[HEAD] = weights[EMBEDDING].clone() + (stored == "different")
    if stored == "head":
        del weights[EMBEDDING]
    save_file(weights, path)
    if stored == "different":
        with pytest.raises(CheckpointError, match="lm_head.weight that differs .* set tie_word_embeddings to false"):
            load_model(tmp_path)
    else:
        assert_same_weights(load_model(tmp_path), expected)


WRAPPED = st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3).map("".join)


@given(outer=WRAPPED, inner=st.sampled_from(["", "_orig_mod."]))
def test_names_of_wrappers_are_stripped(outer: str, inner: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("wrapped")
    make("qwen2").save_pretrained(folder)
    expected = load_model(folder)
    rename(folder, lambda name: outer + name.replace("self_attn.", f"self_attn.{inner}"))
    assert_same_weights(load_model(folder), expected)


def test_unmerged_adapters_are_refused(folder: Path) -> None:
    rename(folder, lambda name: f"base_model.model.{name}")
    with pytest.raises(CheckpointError, match=r"model.safetensors holds base_model.model.* not merged; merge it with peft's"):
        load_model(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter and not the model .* merge_and_unload"):
        load_model(folder)


def test_two_names_that_are_one_without_wrappers(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, f"module.{NORM}": weights[NORM].clone()}, path)
    with pytest.raises(CheckpointError, match=f"{NORM} is stored twice"):
        load_model(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_pickle(zipped: bool, folder: Path) -> None:
    expected = load_model(folder)
    pickled(folder, _use_new_zipfile_serialization=zipped)
    assert_same_weights(load_model(folder), expected)
    assert len(_checkpoint_hash(folder)) == 64


def test_pickle_shards(folder: Path) -> None:
    expected, weights = load_model(folder), load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    (folder / "model.safetensors").unlink()
    assert_same_weights(load_model(folder), expected)
    (folder / "pytorch_model-2.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-2.bin does not exist, but pytorch_model.bin.index.json names it"):
        load_model(folder)


class Trap:
    """What a pickle runs when it is read carelessly."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _spring, ("sprung",)


def _spring(text: str) -> None:
    raise AssertionError(f"foreign code ran: {text}")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model.norm.weight": Trap()}, "holds other objects than tensors, .* can run foreign code; .* save_pretrained"),
        ([torch.ones(2)], "holds a list and no named tensors; save the model's state_dict"),
        ({"model": {NORM: torch.ones(2)}}, "holds 'model', a dict and no tensor; save the model's state_dict alone"),
        ({"step": 3}, "holds 'step', a int and no tensor"),
        ({NORM: torch.ones(32, dtype=torch.int8)}, "stores model.norm.weight as int8; .* before quantization"),
    ],
    ids=["code", "list", "nested", "number", "int8"],
)
def test_pickle_refusals(content: Any, message: str, folder: Path) -> None:
    pickled(folder, content)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 1, 100, -9])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_pickle_truncated(zipped: bool, size: int, folder: Path) -> None:
    pickled(folder, _use_new_zipfile_serialization=zipped)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is damaged or truncated .*download"):
        load_model(folder)


def test_pickle_that_is_none(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(3, protocol=0))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        load_model(folder)


def sharded(folder: Path) -> dict[str, str]:
    make("qwen2").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return dict(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


@pytest.mark.parametrize("fault", ["elsewhere", "nowhere", "unlisted"])
def test_shards_that_disagree_with_their_index(fault: str, folder: Path) -> None:
    listed = sharded(folder)
    load_model(folder)
    other = next(file for file in listed.values() if file != listed[NORM])
    expected = {
        "elsewhere": f"says that {NORM} lies in {other}, but it lies in {listed[NORM]}",
        "nowhere": f"says that surplus.weight lies in {other}, but no shard holds it",
        "unlisted": f"{listed[NORM]} holds {NORM}, which model.safetensors.index.json does not list",
    }
    changed = {
        "elsewhere": {**listed, NORM: other},
        "nowhere": {**listed, "surplus.weight": other},
        "unlisted": {name: file for name, file in listed.items() if name != NORM},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed[fault]}))
    with pytest.raises(CheckpointError, match=f"{expected[fault]}.*download the checkpoint again"):
        load_model(folder)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """GLM-4.5 stores them behind the last layer; anything further is still refused."""
    make("glm4_moe").save_pretrained(tmp_path)
    expected = load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "model.layers.2.eh_proj.weight": torch.ones(3)}, path)
    assert_same_weights(load_model(tmp_path), expected)
    save_file({**load_file(path), "model.layers.3.eh_proj.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"stores model.layers.3.eh_proj.weight, for which"):
        load_model(tmp_path)


def test_missing_bias_is_named(folder: Path) -> None:
    """A Llama's folder called qwen2 lacks the biases; a Qwen2 called Llama has too many."""
    change_config(folder, model_type="llama")
    with pytest.raises(CheckpointError, match=r"stores model.layers.0.self_attn.k_proj.bias, .* for which"):
        load_model(folder)
    rename(folder, lambda name: name.replace("q_proj.bias", "q_proj.bia5"))
    change_config(folder, model_type="qwen2")
    with pytest.raises(CheckpointError, match=r"stores .*q_proj.bia5"):
        load_model(folder)
