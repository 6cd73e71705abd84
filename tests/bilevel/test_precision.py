"""The model in fp64, fp16 and bf16: fp64 all the way through, 16 bits with routes from fp32 scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import contract, ops
from bilevel.errors import ContractError
from bilevel.operators import reference
from bilevel.operators.precision import wide
from bilevel.rotary import apply_rotary, rotary_angles
from bilevel.state import DecoderState, Trace
from tests.bilevel.test_model import MODELS, make_model, random_ids
from tests.support.operator_calls import int32, make_call

LOWER = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOWER])
def test_wide(dtype: torch.dtype) -> None:
    x = torch.randn(3).to(dtype)
    assert wide(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(wide(x).double(), x.double())


def as_fp64(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inputs, attributes = make_call(name, 9)
    floats = {port.name for port in contract.BY_NAME[name].inputs if port.dtype in ("T", "float32")}
    # Not whole numbers: fp32 sums of them are off by 1e-7.
    return {key: torch.randn(x.shape, dtype=torch.float64) if key in floats else x for key, x in inputs.items()}, attributes


@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
def test_operator_in_fp64_equals_loops(name: str) -> None:
    """To fp64's rounding, in fp64, and away from what fp32 gives."""
    inputs, attributes = as_fp64(name)
    operator = contract.BY_NAME[name].torch_name
    found = getattr(ops, operator)(*inputs.values(), **attributes)
    expected = getattr(reference, operator)(*inputs.values(), **attributes)
    narrow = getattr(ops, operator)(*(x.float() if x.is_floating_point() else x for x in inputs.values()), **attributes)
    pairs = [x if isinstance(x, tuple) else (x,) for x in (found, expected, narrow)]
    for port, mine, loops, fp32 in zip(contract.BY_NAME[name].outputs, *pairs, strict=True):
        is_wide = port.dtype in ("T", "float32") and any(x.dtype == torch.float64 for x in inputs.values())
        if not is_wide:
            assert mine.dtype == getattr(torch, port.dtype) and torch.equal(mine, loops)
            continue
        assert mine.dtype == loops.dtype == torch.float64
        torch.testing.assert_close(mine, loops, atol=1e-14, rtol=1e-13)
        assert (fp32 - loops).abs().max() > 1e-9


def test_fp64_scores_choose_what_fp32_cannot_tell_apart() -> None:
    """1 + 1e-12 against 1: a tie in fp32, which keeps the lower block."""
    lengths = int32(6), int32(1)
    attributes = {"block_size": 1, "topk": 2, "num_selection_heads": 1, "init_blocks": 0, "local_blocks": 1, "causal": 1}
    key = torch.tensor([0.0, 1.0, 1.0 + 1e-12, 0, 0, 0, 0], dtype=torch.float64).reshape(1, 1, 7, 1)
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert ops.coarse_route(query, key, *lengths, **attributes).flatten().tolist() == [2, 6]
    assert reference.coarse_route(query, key, *lengths, **attributes).flatten().tolist() == [2, 6]
    assert ops.coarse_route(query.float(), key.float(), *lengths, **attributes).flatten().tolist() == [1, 6]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fp64_model_is_fp64_throughout(name: str) -> None:
    """It agrees with fp32 to fp32's rounding, and what its routers, attention and experts give is fp64."""
    model, ids = make_model(name), random_ids(2, 23)
    narrow = model(ids)
    trace = Trace()
    expected = model.double()(ids, trace)
    assert expected.dtype == torch.float64 and 1e-9 < relative(narrow, expected) < 1e-5
    for values in (trace.query, trace.block_key, trace.attention, trace.expert_logits, trace.expert_weights, trace.expert_out):
        assert all(value.dtype == torch.float64 for value in values)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fp64_model_cut_into_calls(name: str) -> None:
    """One call and five give the same last logits to fp64's rounding, which a single cast to fp32 would end."""
    model, ids = make_model(name).double(), random_ids(1, 23)
    size, past = model.config.routing.block_size, 0
    state = DecoderState.empty(model.config, 1, -(-32 // size) * size, torch.float64)
    logits = torch.empty(0)
    for length in (3, 9, 1, 6, 4):
        logits, state = model.step(ids[:, past : past + length], int32(past), int32(length), state)
        past += length
    assert logits.dtype == torch.float64 and relative(logits, model(ids)[:, -1]) < 1e-13


def test_rotary_tables_are_fp32_in_every_precision() -> None:
    """The model's constants: the same angles, turned by in fp64."""
    config = make_model("moba-R4-Hkv1").config
    cos, sin = rotary_angles(torch.arange(5)[None], config)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 2, 5, config.head_dim, dtype=torch.float64)
    first, second = x.chunk(2, -1)
    expected = torch.cat([first * cos.double() - second * sin.double(), second * cos.double() + first * sin.double()], -1)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_model_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """It runs with caches of its own type, and every route is the loops' choice from fp32 sums of the 16-bit operands."""
    model = make_model(name).to(dtype)
    config, ids = model.config, random_ids(1, 23)
    size = config.routing.block_size
    state = DecoderState.empty(config, 1, -(-32 // size) * size, dtype)
    past, new, trace = int32(0), int32(23), Trace()
    logits, state = model.step(ids, past, new, state, trace)
    assert logits.dtype == dtype and logits.isfinite().all()
    assert {tensor.dtype for layer in state.layers for tensor in vars(layer).values() if tensor is not None} == {dtype}
    assert {value.dtype for value in trace.query + trace.block_key + trace.attention} <= {dtype}
    assert {value.dtype for value in trace.expert_logits + trace.group_logits + trace.expert_weights} <= {torch.float32}
    for query, key, routes in zip(trace.query, trace.block_key, trace.routes, strict=True):
        candidates = () if trace.candidates is None else (trace.candidates,)
        route = reference.fine_route if candidates else reference.coarse_route
        widened = query.float(), key.float()
        assert torch.equal(routes, route(*widened, *candidates, past, new, **config.route_attributes(2)))
    if trace.word_query is not None and trace.word_block_key is not None and trace.candidates is not None:
        assert trace.word_query.dtype == trace.word_block_key.dtype == dtype
        widened = trace.word_query.float(), trace.word_block_key.float()
        assert torch.equal(trace.candidates, reference.coarse_route(*widened, past, new, **config.route_attributes(1)))


@torch.no_grad()
def test_caches_of_another_type_are_refused() -> None:
    model = make_model("moba-R4-Hkv1").half()
    state = DecoderState.empty(model.config, 1, 8)
    with pytest.raises(ContractError, match="unit_key is float32, but query is float16; give both one type"):
        model.step(random_ids(1, 3), int32(0), int32(3), state)
