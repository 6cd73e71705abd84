"""The judgements behind ``bilevel check``, as pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bilevel import contract
from bilevel.export.check.choices import block_choice, expert_choices, expert_weights, is_proper
from bilevel.export.check.judge import Array, Computation, ScoredChoices, Selection, dot_bound, judge_selection, loosen
from bilevel.operators import reference

ROUTE: dict[str, Any] = {
    "block_size": 4,
    "topk": 3,
    "num_selection_heads": 2,
    "init_blocks": 1,
    "local_blocks": 1,
    "causal": 1,
}


def choice(score: list[float], kept: list[int], bound: float = 1e-6, competing: list[int] | None = None) -> ScoredChoices:
    """One row."""
    options = np.arange(len(score))
    is_open = np.isin(options, options if competing is None else competing)
    return ScoredChoices(np.array([score]), np.full((1, len(score)), bound), np.isin(options, kept)[None], is_open[None])


def judge(reference_side: ScoredChoices, device: ScoredChoices) -> Selection:
    stats = Selection("router")
    judge_selection(stats, reference_side, device, "tokens 0..8")
    return stats


def test_judge_selection_equal_sets() -> None:
    stats = judge(choice([3, 2, 1], [0, 1]), choice([3, 2, 1], [0, 1]))
    assert stats.passed and (stats.rows, stats.exact, stats.excused, stats.jaccard_sum) == (1, 1, 0, 1.0)
    assert stats.result(None, 1, 0, "CoarseRoute").smallest_margin == pytest.approx(0.5)


@pytest.mark.parametrize(("gap", "passed"), [(0.0, True), (3.9e-6, True), (4.1e-6, False), (1.0, False)])
def test_judge_selection_excuses_within_both_bounds(gap: float, passed: bool) -> None:
    """Two scores, each side off by at most 1e-6 in each: 4e-6 in all."""
    score = [3, 1 + gap, 1]
    stats = judge(choice(score, [0, 1]), choice(score, [0, 2]))
    assert stats.passed == passed
    assert (stats.excused, stats.unexcused) == ((2, 0) if passed else (0, 2))
    assert stats.exact == 0 and stats.jaccard_sum == pytest.approx(1 / 3)
    assert passed or "PyTorch alone keeps [1], the graph alone [2]" in stats.example


def test_judge_selection_excuses_measured_movement() -> None:
    """The graph's own operands differ, so that its scores cross; how far they moved is what is excused."""
    assert judge(choice([1.0, 0.9], [0]), choice([0.94, 0.96], [1])).passed
    assert not judge(choice([1.0, 0.9], [0]), choice([0.99, 0.91], [1])).passed


def test_judge_selection_compares_options_that_changed_places() -> None:
    """Not with a bystander: option 3 is the best of those dropped, and did not move; option 2 did, and came in."""
    before, after = [2.0, 1.0, 0.9, 0.95], [2.0, 0.94, 0.96, 0.95]
    assert judge(choice(before, [0, 1]), choice(after, [0, 2])).passed
    # Option 3 coming in needs a movement that did not happen.
    assert not judge(choice(before, [0, 1]), choice([2.0, 1.0, 0.9, 0.95], [0, 3])).passed


def test_judge_selection_never_excuses_forced_blocks() -> None:
    """Block 0 is forced: dropping it is wrong even where it ties."""
    stats = judge(choice([1, 1, 1], [0, 1], competing=[1, 2]), choice([1, 1, 1], [1, 2], competing=[1, 2]))
    assert stats.unexcused == 2


@pytest.mark.parametrize("kept", [[0], [0, 1, 2]], ids=["fewer", "more"])
def test_judge_selection_never_excuses_another_count(kept: list[int]) -> None:
    stats = judge(choice([1, 1, 1], [0, 1]), choice([1, 1, 1], kept))
    assert stats.unexcused == 1 and stats.excused == 0 and stats.example


def test_judge_selection_another_number_of_choices() -> None:
    two = ScoredChoices(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3), bool), np.ones((2, 3), bool))
    stats = judge(two, choice([1, 1, 1], [0, 1, 2]))
    assert not stats.passed and "PyTorch makes 2 choices of 3, the graph 1 of 3" in stats.example


def test_loosen_excuses_what_another_group_holds() -> None:
    """Groups tie: whichever was taken, the experts inside it are right. With a clear group they are not excused."""
    experts, device = choice([4, 3, 2, 1], [0, 1], competing=[0, 1]), choice([4, 3, 2, 1], [2, 3], competing=[2, 3])
    clear = choice([2, 1], [0])
    loosen(experts, clear, clear)
    assert not judge(experts, device).passed
    tied = choice([1, 1], [0])
    loosen(experts, tied, tied)
    assert judge(experts, device).passed


@pytest.mark.parametrize(
    ("got", "error"),
    [([1.0, 2.0], 0.0), ([1.0, 2.002], 0.001), ([np.nan, 2.0], np.inf), ([np.inf, 2.0], np.inf)],
    ids=["equal", "off", "nan", "inf"],
)
def test_computation_error(got: list[float], error: float) -> None:
    computation = Computation("y")
    computation.add("bodies", np.array(got), np.array([1.0, 2.0]))
    computation.add("CPU kernels", np.empty((0, 3)), np.empty((0, 3)))
    assert computation.error == pytest.approx(error) and computation.passed == (error <= 1e-4)
    assert computation.worst == "bodies"


def test_computation_of_another_shape_is_infinitely_wrong() -> None:
    computation = Computation("y")
    assert not computation.add("bodies", np.zeros((2, 3)), np.zeros((3, 2)))
    assert computation.error == np.inf


@pytest.mark.parametrize(("precision", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_computation_in_a_lower_precision_is_held_to_twice_what_pytorch_errs(precision: str, unit: float) -> None:
    exact, computation = np.array([1.0, -4.0]), Computation("y", precision)
    assert computation.add("bodies", exact + 8 * unit, exact, exact), "one unit of the largest is always allowed"
    assert not computation.add("bodies", exact + 40 * unit, exact, exact + 19 * unit)
    assert computation.add("bodies", exact, exact, exact + 21 * unit) and computation.floor == pytest.approx(21 * unit / 4)


def test_selection_histogram_counts_every_row_that_had_a_choice() -> None:
    stats = Selection("router")
    for gap in (0.0, 1e-7, 1e-3, 0.5):
        side = choice([2, 1, 1 - gap], [0, 1], bound=1e-6)
        judge_selection(stats, side, side)
    judge_selection(stats, choice([2, 1], [0], competing=[0]), choice([2, 1], [0], competing=[0]))
    result = stats.result(None, 1, 0, "CoarseRoute")
    margins, tolerance = result.margins, result.tolerance
    assert (margins.ties, margins.fragile, sum(margins.counts)) == (1, 2, 3)
    assert len(margins.edges) == len(margins.counts) + 1 and result.smallest_margin == 0
    assert margins.edges[0] <= -7 and margins.edges[-1] > np.log10(0.5)
    assert tolerance.largest == pytest.approx(4e-6)


@pytest.mark.parametrize(
    ("routes", "proper"),
    [
        ([0, 2, 5], True),
        ([0, -1, -1], True),
        ([-1, -1, -1], True),
        ([2, 0, -1], False),
        ([1, 1, 2], False),
        ([-1, 0, 1], False),
        ([0, -1, 1], False),
        ([0, -2, -2], False),
    ],
)
def test_is_proper(routes: list[int], proper: bool) -> None:
    assert bool(is_proper(np.array(routes))) == proper


@pytest.mark.parametrize("score_func", contract.SCORE_FUNCS)
@pytest.mark.parametrize(("normalize", "norm_floor"), [(0, 5.0), (1, 0.0), (1, 5.0)])
def test_expert_weights_are_the_reference_s(score_func: str, normalize: int, norm_floor: float) -> None:
    logits, groups, bias = torch.randn(20, 8), torch.randn(20, 4), torch.randn(8)
    attributes: dict[str, Any] = {"score_func": score_func, "normalize": normalize, "scale": 1.5, "norm_floor": norm_floor}
    ids, weights = reference.expert_route(logits, groups, bias, top_k=3, topk_group=2, group_score="max", **attributes)
    assert np.abs(expert_weights(logits.numpy(), ids.numpy(), attributes) - weights.numpy()).max() < 1e-6


@pytest.mark.parametrize(("score_func", "group_score"), [("sigmoid", "max"), ("sigmoid", "top2_sum"), ("softmax", "max")])
def test_expert_choices_of_tiny_scores_are_no_near_ties(score_func: str, group_score: str) -> None:
    """Scores of 2e-9 and 6e-9 differ by less than a rounding of 1, and are still far apart."""
    logits, groups, bias = np.array([[-20.0, -19.0, -30.0, -31.0]], np.float32), np.zeros((1, 2), np.float32), np.zeros(4)
    logits = logits if score_func == "sigmoid" else np.append(logits[:, :3], [[3.0]], 1)
    attributes = {"top_k": 1, "topk_group": 2, "score_func": score_func, "group_score": group_score}
    right = 1 if score_func == "sigmoid" else 3
    meant, other = (expert_choices(logits, groups, bias, np.array([[e]]), attributes)[1] for e in (right, 0))
    assert judge(meant, meant).passed and not judge(meant, other).passed


def test_dot_bound_holds() -> None:
    """Against sums of 4096 products in fp32, in an order that is bad on purpose."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(4096).astype(np.float32) for _ in range(2))
    total = np.float32(0)
    for x, y in zip(a, b, strict=True):
        total = np.float32(total + np.float32(x * y))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    magnitude: Array = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    assert 0 < abs(float(total) - exact) <= dot_bound(magnitude, 4096)


@pytest.mark.parametrize("fine", [False, True], ids=["coarse", "fine"])
@pytest.mark.parametrize("causal", [0, 1], ids=["full", "causal"])
def test_block_choice_explains_the_reference(fine: bool, causal: int) -> None:
    """What the reference keeps is forced or among the best of those that compete."""
    query, key = torch.randn(2, 4, 9, 6), torch.randn(2, 2, 5, 6)
    past, new = torch.tensor([11, 0], dtype=torch.int32), torch.tensor([9, 5], dtype=torch.int32)
    attributes = {**ROUTE, "causal": causal}
    candidates = torch.randint(-1, 6, (2, 1, 9, 4), dtype=torch.int32) if fine else None
    if candidates is not None:
        routes = reference.fine_route(query, key, candidates, past, new, **attributes)
    else:
        routes = reference.coarse_route(query, key, past, new, **attributes)
    arrays = query.numpy(), key.numpy(), routes.numpy(), None if candidates is None else candidates.numpy()
    choices = block_choice(*arrays, past.numpy().astype(np.int64), new.numpy().astype(np.int64), attributes)
    assert choices.score.shape == (2 * (9 + 5), 5), "one row for each valid token and selection head"
    for score, kept, competing in zip(choices.score, choices.kept, choices.open, strict=True):
        inside, outside = score[kept & competing], score[~kept & competing]
        assert kept.sum() <= 3 and (not len(inside) or not len(outside) or inside.min() > outside.max())
    assert judge(choices, choices).exact == len(choices.kept)


@pytest.mark.parametrize("group_score", ["external", "max", "top2_sum"])
@pytest.mark.parametrize("score_func", contract.SCORE_FUNCS)
@pytest.mark.parametrize("zero_fill", [0, 1])
def test_expert_choices_explain_the_reference(score_func: str, group_score: str, zero_fill: int) -> None:
    """With zero fill most biased scores are below 0, so that many experts of the other groups are chosen, in their order."""
    logits, groups, bias = torch.randn(20, 8), torch.randn(20, 4), torch.randn(8) - 3 * zero_fill
    attributes: dict[str, Any] = {"top_k": 3, "topk_group": 2, "score_func": score_func, "group_score": group_score}
    attributes["zero_fill"] = zero_fill
    ids, _ = reference.expert_route(logits, groups, bias, **attributes, normalize=1, scale=1.0)
    group, expert = expert_choices(logits.numpy(), groups.numpy(), bias.numpy(), ids.numpy(), attributes)
    assert (group.kept.sum(1) == 2).all() and (expert.kept.sum(1) == 3).all()
    assert not (expert.kept & ~expert.open).any(), "experts lie inside the kept groups"
    inside = np.repeat(group.kept, 2, axis=1)
    assert (expert.open == inside).all() == (not zero_fill) and (expert.kept & ~inside).any() == bool(zero_fill)
    lowest = np.where(expert.kept, expert.score, np.inf).min(1)
    best = np.where(expert.open & ~expert.kept, expert.score, -np.inf).max(1)
    assert (lowest >= best if zero_fill else lowest > best).all()
