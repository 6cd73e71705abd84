"""CoarseRoute's and FineRoute's GPU kernels in Triton's interpreter, every plan, against the loops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.operator_calls import Attributes, Inputs, int32, whole
from tests.support.triton_calls import check, run_kernels

INF, NAN = torch.inf, torch.nan


@dataclass(frozen=True)
class Case:
    """Blocks of ``size`` tokens; ``width`` on both sides of a slice of the route dim."""

    size: int
    topk: int
    blocks: int
    heads: tuple[int, int, int]  # Hr, Hk, Hs
    width: int
    init: int = 1
    local: int = 1
    causal: int = 1

    def attributes(self) -> Attributes:
        sizes = {"block_size": self.size, "topk": self.topk, "num_selection_heads": self.heads[2]}
        return {**sizes, "init_blocks": self.init, "local_blocks": self.local, "causal": self.causal}

    def inputs(self, length: int, fine: bool = False) -> Inputs:
        """Whole numbers, so that sums are exact and ties common; NaN and infinities. Row 0 is full, row 1 has idle tokens."""
        route_heads, key_heads, choices = self.heads
        query, unit_key = whole(2, route_heads, length, self.width), whole(2, key_heads, self.blocks, self.width)
        # Where heads are summed, 2 * inf - 1 * inf has no value that every order of summation agrees on.
        values = (NAN, INF, -INF) if route_heads == choices else (NAN,)
        for value in values:
            query[torch.rand(query.shape) < 0.1 / self.width] = value
            unit_key[torch.rand(unit_key.shape) < 0.1 / self.width] = value
        found: Inputs = {"query": query, "unit_key": unit_key}
        if fine:
            # Unsorted, repeated (also further apart than a step of 32), missing and out of range.
            shape = (2, 1 if choices % 2 else choices // 2, length, 40)
            blocks = torch.randint(-2, self.blocks + 3, shape, dtype=torch.int32)
            # Every head and position lacks other blocks.
            found["candidates"] = torch.where(
                torch.rand(*shape[:3], self.blocks + 5).gather(-1, blocks.long() + 2) < 0.5, -1, blocks
            )
        past = self.size * self.blocks - length
        return {**found, "past_len": int32(past, past // 3), "new_len": int32(length, length // 2)}


CASES = {
    "one-token-blocks-and-forced-ones-over-K": Case(1, 3, 9, (4, 2, 4), 3, init=3, local=2),
    "K-over-N-and-heads-that-do-not-nest": Case(5, 9, 6, (6, 3, 2), 20, init=2, local=3, causal=0),
    "two-slices-and-two-tiles-of-blocks": Case(3, 4, 70, (4, 2, 1), 70, init=0),
}
LONG = Case(2, 6, 300, (1, 1, 1), 4, local=2)  # two splits of blocks for one position


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_coarse_route_equals_reference(case: Case) -> None:
    check("CoarseRoute", case.inputs(2), case.attributes())


def test_coarse_route_merges_splits() -> None:
    check("CoarseRoute", LONG.inputs(2), LONG.attributes(), only="split")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_coarse_route_tiles_equal_reference(case: Case) -> None:
    """More positions than a tile has rows, where there are that many."""
    check("CoarseRoute", case.inputs(min(35, case.size * case.blocks)), case.attributes(), only="tiles")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fine_route_equals_reference(case: Case) -> None:
    check("FineRoute", case.inputs(2, fine=True), case.attributes())


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float16, (4, 1, 4)), (torch.bfloat16, (4, 2, 1))], ids=["fp16", "bf16"])
def test_routes_in_sixteen_bits(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Whole numbers are exact in every type, and so are the choices."""
    case = Case(4, 5, 12, heads, 40)
    for name in ("CoarseRoute", "FineRoute"):
        inputs = case.inputs(2, fine=name == "FineRoute")
        check(name, {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}, case.attributes())


# K is 3 and the own block 9 is forced: scores of blocks 0..5 -> the other two
SCORES: dict[str, tuple[list[float], list[int]]] = {
    "ties-by-index": ([1, 5, 5, 5, 1, 0], [1, 2, 9]),
    "all-equal": ([0, 0, 0, 0, 0, 0], [0, 1, 9]),
    "zero-is-minus-zero": ([-0.0, 0.0, -0.0, -1, 0.0, -1], [0, 1, 9]),
    "negative": ([-3, -1, -3.4e38, -2, -9, -1e-38], [1, 5, 9]),
    "plus-inf-ties-by-index": ([1, INF, 2, INF, INF, 0], [1, 3, 9]),
    "plus-inf-ties-the-largest-number": ([3.4028235e38, INF, INF, 0, 0, 0], [0, 1, 9]),
    "minus-inf-is-never-kept": ([-INF, 1, -INF, -INF, -INF, -INF], [1, 9, -1]),
    "nan-is-never-kept": ([NAN, NAN, NAN, -5, NAN, NAN], [3, 9, -1]),
    "nothing-is-left": ([NAN, -INF, NAN, -INF, NAN, NAN], [9, -1, -1]),
}


@pytest.mark.parametrize(("scores", "expected"), SCORES.values(), ids=SCORES)
def test_normative_order(scores: list[float], expected: list[int]) -> None:
    """Blocks 6 to 8 have scores that are never kept."""
    unit_key = torch.tensor([*scores, -INF, NAN, -INF, 0.0]).reshape(1, 1, 10, 1)
    attributes = Case(1, 3, 10, (1, 1, 1), 1, init=0).attributes()
    inputs = {"query": torch.ones(1, 1, 1, 1), "unit_key": unit_key, "past_len": int32(9), "new_len": int32(1)}
    for outputs in run_kernels("CoarseRoute", inputs, attributes).values():
        assert outputs[0].flatten().tolist() == expected
    candidates = torch.tensor([5, 0, 3, 2, 4, 1, 6, 7, 8, 1, 0], dtype=torch.int32).reshape(1, 1, 1, 11)
    fine = {**dict(list(inputs.items())[:2]), "candidates": candidates, "past_len": int32(9), "new_len": int32(1)}
    assert run_kernels("FineRoute", fine, attributes)["rows"][0].flatten().tolist() == expected


def wrong_choices(routes: Tensor, scores: Tensor, tolerance: float) -> int:
    """Rows whose blocks differ from the best by more than ``tolerance``. routes [n, K]; scores fp64 [n, N], -inf: barred."""
    wrong = 0
    for kept, row in zip(routes.tolist(), scores, strict=True):
        kept = [block for block in kept if block >= 0]
        dropped = [block for block in range(len(row)) if block not in kept]
        wrong += len(kept) != min(routes.shape[1], int((row > -INF).sum()))
        wrong += bool(dropped) and float(row[kept].min()) < float(row[dropped].max()) - tolerance
    return wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_choices_by_score_are_right_where_the_margin_allows(dtype: torch.dtype) -> None:
    """Scores of ordinary numbers: exact products, sums in fp32; only scores within their rounding may change places."""
    case = Case(1, 6, 80, (2, 1, 1), 96, init=0)
    inputs = {"query": torch.randn(1, 2, 40, 96).to(dtype), "unit_key": torch.randn(1, 1, 80, 96).to(dtype)}
    inputs |= {"past_len": int32(40), "new_len": int32(40)}
    exact = (inputs["query"].double() @ inputs["unit_key"].double().mT).sum(1)[0]
    block, position = torch.arange(80), torch.arange(40, 80)[:, None]
    exact = torch.where(block == position, INF, torch.where(block < position, exact, -INF))
    (routes,) = run_kernels("CoarseRoute", inputs, case.attributes(), only="tiles")["tiles"]
    assert wrong_choices(routes[0, 0], exact, 1e-4) == 0
    assert wrong_choices(routes[0, 0].roll(1, 0), exact, 1e-4) > 30  # the judge notices other choices


def test_idle_rows_and_empty_calls() -> None:
    """A call in which no row has a token, and calls without rows, tokens or blocks."""
    case = Case(4, 3, 5, (2, 1, 1), 3)
    for name in ("CoarseRoute", "FineRoute"):
        inputs = {**case.inputs(2, fine=name == "FineRoute"), "new_len": int32(0, 0)}
        assert (check(name, inputs, case.attributes())[0] == -1).all()
        for axis, names in ((0, inputs), (2, ("query", "candidates"))):
            empty = {key: x.narrow(axis, 0, 0).contiguous() if key in names else x for key, x in inputs.items()}
            for outputs in run_kernels(name, empty, case.attributes()).values():
                assert outputs[0].numel() == 0
        nothing = {**inputs, "unit_key": inputs["unit_key"][:, :, :0].contiguous(), "past_len": int32(0, 0)}
        assert (check(name, nothing, case.attributes())[0] == -1).all()


@pytest.mark.parametrize("name, only", [("CoarseRoute", "tiles"), ("CoarseRoute", "split"), ("FineRoute", "rows")])
@pytest.mark.parametrize("past", [2000, 2**20])
def test_a_length_beyond_the_cache(name: str, only: str, past: int) -> None:
    """Garbage in past_len: no loop goes, and no route leads, beyond the blocks that there are."""
    case = CASES["two-slices-and-two-tiles-of-blocks"]
    inputs = {**case.inputs(2, fine=name == "FineRoute"), "past_len": int32(past, past)}
    (routes,) = run_kernels(name, inputs, case.attributes(), only)[only]
    assert int(routes.max()) < case.blocks
