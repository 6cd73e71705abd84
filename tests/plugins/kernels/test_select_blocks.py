"""SelectBlocks' GPU kernels in Triton's interpreter, every plan, against the loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.support.operator_calls import Attributes, Inputs, int32, whole
from tests.support.triton_calls import check, run_kernels

ODD = (torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float32).max, -0.0)


@dataclass(frozen=True)
class Case:
    """Blocks of ``size`` tokens, whole scores with odd ones among them; row 1 has idle tokens and a shorter past."""

    size: int
    topk: int
    blocks: int
    scored: int
    partial: int
    init: int = 0
    local: int = 0
    causal: int = 1
    heads: int = 1

    def attributes(self) -> Attributes:
        sizes = {"block_size": self.size, "topk": self.topk, "scored_topk": self.scored}
        forced = {"init_blocks": self.init, "local_blocks": self.local, "partial_block": self.partial}
        return {**sizes, **forced, "causal": self.causal}

    def inputs(self, length: int, short: int = 0) -> Inputs:
        """short: tokens that the last block of the longest row lacks."""
        scores = whole(2, self.heads, length, self.blocks + 1)
        for value in ODD:
            scores[torch.rand(scores.shape) < 0.04] = value
        past = self.size * self.blocks - length - short
        return {"scores": scores, "past_len": int32(past, past // 3), "new_len": int32(length, length // 2)}


CASES = {
    "only-scores-an-open-block-too": Case(4, 5, 20, 5, partial=1, heads=3),
    "open-block-forced-and-few-scored": Case(3, 6, 30, 2, partial=2, init=1),
    "forced-ones-over-K": Case(2, 3, 40, 3, partial=2, init=3, local=2, heads=2),
    "without-causality-a-partial-last-block-forced": Case(5, 7, 9, 1, partial=2, init=2, local=1, causal=0),
    "without-causality-K-over-N": Case(5, 12, 9, 12, partial=1, causal=0),
    "only-forced-ones": Case(1, 8, 90, 0, partial=0, init=2, local=4),
    "tokens-are-blocks": Case(1, 33, 200, 33, partial=0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_select_blocks_equals_reference(case: Case) -> None:
    """Few positions, on both plans; a last block with and without all of its tokens."""
    for short in {0, case.size - 1}:
        check("SelectBlocks", case.inputs(2, short), case.attributes())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_select_blocks_tiles_equal_reference(case: Case) -> None:
    """More positions than a tile has rows."""
    check(
        "SelectBlocks",
        case.inputs(min(19, case.size * case.blocks - case.size), case.size - 1),
        case.attributes(),
        only="tiles",
    )


@pytest.mark.parametrize("scored", [4, 1])
def test_select_blocks_merges_splits(scored: int) -> None:
    """More scores than one program reads; the best lie in different splits."""
    case = Case(1, 4, 2100, scored, partial=0, local=1)
    inputs = case.inputs(1)
    inputs["scores"] = torch.randn(inputs["scores"].shape).round()
    inputs["scores"][:, :, :, [5, 1500, 2060]] = 9.0
    (routes,) = check("SelectBlocks", inputs, case.attributes(), only="split")
    assert routes[0, 0, 0].tolist() == {4: [5, 1500, 2060, 2099], 1: [5, 2099, -1, -1]}[scored]


def test_idle_rows_and_empty_calls() -> None:
    """A call in which no row has a token, and calls without rows, tokens or blocks."""
    case = CASES["open-block-forced-and-few-scored"]
    inputs = {**case.inputs(2), "new_len": int32(0, 0)}
    assert (check("SelectBlocks", inputs, case.attributes())[0] == -1).all()
    for axis, names in ((0, inputs), (2, ("scores",))):
        empty = {key: x.narrow(axis, 0, 0).contiguous() if key in names else x for key, x in inputs.items()}
        for outputs in run_kernels("SelectBlocks", empty, case.attributes()).values():
            assert outputs[0].numel() == 0
    nothing: dict[str, Any] = {**inputs, "scores": inputs["scores"][..., :0].contiguous(), "past_len": int32(0, 0)}
    assert (check("SelectBlocks", nothing, case.attributes())[0] == -1).all()


@pytest.mark.parametrize("plan", ["split", "tiles"])
@pytest.mark.parametrize("past", [2000, 2**20])
def test_a_length_beyond_the_scores(plan: str, past: int) -> None:
    """Garbage in past_len: no loop goes, and no route leads, beyond the blocks that there are."""
    case = CASES["forced-ones-over-K"]
    inputs = {**case.inputs(2), "past_len": int32(past, past)}
    (routes,) = run_kernels("SelectBlocks", inputs, case.attributes(), plan)[plan]
    assert int(routes.max()) <= case.blocks
