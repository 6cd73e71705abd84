"""The CPU library's kernels, every instruction set that this CPU has: against the loops, PyTorch and float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import contract
from bilevel.bundle.cache_rows import CacheRows
from bilevel.operators import attention, routing
from bilevel.operators.packed_caches import unpack_rows
from tests.support.cpu_library import open_kernel, run_kernel, sets_here
from tests.support.operator_calls import (
    ROUTE,
    SELECT,
    Attributes,
    Inputs,
    assert_same,
    attention_calls,
    cache_writes,
    expert_calls,
    experts_calls,
    int32,
    make_call,
    packed_attention_calls,
    packed_blocks,
    packed_cache,
    packed_calls,
    route_calls,
    run_reference,
    select_calls,
    whole,
)

ATTENTION: Attributes = {"block_size": 4, "causal": 1, "scale": 0.4}
# L on both sides of where the kernel changes its way (4), of its tiles (16, 32 rows) and of its units (512 tokens).
LENGTHS = [1, 4, 5, 33, 150, 700, 1100]
WIDTHS, BLOCK_SIZES = [5, 8, 40, 64, 80, 128], [3, 16, 48, 64]
# (Hq, Hkv, Hs): groups of 1 to 16, and head groups that do not nest.
HEADS = [(1, 1, 1), (16, 1, 1), (4, 2, 4), (12, 4, 6), (6, 3, 2), (12, 6, 4), (8, 2, 8), (6, 2, 3)]


def check(name: str, inputs: Inputs, attributes: Attributes) -> list[Tensor]:
    """The outputs of the widest instruction set; those of all of them must be the reference's."""
    expected = run_reference(name, inputs, attributes)
    got = [run_kernel(name, inputs, attributes, isa) for isa in sets_here()]
    for outputs in got:
        assert_same(outputs, expected)
    return got[0]


@given(call=route_calls(fine=False))
def test_coarse_route_kernel_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    check("CoarseRoute", *call)


@given(call=route_calls(fine=True))
def test_fine_route_kernel_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    check("FineRoute", *call)


@given(call=select_calls())
def test_select_blocks_kernel_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    check("SelectBlocks", *call)


@given(call=attention_calls())
def test_routed_attention_kernel_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    check("RoutedAttention", *call)


@given(call=attention_calls(sinks=True))
def test_routed_attention_sinks_kernel_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    check("RoutedAttentionSinks", *call)


@pytest.mark.parametrize("group_score", ["external", "max", "top2_sum"])
@pytest.mark.parametrize("score_func", contract.SCORE_FUNCS)
@given(data=st.data())
@settings(max_examples=20)
def test_expert_route_kernel_equals_reference(data: st.DataObject, score_func: str, group_score: str) -> None:
    check("ExpertRoute", *data.draw(expert_calls(score_func, group_score)))


@given(call=experts_calls())
def test_routed_experts_kernel_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    check("RoutedExperts", *call)


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_packed_experts_kernel_equals_reference(data: st.DataObject, bits: int) -> None:
    check("RoutedExpertsQuantized", *data.draw(packed_calls(bits)))


@pytest.mark.parametrize("form", ["int8", "int4"])
@given(data=st.data())
@settings(max_examples=15)
def test_packed_cache_kernels_equal_reference(data: st.DataObject, form: str) -> None:
    check("WriteCacheQuantized", *data.draw(cache_writes(form)))
    check("UnpackCache", *data.draw(packed_blocks(form)))
    check("RoutedAttentionQuantized", *data.draw(packed_attention_calls(form)))


# Larger and uglier


@pytest.mark.parametrize(("form", "length", "width"), [("int8", 1, 64), ("int4", 4, 128), ("int8", 150, 40), ("int4", 600, 64)])
def test_packed_attention_kernel_in_several_units_of_work(form: str, length: int, width: int) -> None:
    """More tokens than a unit and a tile, against attention in float64 over the numbers that the caches stand for."""
    inputs, attributes = big_attention(14 + length, length)
    generator = torch.Generator().manual_seed(length)
    shapes = {name: (*inputs[name].shape[:3], width) for name in ("q", "k", "v")}
    inputs |= {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    rows = CacheRows.of(form, width)
    packed = {name: packed_cache(inputs[name], form) for name in ("k", "v")}
    numbers = {name: unpack_rows(cache, width, **rows.attributes) for name, cache in packed.items()}
    expected = masked_attention({**inputs, **numbers}, attributes, torch.float64)
    for isa in sets_here():
        (got,) = run_kernel("RoutedAttentionQuantized", {**inputs, **packed}, {**attributes, **rows.attributes}, isa)
        valid = (torch.arange(length) < inputs["new_len"][:, None])[:, None, :, None]
        torch.testing.assert_close(got, torch.where(valid, expected, 0).float(), rtol=1e-4, atol=1e-5)


def test_packed_cache_is_written_in_place_and_not_beyond_its_end() -> None:
    inputs, attributes = make_call("WriteCacheQuantized")
    session = open_kernel("WriteCacheQuantized", tuple(attributes.items()), sets_here()[0], 1)
    cache = ort.OrtValue.ortvalue_from_numpy(inputs["cache"].numpy().copy())
    binding = session.io_binding()
    for name in ("update", "start"):
        binding.bind_cpu_input(name, inputs[name].numpy())
    binding.bind_ortvalue_input("cache", cache)
    binding.bind_ortvalue_output("out_out", cache)
    session.run_with_iobinding(binding)
    assert torch.equal(torch.from_numpy(cache.numpy()), *run_reference("WriteCacheQuantized", inputs, attributes))
    for start in (15, -1):
        with pytest.raises(Exception, match="update does not fit into the cache; correct the lengths"):
            run_kernel("WriteCacheQuantized", {**inputs, "start": int32(4, start)}, attributes)


def test_rows_that_are_not_what_the_attributes_say_are_refused() -> None:
    for name, attribute, value in (("WriteCacheQuantized", "bits", 4), ("UnpackCache", "width", 8)):
        inputs, attributes = make_call(name)
        with pytest.raises(Exception, match="rows of a packed cache do not fit the model's heads; export the model anew"):
            run_kernel(name, inputs, {**attributes, attribute: value})
    inputs, attributes = make_call("RoutedAttentionQuantized")
    with pytest.raises(Exception, match="rows of a packed cache do not fit"):
        run_kernel("RoutedAttentionQuantized", inputs, {**attributes, "groups": 4})
    with pytest.raises(Exception, match=r"caches must be \[B, Hkv, M, C\]; export the model anew"):
        run_kernel("RoutedAttentionQuantized", {**inputs, "v": inputs["v"][..., 1:].contiguous()}, attributes)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 70])
def test_packed_experts_kernel_in_several_units_of_work(tokens: int, bits: int, block_size: int) -> None:
    """More rows than a unit, an expert that nobody chose, one for all tokens, ids that repeat and that are none."""
    generator = torch.Generator().manual_seed(tokens)
    experts, width, hidden = 5, 150, 70
    ids = torch.randint(0, 4, (tokens, 3), generator=generator, dtype=torch.int32)
    ids[:, 0], ids[::3, 1], ids[1::2, 2] = 3, -1, 3
    inputs: Inputs = {"x": torch.randn(tokens, width, generator=generator), "ids": ids, "weights": torch.rand(tokens, 3)}
    for name, rows, depth in (("gate_up", 2 * hidden, width), ("down", width, hidden)):
        blocks = -(-depth // block_size)
        shape = (experts, rows, blocks)
        inputs[f"{name}_codes"] = torch.randint(0, 256, (experts, rows, blocks * block_size * bits // 8), dtype=torch.uint8)
        inputs[f"{name}_scales"] = torch.randn(shape, generator=generator) / 2**bits / 8
        inputs[f"{name}_zeros"] = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    check("RoutedExpertsQuantized", inputs, {"bits": bits, "block_size": block_size})


def lengths_of(batch: int, length: int, past: int, generator: torch.Generator) -> Inputs:
    """Ragged rows: the first is full, the last of several is idle."""
    past_len = torch.randint(0, past + 1, (batch,), generator=generator, dtype=torch.int32)
    new_len = torch.randint(0, length + 1, (batch,), generator=generator, dtype=torch.int32)
    past_len[0], new_len[0] = past, length
    if batch > 1:
        new_len[-1] = 0
    return {"past_len": past_len, "new_len": new_len}


def big_attention(index: int, length: int) -> tuple[Inputs, Attributes]:
    generator = torch.Generator().manual_seed(index)
    width, block_size = WIDTHS[index % len(WIDTHS)], BLOCK_SIZES[index % 5 % len(BLOCK_SIZES)]
    heads, kv_heads, lists = HEADS[index % len(HEADS)]
    batch, blocks = (1, 3)[index // 7 % 2], -(-(length + 290) // block_size)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, width, generator=generator)

    inputs = {
        "q": normal(heads, length) * (1.0, 1.0, 300.0)[index % 3],
        "k": normal(kv_heads, blocks * block_size),
        "v": normal(kv_heads, blocks * block_size),
        # Unsorted, repeated, missing and out of range.
        "routes": torch.randint(-2, blocks + 3, (batch, lists, length, 1 + index % 20), generator=generator, dtype=torch.int32),
        **lengths_of(batch, length, 290, generator),
    }
    return inputs, {"block_size": block_size, "causal": index // 2 % 2, "scale": width**-0.5}


def masked_attention(inputs: Inputs, attributes: Attributes, dtype: torch.dtype) -> Tensor:
    """RoutedAttention as one softmax over all tokens, computed in ``dtype``: in float64, the truth."""
    q, k, v, routes, past_len, new_len = (x.to(dtype) if x.is_floating_point() else x for x in inputs.values())
    capacity, block_size = k.shape[2], attributes["block_size"]
    kept = routing.block_mask(routes, capacity // block_size).repeat_interleave(block_size, dim=-1)
    mask = attention.visible_tokens(capacity, q.shape[2], past_len, new_len, bool(attributes["causal"]))[:, None]
    mask = mask & kept[:, routing.head_map(q.shape[1], routes.shape[1])]
    kv_head = routing.head_map(q.shape[1], k.shape[1])
    scores = (q @ k[:, kv_head].mT * attributes["scale"]).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v[:, kv_head]


@pytest.mark.parametrize(
    ("index", "length"), [(7 * n + m, length) for n, m in product(range(3), range(7)) for length in [LENGTHS[m]]]
)
def test_routed_attention_kernel_is_as_exact_as_pytorch(index: int, length: int) -> None:
    inputs, attributes = big_attention(index, length)
    truth = masked_attention(inputs, attributes, torch.float64)

    def error(out: Tensor) -> tuple[float, float]:
        return float((out - truth).square().mean().sqrt()), float((out - truth).abs().max())

    root_mean_square, most = error(masked_attention(inputs, attributes, torch.float32))
    empty = (truth == 0).all(-1)
    for isa in sets_here():
        (out,) = run_kernel("RoutedAttention", inputs, attributes, isa)
        got = error(out)
        assert got[0] <= 2 * root_mean_square + 1e-8 and got[1] <= 4 * most + 1e-7, isa
        assert (out[empty] == 0).all(), isa


@pytest.mark.parametrize("width", [5, 24, 768])
@pytest.mark.parametrize("length", [1, 5, 33, 100])
@pytest.mark.parametrize("causal", [0, 1], ids=["full", "causal"])
def test_route_kernels_equal_pytorch(length: int, width: int, causal: int) -> None:
    """Many blocks (several pieces of work), K of 1, 40 and more than there are; whole scores, so ties are common and exact."""
    generator = torch.Generator().manual_seed(length * width + causal)
    for topk, (heads, key_heads, lists) in zip((1, 40, 900), [(1, 1, 1), (12, 4, 6), (6, 3, 2)], strict=True):
        inputs = {
            "query": whole(3, heads, length, width, generator=generator),
            "unit_key": whole(3, key_heads, 700, width, generator=generator),
            **lengths_of(3, length, 700 * 3 - length, generator),
        }
        attributes = {"block_size": 3, "topk": topk, "num_selection_heads": lists, "init_blocks": 2, "local_blocks": 3}
        attributes |= {"causal": causal}
        expected = routing.coarse_route(*inputs.values(), **attributes)
        fine = {**dict(list(inputs.items())[:2]), "candidates": expected.flip(-1).contiguous()}
        fine |= {name: inputs[name] for name in ("past_len", "new_len")}
        fewer = {**attributes, "topk": max(1, topk // 2)}
        expected_fine = routing.fine_route(*fine.values(), **fewer)
        for isa in sets_here():
            assert torch.equal(run_kernel("CoarseRoute", inputs, attributes, isa)[0], expected), (isa, topk)
            assert torch.equal(run_kernel("FineRoute", fine, fewer, isa)[0], expected_fine), (isa, topk)


# What is not a number


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tensor", ["q", "k"])
@pytest.mark.parametrize("length", [3, 9], ids=["direct", "tiles"])
def test_routed_attention_kernel_odd_values_as_in_the_reference(length: int, tensor: str, value: float) -> None:
    """Also rows all of whose scores are -inf, which are NaN as in any softmax."""
    inputs, attributes = make_call("RoutedAttention", length)
    inputs[tensor][torch.rand(inputs[tensor].shape) < 0.1] = value
    (out,) = check("RoutedAttention", inputs, attributes)
    assert out.isnan().any()


@pytest.mark.parametrize("length", [3, 9], ids=["direct", "tiles"])
def test_routed_attention_kernel_all_scores_minus_infinity(length: int) -> None:
    """NaN where nothing has a weight, but one finite score is enough; many blocks (several pieces)."""
    q, k, v = torch.ones(1, 1, length, 4), torch.full((1, 1, 80, 4), -torch.inf), torch.randn(1, 1, 80, 4)
    routes = torch.arange(20, dtype=torch.int32).expand(1, 1, length, 20).contiguous()
    inputs = {"q": q, "k": k, "v": v, "routes": routes, "past_len": int32(70), "new_len": int32(length)}
    assert check("RoutedAttention", inputs, ATTENTION)[0].isnan().all()
    k[:, :, 50] = 1.0
    (out,) = check("RoutedAttention", inputs, ATTENTION)
    assert torch.equal(out, v[:, :, 50:51].expand_as(out))


@pytest.mark.parametrize("causal", [0, 1], ids=["full", "causal"])
@pytest.mark.parametrize("length", [3, 9, 40], ids=lambda n: f"L{n}")
def test_routed_attention_kernel_ignores_what_no_row_may_see(length: int, causal: int) -> None:
    """Garbage behind the text, in blocks that no row kept and in the padding of the call changes no bit."""
    attributes = {**ATTENTION, "causal": causal}
    q, k, v = torch.randn(2, 4, length, 12), torch.randn(2, 2, 64, 12), torch.randn(2, 2, 64, 12)
    routes = torch.randint(-1, 15, (2, 2, length, 5), dtype=torch.int32)
    routes[routes == 2] = 1
    inputs = {"q": q, "k": k, "v": v, "routes": routes, "past_len": int32(16, 3), "new_len": int32(length, 2)}
    plain = [run_kernel("RoutedAttention", inputs, attributes, isa)[0] for isa in sets_here()]
    for x in (k, v):
        x[0, :, 16 + length :], x[1, :, 5:], x[:, :, 8:12] = torch.nan, torch.inf, torch.nan
    q[1, :, 2:], routes[1, :, 2:] = torch.nan, 2
    for isa, expected in zip(sets_here(), plain, strict=True):
        assert torch.equal(run_kernel("RoutedAttention", inputs, attributes, isa)[0], expected), isa


def test_expert_route_kernel_minus_zero_ties_with_zero() -> None:
    inputs, attributes = make_call("ExpertRoute")
    inputs["group_logits"] = torch.tensor([-0.0, 0.0, -0.0, 0.0]).expand(6, 4).contiguous()
    (ids, _) = check("ExpertRoute", inputs, attributes)
    assert (ids // 2 < 2).all()  # the first two of four groups


# Threads and memory


def big_calls() -> list[tuple[str, Inputs, Attributes]]:
    """Calls of several units of work each."""
    calls = [("RoutedAttention", *big_attention(index, length)) for index, length in ((3, 1), (18, 4), (8, 700), (19, 1100))]
    for length in (1, 50):
        generator = torch.Generator().manual_seed(length)
        inputs = {
            "query": torch.randn(2, 4, length, 48, generator=generator),
            "unit_key": torch.randn(2, 2, 900, 48, generator=generator),
            **lengths_of(2, length, 4 * 900 - length, generator),
        }
        calls.append(("CoarseRoute", inputs, {**ROUTE, "topk": 50}))
        scores = {"scores": torch.randn(2, 2, length, 900, generator=generator), **dict(list(inputs.items())[2:])}
        calls.append(("SelectBlocks", scores, {**SELECT, "topk": 50, "scored_topk": 48}))
    return [*calls, *((name, *make_call(name, 200)) for name in ("ExpertRoute", "RoutedExperts", "RoutedExpertsQuantized"))]


@pytest.mark.parametrize("call", range(11))
def test_kernels_are_the_same_for_any_number_of_threads(call: int) -> None:
    name, inputs, attributes = big_calls()[call]
    for isa in sets_here():
        pairs = zip(*(run_kernel(name, inputs, attributes, isa, threads) for threads in (1, 2)), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs), isa


@pytest.mark.parametrize("call", range(11))
def test_kernels_overwrite_all_of_a_bound_output(call: int) -> None:
    """A buffer that is used again, full of NaN and -7, and calls from two threads at once."""
    name, inputs, attributes = big_calls()[call]
    expected = run_kernel(name, inputs, attributes)
    session = open_kernel(name, tuple(attributes.items()), sets_here()[0], 2)

    def run(_: int) -> bool:
        outputs = [np.full(x.shape, -7 if x.dtype == torch.int32 else np.nan, x.numpy().dtype) for x in expected]
        binding = session.io_binding()
        for key, value in inputs.items():
            binding.bind_cpu_input(key, value.numpy())
        for info, out in zip(session.get_outputs(), outputs, strict=True):
            binding.bind_output(info.name, "cpu", 0, out.dtype, out.shape, out.ctypes.data)
        session.run_with_iobinding(binding)
        return all(np.array_equal(out, x.numpy()) for out, x in zip(outputs, expected, strict=True))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(4)))


@pytest.mark.parametrize(
    "name",
    ["CoarseRoute", "FineRoute", "SelectBlocks", "RoutedAttention", "ExpertRoute", "RoutedExperts", "RoutedExpertsQuantized"],
)
def test_kernels_take_empty_calls(name: str) -> None:
    """No rows, no tokens: outputs of that size and no error."""
    inputs, attributes = make_call(name)
    for size in ("B", "L") if "past_len" in inputs else ("T",):
        axes = {
            "B": {0: inputs.keys()},
            "L": {2: ["query", "q", "candidates", "routes", "scores"]},
            "T": {0: ["x", "ids", "weights", "logits", "group_logits"]},
        }
        empty = dict(inputs)
        for axis, names in axes[size].items():
            for key in set(names) & set(inputs):
                empty[key] = inputs[key].narrow(axis, 0, 0).contiguous()
        if size == "L":
            empty["new_len"] = torch.zeros_like(inputs["new_len"])
        for out in run_kernel(name, empty, attributes):
            assert out.numel() == 0
