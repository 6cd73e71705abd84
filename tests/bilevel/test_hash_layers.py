"""Experts that a table gives to a word (``experts.hash_layers``): against transformers' DeepSeek-V4 gates, in files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter

from bilevel.checkpoint import load_model, save_model
from bilevel.config import Experts
from bilevel.errors import CheckpointError, ConfigError
from bilevel.expert_layers import ExpertGate
from bilevel.state import Trace
from bilevel.training import LossWeights, expert_loads, training_loss
from tests.support.decoding import random_ids
from tests.support.tiny_models import edit_config, make_model, save_checkpoint

SPEC = Experts.deepseek_v4(layers=(0, 1), hash_layers=(0,), num_experts=10, top_k=3, intermediate_size=4)
VOCABULARY = 30
TABLE = "model.layers.0.mlp.gate.tid2eid"


def deepseek_v4(kind: type[torch.nn.Module]) -> torch.nn.Module:
    config = DeepseekV4Config(
        vocab_size=VOCABULARY, hidden_size=12, n_routed_experts=10, num_experts_per_tok=3, num_hidden_layers=2
    )
    theirs = kind(config)
    torch.nn.init.normal_(theirs.weight)
    for name, buffer in theirs.named_buffers():
        drawn = torch.rand(VOCABULARY, 10).argsort(1)[:, :3] if name == "tid2eid" else torch.randn(buffer.shape)
        buffer.copy_(drawn)
    return theirs


def put(table: Tensor, word: int, expert: int) -> Tensor:
    table[word, 1] = expert
    return table


def by_expert(ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(len(ids), 10).scatter(1, ids.long(), weights)


@torch.no_grad()
def test_a_table_gives_the_experts_of_deepseek_v4() -> None:
    """The same weights, under the released names; experts come best first here and in the table's order there."""
    theirs, ours = deepseek_v4(DeepseekV4HashRouter), ExpertGate(SPEC, 12, VOCABULARY)
    ours.load_state_dict(theirs.state_dict())
    x, words = torch.randn(40, 12), torch.randint(0, VOCABULARY, (40,))
    _, weights, ids = theirs(x[None], words[None])
    ours_ids, ours_weights = ours(x, None, words, None)
    torch.testing.assert_close(by_expert(ours_ids, ours_weights), by_expert(ids, weights))
    assert torch.equal(ours_ids.sort(1).values.long(), theirs.tid2eid[words].sort(1).values)
    other = ours(torch.randn(40, 12), None, words, None)[0]
    assert torch.equal(other.sort(1).values, ours_ids.sort(1).values), "the context moves no choice"


@torch.no_grad()
def test_the_gate_beside_it_is_deepseek_v4_s() -> None:
    theirs, ours = deepseek_v4(DeepseekV4TopKRouter), ExpertGate(SPEC, 12)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 12)
    _, weights, ids = theirs(x[None])
    torch.testing.assert_close(by_expert(*ours(x, None, None, None)), by_expert(ids, weights))


@torch.no_grad()
def test_a_checkpoint_with_tables_comes_back(tmp_path: Path) -> None:
    """As int32, as DeepSeek stores them as int64, and from a pickle."""
    model, ids = make_model("hashed"), random_ids(2, 9)
    save_model(model, folder := tmp_path / "model")
    again = load_model(folder)
    assert again.config == model.config and torch.equal(again(ids), model(ids))
    weights = load_file(folder / "model.safetensors")
    weights[TABLE] = weights[TABLE].long()
    save_file(weights, folder / "model.safetensors")
    assert torch.equal(load_model(folder)(ids), model(ids))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(load_model(folder)(ids), model(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.index_put_((torch.tensor(5), torch.tensor(1)), table.new_tensor(6)), "token 5 the experts .*0..5"),
        (
            lambda table: table.index_put_((torch.tensor(7), torch.tensor(0)), table.new_tensor(-1)),
            "token 7 the experts .*0..5",
        ),
        (lambda table: table[:, :1].repeat(1, 2), "token 0 the experts .*one of them twice; correct the table"),
        (lambda table: table.float(), "tid2eid as F32; a table of experts holds whole numbers; store it as int32 or int64"),
        (lambda table: table[:, :1].contiguous(), r"tid2eid has shape .* but the model of config.json needs"),
    ],
    ids=["beyond", "negative", "twice", "float", "shape"],
)
def test_a_table_that_names_no_experts_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    save_checkpoint(folder := tmp_path / "model", "hashed")
    weights = load_file(folder / "model.safetensors")
    weights[TABLE] = change(weights[TABLE])
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash_layers": [0, 2]}, r"hash_layers holds 2, which is none of experts.layers=\[0, 1\]"),
        ({"hash_layers": 1}, "hash_layers=1 must be a list of whole numbers"),
        ({"n_group": 2}, "hash_layers beside n_group=2 and group_score='max' .*set group_score to external or n_group to 1"),
        ({"norm_floor": -1.0}, "norm_floor=-1.0 must be at least 0"),
    ],
)
def test_contradictory_hash_layers_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_checkpoint(folder := tmp_path / "model", "hashed")
    edit_config(folder, experts=changes)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def test_a_weight_stored_as_whole_numbers_is_refused(tmp_path: Path) -> None:
    save_checkpoint(folder := tmp_path / "model", "hashed")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].long()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.norm.weight as I64; bilevel reads float weights only"):
        load_model(folder)


@pytest.mark.parametrize("hash_layers", [(0,), (0, 1)])
def test_training_beside_groups_by_the_word(hash_layers: tuple[int, ...]) -> None:
    """Where every gate follows a table there are no centroids, and no loss for them; the logits learn in either case."""
    model = make_model("hashed")
    groups = {"n_group": 3, "topk_group": 2, "group_score": "external", "hash_layers": hash_layers}
    assert model.config.experts is not None
    experts = dataclasses.replace(model.config.experts, **groups)
    model = type(model)(dataclasses.replace(model.config, experts=experts))
    ids = random_ids(2, 9)
    total, parts = training_loss(model, ids[:, :-1], ids[:, 1:], LossWeights())
    total.backward()
    gates = [layer.mlp.gate for layer in model.model.layers]
    assert ("group" in parts) == (hash_layers == (0,))
    assert [hasattr(gate, "group_centroid") for gate in gates] == [False, hash_layers == (0,)]
    assert all(gate.weight.grad.abs().max() > 0 for gate in gates)
    trace = Trace()
    model(ids, trace)
    assert torch.equal(trace.expert_ids[0].sort(1).values, gates[0].tid2eid[ids.flatten()].sort(1).values)
    assert sorted(expert_loads(model, ids)) == [0, 1]
