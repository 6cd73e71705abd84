"""Packed caches in PyTorch and numpy: one layout, rounded to half a step, the same whatever a text is cut into."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ops
from bilevel.bundle.cache_rows import CacheRows
from bilevel.contract import BY_NAME
from bilevel.errors import ContractError
from bilevel.operators.packed_caches import pack_rows, unpack_rows
from bilevel.state import DecoderState, Trace
from tests.support.cpu_library import SETS, run_kernel
from tests.support.operator_calls import (
    Attributes,
    Inputs,
    assert_same,
    cache_writes,
    int32,
    packed_blocks,
    run_body,
    run_reference,
)
from tests.support.tiny_models import make_model

FORMS = ["int8", "int4"]
EXECUTIONS: dict[str, Callable[[str, Inputs, Attributes], list[Tensor]]] = {
    "PyTorch": lambda name, inputs, attributes: [getattr(ops, BY_NAME[name].torch_name)(*inputs.values(), **attributes)],
    "body": run_body,
    **{f"CPU kernel, {isa}": partial(run_kernel, isa=isa) for isa in SETS},
}


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=20)
def test_vectorised_forms_equal_the_loops(data: st.DataObject, form: str) -> None:
    inputs, attributes = data.draw(cache_writes(form))
    assert_same(
        [ops.write_cache_quantized(*inputs.values(), **attributes)], run_reference("WriteCacheQuantized", inputs, attributes)
    )
    inputs, attributes = data.draw(packed_blocks(form))
    (expected,) = run_reference("UnpackCache", inputs, attributes)
    assert_same([ops.unpack_cache(*inputs.values(), **attributes)], [expected])
    rows = CacheRows(attributes["width"], attributes["bits"], attributes["groups"])
    assert_same([torch.from_numpy(rows.unpack(inputs["rows"].numpy()))], [expected])


@pytest.mark.parametrize(("form", "most"), [("int8", 127), ("int4", 7)])
def test_numbers_come_back_to_half_a_step(form: str, most: int) -> None:
    """A step is the group's largest magnitude over the largest code, at most a 128th more."""
    rows = CacheRows.of(form, 64)
    x = torch.randn(500, 64) * 10 ** (torch.rand(500, 1) * 40 - 20)
    back = unpack_rows(pack_rows(x, **rows.attributes), 64, **rows.attributes)
    step = x.unflatten(-1, (rows.groups, -1)).abs().amax(-1, keepdim=True) / most * (1 + 1 / 128)
    assert ((back - x).abs().unflatten(-1, (rows.groups, -1)) <= step / 2 * (1 + 1e-6)).all()
    again = pack_rows(back, **rows.attributes)
    torch.testing.assert_close(unpack_rows(again, 64, **rows.attributes), back, rtol=1 / most, atol=0)


def test_layouts_and_their_bytes() -> None:
    layouts = {("int8", 64): (66, 1), ("int4", 64): (36, 2), ("int4", 40): (22, 1), ("int8", 5): (7, 1)}
    for (form, width), (num_bytes, groups) in layouts.items():
        rows = CacheRows.of(form, width)
        assert (rows.num_bytes, rows.groups) == (num_bytes, groups)
        assert CacheRows.of_bytes(num_bytes, width) == rows
    with pytest.raises(ContractError, match="heads of 5 numbers cannot be cached in 4 bits, two to a byte; use int8"):
        CacheRows.of("int4", 5)
    with pytest.raises(ContractError, match="a cache of 64 bytes a row does not hold 64 numbers"):
        CacheRows.of_bytes(64, 64)
    with pytest.raises(ContractError, match="rows of 6 numbers in 8 bits and 1 groups do not fit into 7 bytes"):
        ops.write_cache_quantized(
            torch.zeros(1, 1, 1, 6), torch.zeros(1, 1, 2, 7, dtype=torch.uint8), int32(0), bits=8, groups=1
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preset", ["two_level", "gate", "bounds", "dense"])
def test_any_cut_into_calls_gives_the_same_caches_and_routes(preset: str, form: str) -> None:
    """Blocks are pooled from what the cache holds, so that a block which two calls fill has the key that one call gives it."""
    model = make_model(preset)
    ids = torch.randint(0, model.config.vocab_size, (1, 22))
    seen = []
    for cuts in ([22], [3, 8, 1, 1, 9]):
        state, past, routes = DecoderState.empty(model.config, 1, 24, caches=form), 0, []
        for size in cuts:
            trace = Trace()
            with torch.no_grad():
                logits, state = model.step(ids[:, past : past + size], int32(past), int32(size), state, trace)
            routes.append([chosen[..., -size:, :] for chosen in trace.routes])
            past += size
        seen.append((logits, state, [torch.cat(parts, 2) for parts in zip(*routes, strict=True)]))
    (logits, one, chosen), (others, two, theirs) = seen
    torch.testing.assert_close(logits, others, rtol=1e-3, atol=1e-3)
    assert len(chosen) == len(model.config.routed_layers)
    for ours, cut in zip(chosen, theirs, strict=True):
        assert torch.equal(ours, cut)
    for a, b in zip(one.layers, two.layers, strict=True):
        # A sum in another order may turn a code over; the caches stand for nearly the same numbers.
        rows = CacheRows.of(form, model.config.head_dim)
        keys = [rows.unpack(layer.key.numpy())[:, :, :22] for layer in (a, b)]
        assert np.abs(keys[0] - keys[1]).max() <= np.abs(keys[0]).max() / (100 if form == "int8" else 6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preset", ["two_level", "gate", "bounds", "dense"])
def test_token_by_token_gives_the_bytes_of_one_call(preset: str, form: str) -> None:
    """In fp64, where another order of sums moves no number past a code: keys, values and complete blocks' keys, bit for bit."""
    model, length = make_model(preset).double(), 22
    ids = torch.randint(0, model.config.vocab_size, (2, length))
    states = []
    for cuts in ([length], [1] * length, [5, 1, 9, 7]):
        state, past = DecoderState.empty(model.config, 2, 24, torch.float64, caches=form), 0
        for size in cuts:
            with torch.no_grad():
                _, state = model.step(ids[:, past : past + size], int32(past, past), int32(size, size), state)
            past += size
        states.append(state)
    whole = length // model.config.routing.block_size
    for other in states[1:]:
        for one, two in zip(states[0].layers, other.layers, strict=True):
            assert torch.equal(one.key[:, :, :length], two.key[:, :, :length]) and one.key.any()
            assert torch.equal(one.value[:, :, :length], two.value[:, :, :length])
            if one.block_key is not None and two.block_key is not None:
                keys, others = (layer.block_key[:, :, :whole] for layer in (one, two))
                close = 1e-12 if preset == "gate" else 0  # its keys go through a projection
                torch.testing.assert_close(keys, others, rtol=close, atol=close)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=8)
def test_a_text_written_in_pieces_is_that_of_one_write_in_every_execution(data: st.DataObject, form: str) -> None:
    """Whatever the numbers, odd widths among them, and the blocks that are pooled from it are the same numbers too."""
    inputs, attributes = data.draw(cache_writes(form))
    update, start, block = inputs["update"], inputs["start"], {"width": inputs["update"].shape[3], **attributes}
    cut = data.draw(st.integers(0, update.shape[2]))
    (expected,) = run_reference("WriteCacheQuantized", inputs, attributes)
    written = {"rows": pack_rows(update, **attributes)[:, :, None]}
    (numbers,) = run_reference("UnpackCache", written, block)
    for name, run in EXECUTIONS.items():
        cache = inputs["cache"]
        for part, first in ((update[:, :, :cut], start), (update[:, :, cut:], start + cut)):
            if part.shape[2]:
                (cache,) = run("WriteCacheQuantized", {"update": part.contiguous(), "cache": cache, "start": first}, attributes)
        assert torch.equal(cache, expected), name
        (got,) = run("UnpackCache", written, block)
        torch.testing.assert_close(got, numbers, rtol=0, atol=0, equal_nan=True, msg=name)


def test_packed_caches_stay_near_the_exact_ones() -> None:
    """The model over packed caches is the model, to their rounding."""
    model = make_model("moba")
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    with torch.no_grad():
        logits = {
            form: model.step(ids, int32(0, 0), int32(12, 12), DecoderState.empty(model.config, 2, 12, caches=form))[0]
            for form in ("fp32", *FORMS)
        }
    errors = [float((logits[form] - logits["fp32"]).norm() / logits["fp32"].norm()) for form in FORMS]
    assert 0 < errors[0] < 0.02 and errors[0] < errors[1] < 0.3
