"""SelectBlocks: routes from given scores, against the loops, and as what CoarseRoute and FineRoute do behind their scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ops
from bilevel.operators import reference
from bilevel.operators.routing import block_mask, block_scores, head_map
from tests.support.operator_calls import Attributes, Inputs, int32, route_calls, select_calls

INF, NAN = torch.inf, torch.nan
PLAIN: Attributes = {
    "block_size": 2,
    "topk": 3,
    "scored_topk": 3,
    "init_blocks": 0,
    "local_blocks": 0,
    "partial_block": 0,
    "causal": 1,
}


def chosen(scores: list[float], position: int, valid: int | None = None, **changes: int) -> list[int]:
    """The blocks of 2 tokens that one query at ``position`` keeps of ``valid`` tokens (None: it is the last), without -1."""
    rows = 1 if valid is None else valid - position
    tensors = (torch.tensor(scores, dtype=torch.float32).expand(1, 1, rows, -1), int32(position), int32(rows))
    attributes = {**PLAIN, **changes}
    routes = ops.select_blocks(*tensors, **attributes)
    assert torch.equal(routes, reference.select_blocks(*tensors, **attributes))
    return [block for block in routes[0, 0, 0].tolist() if block >= 0]


@given(call=select_calls())
def test_select_blocks_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    inputs, attributes = call
    assert torch.equal(
        ops.select_blocks(*inputs.values(), **attributes), reference.select_blocks(*inputs.values(), **attributes)
    )


@given(call=select_calls(), data=st.data())
def test_scores_of_blocks_that_may_not_be_chosen_are_not_read(call: tuple[Inputs, Attributes], data: st.DataObject) -> None:
    """Poison behind the last visible block, and in rows beyond new_len, changes nothing."""
    inputs, attributes = call
    poison = data.draw(st.sampled_from([NAN, INF, -INF, 3e38]))
    size, scores = attributes["block_size"], inputs["scores"].clone()
    for b, (past, new) in enumerate(zip(inputs["past_len"].tolist(), inputs["new_len"].tolist(), strict=True)):
        scores[b, :, new:] = poison
        for i in range(new):
            horizon = past + i + 1 if attributes["causal"] else past + new
            first = -(-horizon // size) if attributes["partial_block"] == 1 else horizon // size
            scores[b, :, i, first:] = poison
    tensors = list(inputs.values())
    assert torch.equal(ops.select_blocks(scores, *tensors[1:], **attributes), ops.select_blocks(*tensors, **attributes))


def attributes_of(route: Attributes) -> Attributes:
    """CoarseRoute's attributes as those of SelectBlocks."""
    rest = {name: value for name, value in route.items() if name != "num_selection_heads"}
    return {**rest, "scored_topk": route["topk"], "partial_block": 0}


def scored(inputs: Inputs, attributes: Attributes) -> tuple[Tensor, list[Tensor]]:
    """(scores [B, Hs, L, U], past_len and new_len) of a call of CoarseRoute or FineRoute."""
    scores = block_scores(inputs["query"], inputs["unit_key"], attributes["num_selection_heads"])
    return scores, [inputs["past_len"], inputs["new_len"]]


@given(call=route_calls(fine=False))
def test_coarse_route_is_scoring_and_select_blocks(call: tuple[Inputs, Attributes]) -> None:
    inputs, attributes = call
    scores, lengths = scored(inputs, attributes)
    whole = reference.select_blocks(scores, *lengths, **attributes_of(attributes))
    assert torch.equal(ops.coarse_route(*inputs.values(), **attributes), whole)


@given(call=route_calls(fine=True))
def test_fine_route_is_scoring_masking_and_select_blocks(call: tuple[Inputs, Attributes]) -> None:
    """What is no candidate has the score -inf, which is never kept; forced blocks are kept whatever they are."""
    inputs, attributes = call
    scores, lengths = scored(inputs, attributes)
    heads = head_map(attributes["num_selection_heads"], inputs["candidates"].shape[1])
    allowed = block_mask(inputs["candidates"], scores.shape[3])[:, heads]
    whole = reference.select_blocks(torch.where(allowed, scores, -INF), *lengths, **attributes_of(attributes))
    assert torch.equal(ops.fine_route(*inputs.values(), **attributes), whole)


# Scores, position, what differs from PLAIN, the blocks that one query keeps.
CASES: dict[str, tuple[list[float], int, dict[str, int], list[int]]] = {
    "own-block-scored-when-complete": ([1, 2, 3, 4, 5, 6], 11, {}, [3, 4, 5]),
    "own-block-left-out-while-open": ([1, 2, 3, 4, 5, 6], 10, {}, [2, 3, 4]),
    "own-block-scored-while-open": ([1, 2, 3, 4, 5, 6], 10, {"partial_block": 1}, [3, 4, 5]),
    "open-own-block-loses-by-its-score": ([1, 2, 3, 4, 5, 0], 10, {"partial_block": 1}, [2, 3, 4]),
    "own-block-forced-while-open": ([1, 2, 3, 4, 5, -INF], 10, {"partial_block": 2}, [3, 4, 5]),
    "own-block-not-forced-when-complete": ([1, 2, 3, 4, 5, 0], 11, {"partial_block": 2}, [2, 3, 4]),
    "forced-while-open-is-also-local": ([9, 9, 9, 9, 9, 0], 10, {"partial_block": 2, "local_blocks": 2}, [0, 4, 5]),
    "open-block-wins-over-init": ([9, 9, 9, 9, 9, 0], 10, {"topk": 1, "partial_block": 2, "init_blocks": 3}, [5]),
    "nothing-forced": ([NAN, -INF, NAN, -INF, NAN, NAN], 11, {}, []),
    "first-token-open": ([5, 5], 0, {}, []),
    "first-token-scored": ([5, 5], 0, {"partial_block": 1}, [0]),
    "forced-outside-the-budget": ([9, 8, 7, 1, 1, 0], 10, {"topk": 4, "scored_topk": 2, "local_blocks": 2}, [0, 1, 4, 5]),
    "scored-no-more-than-asked": ([9, 8, 7, 6, 5, 0], 10, {"topk": 6, "scored_topk": 2, "local_blocks": 1}, [0, 1, 5]),
    "sink-and-window": ([9] * 6, 10, {"topk": 4, "scored_topk": 0, "init_blocks": 1, "local_blocks": 2}, [0, 4, 5]),
    "ties-by-index": ([1, 5, 2, 5, 5, 5], 11, {}, [1, 3, 4]),
    "plus-inf-ties-the-largest-number": ([3.4028235e38, INF, 0, INF, INF, 0], 11, {}, [0, 1, 3]),
    "zero-is-minus-zero": ([-0.0, 0.0, -0.0, 0.0, 0.0, 0.0], 11, {}, [0, 1, 2]),
    "without-causality-all-valid-blocks": ([1, 2, 3, 4, 9], 0, {"valid": 8, "causal": 0}, [1, 2, 3]),
    "without-causality-partial-last-left-out": ([1, 2, 3, 9], 0, {"valid": 7, "causal": 0}, [0, 1, 2]),
    "without-causality-partial-last-scored": ([1, 2, 3, 9], 0, {"valid": 7, "causal": 0, "partial_block": 1}, [1, 2, 3]),
    "without-causality-partial-last-forced": ([1, 2, 3, -INF], 0, {"valid": 7, "causal": 0, "partial_block": 2}, [1, 2, 3]),
    "partial-last-then-own-then-init": (
        [9, 9, 9, 9],
        2,
        {"valid": 7, "causal": 0, "topk": 2, "partial_block": 2, "local_blocks": 1, "init_blocks": 1},
        [1, 3],
    ),
    "partial-last-before-init-behind-the-own-block": (
        [9, 9, 9, 9],
        0,
        {"valid": 7, "causal": 0, "topk": 3, "partial_block": 2, "local_blocks": 1, "init_blocks": 3},
        [0, 1, 3],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_are_kept(name: str) -> None:
    scores, position, changes, expected = CASES[name]
    assert chosen(scores, position, **changes) == expected


def test_queries_of_another_sequence_than_the_keys() -> None:
    """Three queries over nine keys: past_len says how many keys there are more than queries, and no block is their own."""
    scores = torch.tensor([[1.0, 2, 3, 4, 9], [9, 2, 3, 4, 1], [1, 9, 3, 4, 2]])[None, None]
    attributes = {**PLAIN, "topk": 2, "scored_topk": 2, "partial_block": 1, "causal": 0}
    for module in (ops, reference):
        routes = module.select_blocks(scores, int32(6), int32(3), **attributes)
        assert routes[0, 0].tolist() == [[3, 4], [0, 3], [1, 3]]


def test_ties_among_many_blocks() -> None:
    """Where ``torch.topk`` and unstable sorts lose the order of equals."""
    scores = torch.zeros(1, 1, 1, 2000)
    attributes = {**PLAIN, "topk": 9, "scored_topk": 9}
    assert ops.select_blocks(scores, int32(3999), int32(1), **attributes).flatten().tolist() == [*range(9)]
