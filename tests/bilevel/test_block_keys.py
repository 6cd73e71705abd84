"""What level 2 compares, against the papers' definitions written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.config import ModelConfig, Routing
from bilevel.config_json import config_from_dict, config_to_dict
from bilevel.errors import ConfigError
from bilevel.model import Attention, CausalLM
from bilevel.rope_scaling import RopeScaling
from bilevel.rotary import apply_rotary, rotary_angles
from bilevel.state import DecoderState, Trace

SIZE, LENGTH = 4, 22


def make_model(**changes: Any) -> CausalLM:
    """Three layers in random weights, the first of them dense."""
    values: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 3}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 100.0}
    torch.manual_seed(3)
    model = CausalLM(ModelConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def traced(model: CausalLM) -> Trace:
    trace = Trace()
    model(torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(0)), trace)
    return trace


@torch.no_grad()
def test_bounds_are_the_largest_product_within_the_box() -> None:
    """Quest: the sum over channels of the larger of q * max and q * min, against the cached keys one by one."""
    model = make_model(routing=Routing(preset="moba_gqa", block_size=SIZE, topk=3, key="bounds", dense_layers=(0,)))
    trace, ids = traced(model), torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    past = torch.zeros(2, dtype=torch.int32)
    _, state = model.model(ids, past, torch.full_like(past, LENGTH), None)
    for index, (query, block_key) in enumerate(zip(trace.query, trace.block_key, strict=True)):
        keys = state.layers[index + 1].key
        for head in range(4):
            for block in range(LENGTH // SIZE):
                inside = keys[0, head // 2, block * SIZE : (block + 1) * SIZE]
                got = query[0, head, 21] @ block_key[0, head // 2, block]
                plain = query[0, head, 21, :8] + query[0, head, 21, 8:]
                bound = sum(max(float(q * k) for k in inside[:, i]) for i, q in enumerate(plain))
                assert got == pytest.approx(bound, rel=1e-4, abs=1e-5)
                assert got >= (inside @ plain).max() - 1e-4, "an upper bound of every key's product"


YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def gate_of(layer: Attention, x: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """SeerAttention-R's scores' two sides in loops, from the keys as they were before they were turned: x [L, d]."""
    cos, sin = rotary_angles(torch.arange(len(x))[None], config)
    plain, keys, _ = layer.project(x[None])
    plain, keys = layer.normalise(plain, keys)
    parts, heads = dict(layer.block_keys.named_parameters()), config.num_key_value_heads
    queries, blocks = torch.zeros(heads, len(x), 8), torch.zeros(heads, len(x) // SIZE, 8)
    group = config.num_attention_heads // heads

    def finish(vector: Tensor, side: str, position: int) -> Tensor:
        if config.routing.gate_norm:
            vector = vector / (vector.square().mean() + 1e-6).sqrt() * parts[f"{side}_norm.weight"]
        turned = apply_rotary(vector[None, None, None], cos[:, position, None], sin[:, position, None])[0, 0, 0]
        return turned if layer.has_positions else vector

    for g in range(heads):
        weights = parts["query_weight"][g].unflatten(0, (group, 8))
        for t in range(len(x)):
            joined = torch.stack([plain[0, g * group + h, t] @ weights[h] for h in range(group)]).sum(0)
            queries[g, t] = finish(joined, "query", t)
        for b in range(len(x) // SIZE):
            inside = keys[0, g, b * SIZE : (b + 1) * SIZE]
            pooled = torch.cat([inside.max(0).values, inside.min(0).values, inside.mean(0)])
            blocks[g, b] = finish(pooled @ parts["key_weight"][g], "key", b * SIZE)
    return queries, blocks


@pytest.mark.parametrize("gate_norm", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary_dim": 4},
        {"rope_scaling": YARN, "max_position_embeddings": 64},
        {"nope_layers": (1,), "model_type": "qwen3"},
    ],
    ids=["plain", "partial rotary", "yarn", "nope"],
)
@torch.no_grad()
def test_gate_is_that_of_seer_attention_r(changes: dict[str, Any], gate_norm: bool) -> None:
    routing = Routing(preset="moba_gqa", block_size=SIZE, topk=3, key="gate", gate_norm=gate_norm, dense_layers=(0,))
    model = make_model(routing=routing, **changes)
    trace = traced(model)
    ids = torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    past = torch.zeros(2, dtype=torch.int32)
    x, step, _, _ = model.model.begin(ids, past, torch.full_like(past, LENGTH), None)
    for index, layer in enumerate(model.model.layers):
        attention = layer.get_submodule("self_attn")
        assert isinstance(attention, Attention)
        if index:
            queries, blocks = gate_of(attention, layer.input_layernorm(x)[1], model.config)
            complete = LENGTH // SIZE
            torch.testing.assert_close(trace.query[index - 1][1], queries, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(trace.block_key[index - 1][1, :, :complete], blocks, atol=1e-5, rtol=1e-4)
        x, _ = layer(x, step, None)


def test_state_and_json() -> None:
    """Caches are as wide as the keys, dense layers have none, and what older files lack is left out of the JSON."""
    routing = Routing(preset="moba_gqa", block_size=SIZE, topk=3, key="bounds", dense_layers=(0, 2), coarse_local_blocks=2)
    config = make_model(routing=routing).config
    layers = DecoderState.empty(config, 1, 8).layers
    assert [layer.block_key is None for layer in layers] == [True, False, True]
    assert layers[1].block_key is not None and layers[1].block_key.shape == (1, 2, 2, 16)
    assert config.routed_layers == (1,)
    raw = config_to_dict(config)
    assert raw["routing"]["key"] == "bounds" and raw["routing"]["dense_layers"] == [0, 2]
    assert config_from_dict(raw) == config
    plain = config_to_dict(make_model(routing=Routing(preset="moba_gqa")).config)["routing"]
    assert not {"key", "gate_norm", "dense_layers", "coarse_local_blocks"} & set(plain)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key": "max"}, "routing.key='max' is unknown; choose one of mean, bounds, gate"),
        ({"key": "gate", "preset": "moba"}, "set preset to moba_gqa or two_level"),
        ({"dense_layers": (3,)}, "routing.dense_layers holds 3, but the layers are 0..2"),
        ({"dense_layers": (0, 1, 2)}, "names all 3 layers; leave one out, or set preset to dense"),
        ({"coarse_local_blocks": -1}, "must be a whole number of at least 0"),
        ({"preset": "two_level", "coarse_topk": 4, "topk": 3, "coarse_local_blocks": 4}, "raise coarse_topk"),
        ({"dense_layers": "all"}, "dense_layers"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(".", r"\.")):
        make_model(routing=Routing(**{"preset": "moba_gqa", "block_size": SIZE, **changes}))
