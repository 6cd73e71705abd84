"""The judgements behind ``bilevel check``, as pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bilevel import reference
from bilevel.export.choices import block_choice, expert_choices
from bilevel.export.judge import Array, Choice, Computation, Selection, dot_bound, judge_selection, loosen

ROUTE: dict[str, Any] = {
    "block_size": 4,
    "topk": 3,
    "num_selection_heads": 2,
    "init_blocks": 1,
    "local_blocks": 1,
    "causal": 1,
}


def choice(score: list[float], kept: list[int], bound: float = 1e-6, competing: list[int] | None = None) -> Choice:
    """One row."""
    options = np.arange(len(score))
    is_open = np.isin(options, options if competing is None else competing)
    return Choice(np.array([score]), np.full((1, len(score)), bound), np.isin(options, kept)[None], is_open[None])


def judge(reference_side: Choice, device: Choice) -> Selection:
    stats = Selection("router")
    judge_selection(stats, reference_side, device, "tokens 0..8")
    return stats


def test_judge_selection_equal_sets() -> None:
    stats = judge(choice([3, 2, 1], [0, 1]), choice([3, 2, 1], [0, 1]))
    assert stats.passed and (stats.rows, stats.exact, stats.excused, stats.jaccard_sum) == (1, 1, 0, 1.0)
    assert stats.smallest_margin == pytest.approx(0.5)


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
    two = Choice(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3), bool), np.ones((2, 3), bool))
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
    computation.add(np.array(got), np.array([1.0, 2.0]))
    computation.add(np.empty((0, 3)), np.empty((0, 3)))
    assert computation.error == pytest.approx(error) and computation.passed == (error <= 1e-4)


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
    made = block_choice(*arrays, past.numpy().astype(np.int64), new.numpy().astype(np.int64), attributes)
    assert made.score.shape == (2 * (9 + 5), 5), "one row for each valid token and selection head"
    for score, kept, competing in zip(made.score, made.kept, made.open, strict=True):
        inside, outside = score[kept & competing], score[~kept & competing]
        assert kept.sum() <= 3 and (not len(inside) or not len(outside) or inside.min() > outside.max())
    assert judge(made, made).exact == len(made.kept)


@pytest.mark.parametrize("group_score", ["external", "max", "top2_sum"])
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_expert_choices_explain_the_reference(score_func: str, group_score: str) -> None:
    logits, groups, bias = torch.randn(20, 8), torch.randn(20, 4), torch.randn(8)
    attributes: dict[str, Any] = {"top_k": 3, "topk_group": 2, "score_func": score_func, "group_score": group_score}
    ids, _ = reference.expert_route(logits, groups, bias, **attributes, normalize=1, scale=1.0)
    group, expert = expert_choices(logits.numpy(), groups.numpy(), bias.numpy(), ids.numpy(), attributes)
    assert (group.kept.sum(1) == 2).all() and (expert.kept.sum(1) == 3).all()
    assert not (expert.kept & ~expert.open).any(), "experts lie inside the kept groups"
    lowest = np.where(expert.kept, expert.score, np.inf).min(1)
    assert (lowest > np.where(expert.open & ~expert.kept, expert.score, -np.inf).max(1)).all()
