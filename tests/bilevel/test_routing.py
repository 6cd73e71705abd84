"""Route selection against the loop-level reference, and the properties that every implementation must keep.

Queries and keys are small whole numbers: sums are exact in fp32 in any order, so that routes must be equal bit for bit, and
exact ties are common. NaN and infinities are mixed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ops
from bilevel.operators import reference
from bilevel.operators.routing import block_mask, block_scores, head_map

# (Hr, Hk, Hs), among them head groups that do not nest: Hr=12, Hk=4, Hs=6.
HEADS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 2), (4, 4, 2), (4, 2, 4), (6, 3, 2), (6, 2, 3), (12, 4, 6), (12, 6, 4)]


@dataclass
class Case:
    """One call of coarse_route (candidates None) or fine_route."""

    query: Tensor
    unit_key: Tensor
    candidates: Tensor | None
    past_len: Tensor
    new_len: Tensor
    attributes: dict[str, int]

    def route(self, module: Any = ops, **changes: Any) -> Tensor:
        values = {**vars(self), **changes}
        tensors = [values[name] for name in ("query", "unit_key", "past_len", "new_len")]
        if values["candidates"] is None:
            return module.coarse_route(*tensors, **values["attributes"])
        return module.fine_route(*tensors[:2], values["candidates"], *tensors[2:], **values["attributes"])


@st.composite
def cases(draw: st.DrawFn, fine: bool | None = None, special: bool = True, causal: int | None = None) -> Case:
    batch, length, width = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 3]))
    block_size, num_blocks = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 8))
    length = min(length, block_size * num_blocks)
    num_route_heads, num_key_heads, num_selection_heads = draw(st.sampled_from(HEADS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def numbers(*shape: int, infinite: bool = True) -> Tensor:
        values = torch.randint(-2, 3, shape, generator=generator).float()
        if special and draw(st.booleans()):
            for value in (torch.nan, torch.inf, -torch.inf) if infinite else (torch.nan,):
                values[torch.rand(shape, generator=generator) < 0.06] = value
        return values

    candidates = None
    if draw(st.booleans()) if fine is None else fine:
        heads = draw(st.sampled_from([h for h in (1, 2, 3, 4, 6) if num_selection_heads % h == 0]))
        # Repeated, missing (-1) and out-of-range blocks on purpose.
        shape = (batch, heads, length, draw(st.integers(1, num_blocks + 2)))
        candidates = torch.randint(-2, num_blocks + 3, shape, generator=generator, dtype=torch.int32)
    new_len = torch.tensor([draw(st.integers(0, length)) for _ in range(batch)], dtype=torch.int32)
    past_len = torch.tensor([draw(st.integers(0, block_size * num_blocks - length)) for _ in range(batch)], dtype=torch.int32)
    attributes = {
        "block_size": block_size,
        "topk": draw(st.integers(1, num_blocks + 2)),
        "num_selection_heads": num_selection_heads,
        "init_blocks": draw(st.integers(0, 3)),
        "local_blocks": draw(st.integers(1, 3)),
        "causal": draw(st.sampled_from([0, 1])) if causal is None else causal,
    }
    query = numbers(batch, num_route_heads, length, width)
    # Where heads are summed, 2 * inf - 1 * inf has no value that every order of summation agrees on.
    unit_key = numbers(batch, num_key_heads, num_blocks, width, infinite=num_route_heads == num_selection_heads)
    return Case(query, unit_key, candidates, past_len, new_len, attributes)


def one_head(scores: list[float], position: int, **changes: int) -> Case:
    """One query at ``position`` whose score for block j is ``scores[j]``; blocks hold 2 tokens."""
    attributes = {"block_size": 2, "topk": 3, "num_selection_heads": 1, "init_blocks": 0, "local_blocks": 1, "causal": 1}
    unit_key = torch.tensor(scores, dtype=torch.float32)[None, None, :, None]
    past_len, new_len = torch.tensor([position], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return Case(torch.ones(1, 1, 1, 1), unit_key, None, past_len, new_len, {**attributes, **changes})


@given(case=cases(fine=False))
def test_coarse_route_equals_reference(case: Case) -> None:
    assert torch.equal(case.route(ops), case.route(reference))


@given(case=cases(fine=True))
def test_fine_route_equals_reference(case: Case) -> None:
    assert torch.equal(case.route(ops), case.route(reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_route_accumulates_low_precision_in_fp32(dtype: torch.dtype) -> None:
    """256 + 1 is 256 in bfloat16: a sum in the inputs' own precision would tie, and the tie would keep block 0."""
    case = one_head([0.0] * 4, 6, topk=2)
    query = torch.tensor([2.0**6, 1.0, 2.0**6]).reshape(1, 1, 1, 3).to(dtype)
    unit_key = torch.tensor([[64.0, 0, 0], [64, 1, 0], [0, 0, 64], [0, 0, 0]]).reshape(1, 1, 4, 3).to(dtype)
    assert case.route(query=query, unit_key=unit_key).flatten().tolist() == [1, 3]
    assert case.route(reference, query=query, unit_key=unit_key).flatten().tolist() == [1, 3]


@given(case=cases())
def test_routes_are_sets_with_the_own_block(case: Case) -> None:
    """Ascending, unique, -1 only in the tail, nothing invisible, the own block always; rows beyond new_len are all -1."""
    routes, size = case.route(), case.attributes["block_size"]
    for b, past in enumerate(case.past_len.tolist()):
        valid = past + int(case.new_len[b])
        for i in range(routes.shape[2]):
            for row in routes[b, :, i].tolist():
                kept = [j for j in row if j >= 0]
                assert row == sorted(set(kept)) + [-1] * (len(row) - len(kept))
                if i >= case.new_len[b]:
                    assert kept == []
                else:
                    horizon = past + i + 1 if case.attributes["causal"] else valid
                    assert (past + i) // size in kept and max(kept) * size < horizon


@given(case=cases(causal=1), data=st.data())
def test_routes_do_not_see_the_future(case: Case, data: st.DataObject) -> None:
    """Later queries, and keys of blocks that are not complete at position t, change no route up to t."""
    row = data.draw(st.integers(0, case.query.shape[2] - 1))
    before = case.route()
    query, unit_key = case.query.clone(), case.unit_key.clone()
    query[:, :, row + 1 :] = torch.nan
    for b, past in enumerate(case.past_len.tolist()):
        unit_key[b, :, (past + row + 1) // case.attributes["block_size"] :] = torch.inf
    after = case.route(query=query, unit_key=unit_key)
    # A shorter row has no position beyond its own end, so that new_len may shrink as well.
    shorter = case.route(query=query, unit_key=unit_key, new_len=case.new_len.clamp(max=row + 1))
    assert torch.equal(after[:, :, : row + 1], before[:, :, : row + 1])
    assert torch.equal(shorter[:, :, : row + 1], before[:, :, : row + 1])


@given(case=cases(causal=1), data=st.data())
def test_routes_of_any_cut_equal_one_call(case: Case, data: st.DataObject) -> None:
    """Row t is the same whether it comes in one call with the others or in a call of its own."""
    length = case.query.shape[2]
    cuts = sorted(data.draw(st.sets(st.integers(0, length))) | {0, length})
    parts = []
    for start, end in pairwise(cuts):
        part = slice(start, end)
        candidates = None if case.candidates is None else case.candidates[:, :, part]
        past_len, new_len = case.past_len + start, (case.new_len - start).clamp(0, end - start)
        parts.append(case.route(query=case.query[:, :, part], candidates=candidates, past_len=past_len, new_len=new_len))
    assert torch.equal(torch.cat(parts, dim=2), case.route())


@given(case=cases(fine=True), data=st.data())
def test_fine_route_candidates_are_a_set(case: Case, data: st.DataObject) -> None:
    assert case.candidates is not None
    order = torch.tensor(data.draw(st.permutations(range(case.candidates.shape[3]))))
    noise = torch.tensor([-1, case.unit_key.shape[2], 2**31 - 1, -(2**31)], dtype=torch.int32)
    repeated = torch.cat([case.candidates[..., order], case.candidates, noise.expand(*case.candidates.shape[:3], -1)], dim=-1)
    assert torch.equal(case.route(candidates=repeated), case.route())


@given(case=cases(fine=False))
def test_fine_route_among_all_blocks_equals_coarse_route(case: Case) -> None:
    every = torch.arange(case.unit_key.shape[2], dtype=torch.int32)
    candidates = every.expand(case.query.shape[0], 1, case.query.shape[2], -1)
    assert torch.equal(case.route(candidates=candidates), case.route())


@given(case=cases(fine=False, special=False))
def test_coarse_route_wide_enough_keeps_every_visible_block(case: Case) -> None:
    case.attributes.update(topk=case.unit_key.shape[2] + 1, init_blocks=9, causal=1)
    expected = torch.full_like(case.route(), -1)
    for b, past in enumerate(case.past_len.tolist()):
        for i in range(int(case.new_len[b])):
            visible = (past + i) // case.attributes["block_size"] + 1
            expected[b, :, i, :visible] = torch.arange(visible, dtype=torch.int32)
    assert torch.equal(case.route(), expected)


INF, NAN = torch.inf, torch.nan
SELECTION: dict[str, tuple[Case, list[int]]] = {
    "ties-go-to-the-lower-index": (one_head([5, 5, 5, 5, 5, 0], 10), [0, 1, 5]),
    "zeros-tie": (one_head([0, 0, 0, 0, 0, 0], 10), [0, 1, 5]),
    "cut-through-a-tie": (one_head([1, 5, 2, 5, 5, 0], 10), [1, 3, 5]),
    "plus-inf-ties-by-index": (one_head([1, INF, 2, INF, INF, 0], 10), [1, 3, 5]),
    "plus-inf-ties-the-largest-number": (one_head([3.4028235e38, INF, INF, 0, 0, 0], 10), [0, 1, 5]),
    "minus-inf-is-never-kept": (one_head([-INF, 1, -INF, -INF, -INF, 0], 10), [1, 5, -1]),
    "nan-is-never-kept": (one_head([NAN, NAN, 1, NAN, NAN, 0], 10), [2, 5, -1]),
    "nothing-but-nan": (one_head([NAN, NAN, NAN, NAN, NAN, NAN], 10), [5, -1, -1]),
    "forced-although-nan": (one_head([NAN, 7, 8, 9, NAN, NAN], 10, init_blocks=1, local_blocks=2), [0, 4, 5]),
    "forced-although-minus-inf": (one_head([-INF, 7, 8, 9, 1, 0], 10, init_blocks=1), [0, 3, 5]),
    "own-block-wins-over-all": (one_head([9, 9, 9, 9, 9, 0], 10, topk=1, init_blocks=4, local_blocks=4), [5]),
    "recent-local-wins-over-init": (one_head([9, 9, 9, 9, 9, 0], 10, init_blocks=2, local_blocks=4), [3, 4, 5]),
    "first-init-wins-over-second": (one_head([1, 2, 9, 9, 9, 0], 10, init_blocks=3), [0, 1, 5]),
    "own-block-is-also-init": (one_head([1, 2, 3], 1, init_blocks=2, local_blocks=2), [0, -1, -1]),
    "incomplete-block-is-not-scored": (one_head([1, 2, 9, 9], 4, topk=4, causal=0), [0, 1, 2, -1]),
    "completed-by-this-token": (one_head([1, 2, 3, 4], 5, topk=4), [0, 1, 2, -1]),
    "first-token": (one_head([1, 2, 3, 4], 0, topk=4), [0, -1, -1, -1]),
}


@pytest.mark.parametrize("name", SELECTION)
def test_coarse_route_selection_order(name: str) -> None:
    case, expected = SELECTION[name]
    assert case.route(ops).flatten().tolist() == expected
    assert case.route(reference).flatten().tolist() == expected


def test_fine_route_keeps_forced_blocks_that_are_no_candidates() -> None:
    case = one_head([9, 9, 1, 9, 9, 9], 10, topk=4, init_blocks=1)
    candidates = torch.tensor([2, 2, -1, 99], dtype=torch.int32).reshape(1, 1, 1, 4)
    assert case.route(candidates=candidates).flatten().tolist() == [0, 2, 5, -1]


def test_coarse_route_ties_among_many_blocks() -> None:
    """Where ``torch.topk`` and unstable sorts lose the order of equals."""
    routes = one_head([0.0] * 2000, 3999, topk=9).route()
    assert routes.flatten().tolist() == [*range(8), 1999]


def test_coarse_route_not_causal_forces_init_blocks_after_the_own_one() -> None:
    """At position 0 there is one local block of three: the budget of the others goes to init, then to scores."""
    attributes = {"block_size": 2, "topk": 3, "num_selection_heads": 1, "init_blocks": 2, "local_blocks": 3, "causal": 0}
    unit_key = torch.tensor([0.0, 0, 5, 6, 7]).reshape(1, 1, 5, 1)
    past_len, new_len = torch.zeros(1, dtype=torch.int32), torch.tensor([10], dtype=torch.int32)
    for module in (ops, reference):
        routes = module.coarse_route(torch.ones(1, 1, 10, 1), unit_key, past_len, new_len, **attributes)
        assert routes[0, 0, [0, 2, 4, 9]].tolist() == [[0, 1, 4], [0, 1, 4], [0, 1, 2], [2, 3, 4]]


def test_coarse_route_not_causal_keeps_blocks_after_the_own_one() -> None:
    """Six valid tokens, the first call position 0: complete blocks on both sides compete, block 3 does not exist yet."""
    attributes = {"block_size": 2, "topk": 2, "num_selection_heads": 1, "init_blocks": 0, "local_blocks": 1, "causal": 0}
    unit_key = torch.tensor([0.0, 1, 2, 9]).reshape(1, 1, 4, 1)
    past_len, new_len = torch.zeros(1, dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    routes = ops.coarse_route(torch.ones(1, 1, 6, 1), unit_key, past_len, new_len, **attributes)
    assert routes[0, 0].tolist() == [[0, 2], [0, 2], [1, 2], [1, 2], [1, 2], [1, 2]]


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: "Hr{}-Hk{}-Hs{}".format(*h))
def test_block_scores(heads: tuple[int, int, int]) -> None:
    num_route_heads, num_key_heads, num_selection_heads = heads
    query, unit_key = torch.randn(2, num_route_heads, 5, 3), torch.randn(2, num_key_heads, 7, 3)
    expected = torch.zeros(2, num_selection_heads, 5, 7)
    for r in range(num_route_heads):
        key = unit_key[:, r * num_key_heads // num_route_heads]
        expected[:, r * num_selection_heads // num_route_heads] += query[:, r] @ key.mT
    torch.testing.assert_close(block_scores(query, unit_key, num_selection_heads), expected, atol=1e-5, rtol=1e-5)


def test_head_map() -> None:
    assert head_map(12, 4).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert head_map(3, 3).tolist() == [0, 1, 2]
    assert head_map(4, 6).tolist() == [0, 1, 3, 4]


def test_block_mask() -> None:
    routes = torch.tensor([[2, 0, 2], [-1, 5, 4], [-1, -1, -1]], dtype=torch.int32)
    expected = [[True, False, True, False, False], [False, False, False, False, True], [False] * 5]
    assert block_mask(routes, 5).tolist() == expected
