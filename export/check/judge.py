"""Judgements of parity, as pure functions of arrays. One number never decides: a selection is judged by its margins, what is
computed from equal selections by its error.

Why a differing block can be right: two implementations add the same products in different orders. A dot product of n terms in
precision u is off by at most gamma_n * sum|q_i||k_i| with gamma_n = n*u / (1 - n*u) (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., eq. 3.5). Scores are accumulated in fp32 whatever the model's type is, so u = 2^-24 and the sum
is over the operands as stored. Two blocks whose exact scores differ by less than both implementations' bounds may be ordered
either way; so may blocks whose scores moved because the operands themselves differ, which is measured, not guessed (and judged
on its own as computation). Every other difference is an error.

Why a computed tensor may be off: in fp32 by the order of sums, far below the fixed limit. In fp16 and bf16 by rounding at every
step, and there the measure is PyTorch itself: twice the error that plain PyTorch makes in the same precision against fp64, from
the same input and the same choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bilevel.export.report.judgements import Level, Margins, RouterResult, TensorResult, Tolerance

Array = np.ndarray[Any, Any]
UNIT_ROUNDOFF, SMALLEST_NORMAL = 2.0**-24, 2.0**-126  # fp32
ROUNDOFF = {"float32": UNIT_ROUNDOFF, "float16": 2.0**-11, "bfloat16": 2.0**-8}
COMPUTATION_LIMIT = 1e-4  # fp32: largest allowed error over the largest magnitude of the tensor
ALLOWED_FACTOR = 2  # lower precisions: how much further from fp64 than PyTorch in the same precision
SAME, EXCUSED, WRONG = 0, 1, 2


@dataclass
class Rows:
    """What became of each row (one choice): state SAME, EXCUSED or WRONG; margin and tolerance relative, nan where not open."""

    state: Array
    margin: Array
    tolerance: Array


@dataclass
class Selection:
    """How one router's choices agree, over all rows judged so far.

    rows: choices compared. exact: rows with equal sets. jaccard_sum: sum of |A and B| / |A or B|. excused, unexcused: blocks
    chosen by one side only. margins, tolerances: of every row that had a choice, the distance between the last kept and the
    first dropped score and what both sides' rounding allows, both over the larger of the two magnitudes.
    """

    name: str
    rows: int = 0
    exact: int = 0
    jaccard_sum: float = 0.0
    excused: int = 0
    unexcused: int = 0
    example: str = ""
    margins: list[Array] = field(default_factory=list)
    tolerances: list[Array] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.unexcused == 0

    def result(self, layer: int | None, level: Level, order: int, operator: str) -> RouterResult:
        """The counts, the smallest margin and the histogram of margins."""
        rows = max(self.rows, 1)
        margins, tolerances = (np.concatenate(parts) if parts else np.zeros(0) for parts in (self.margins, self.tolerances))
        had_choice = np.isfinite(margins)  # its tolerance may be infinite: a choice that loosen() excused as a whole
        margins, tolerances = margins[had_choice], tolerances[had_choice]
        finite = tolerances[np.isfinite(tolerances)]
        return RouterResult(
            name=self.name,
            layer=layer,
            level=level,
            order=order,
            operator=operator,
            rows=self.rows,
            exact_rate=self.exact / rows,
            jaccard=self.jaccard_sum / rows,
            excused=self.excused,
            unexcused=self.unexcused,
            smallest_margin=float(margins.min()) if margins.size else None,
            margins=_histogram(margins, tolerances),
            tolerance=Tolerance(float(np.median(finite)), float(finite.max())) if finite.size else Tolerance(None, None),
            example=self.example,
            passed=self.passed,
        )


def _histogram(margins: Array, tolerances: Array) -> Margins:
    """Margins in bins of a quarter of a decade, and how many rows rounding could have turned over."""
    positive = margins[margins > 0]
    logs = np.log10(positive) if positive.size else np.zeros(1)
    low, high = np.floor(logs.min() * 4), np.floor(logs.max() * 4) + 1
    edges = np.arange(low, high + 1) / 4
    counts = np.histogram(logs, edges)[0] if positive.size else np.zeros(len(edges) - 1, int)
    fragile, ties = int((margins <= tolerances).sum()), int((margins == 0).sum())
    return Margins(tuple(edges.tolist()), tuple(counts.tolist()), fragile, ties)


@dataclass
class Computation:
    """Largest error of one tensor over the largest magnitude of its reference, over everything judged so far.

    precision: the type the graph computes in. error: the graph's. floor: that of plain PyTorch in the same precision.
    worst: the execution that erred most; executions: the error of each.
    """

    name: str
    precision: str = "float32"
    error: float = 0.0
    floor: float = 0.0
    worst: str = ""
    executions: dict[str, float] = field(default_factory=dict)

    def add(self, execution: str, got: Array, exact: Array, plain: Array | None = None) -> bool:
        """Compare one array with the fp64 reference; returns whether the tensor still passes.

        A non-finite value on one side only counts as an infinite error; so does another shape. plain: PyTorch's own array.
        """
        if plain is not None:
            self.floor = max(self.floor, relative_error(plain, exact))
        error = relative_error(got, exact)
        self.executions[execution] = max(self.executions.get(execution, 0.0), error)
        if not self.worst or error > self.error:
            self.error, self.worst = max(error, self.error), execution
        return self.passed

    @property
    def limit(self) -> float:
        """See the module's docstring; never below one unit in the last place of the largest magnitude."""
        if self.precision == "float32":
            return COMPUTATION_LIMIT
        return ALLOWED_FACTOR * max(self.floor, ROUNDOFF[self.precision])

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def result(self, layer: int | None, part: str, order: int, operator: str | None) -> TensorResult:
        limit, passed = self.limit, self.passed
        return TensorResult(self.name, layer, part, order, operator, self.error, self.floor, limit, self.worst, passed)


def relative_error(got: Array, exact: Array) -> float:
    """Largest difference over the largest magnitude of ``exact``; infinite where shapes differ or a value is not finite."""
    if got.shape != exact.shape:
        return float("inf")
    if not exact.size:
        return 0.0
    scale = float(np.abs(exact).max()) or 1.0
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(got.astype(np.float64) - exact).max()) / scale
    return difference if np.isfinite(difference) else float("inf")


@dataclass
class ScoredChoices:
    """What one router chose among, on one side. score: fp64 [rows, options], bound: what rounding may move it by.

    kept: bool [rows, options]. open: bool, the options that compete (not forced, visible, proposed).
    """

    score: Array
    bound: Array
    kept: Array
    open: Array = field(default_factory=lambda: np.empty(0, dtype=bool))


def dot_bound(magnitude: Array, terms: int) -> Array:
    """Rounding bound of a sum of ``terms`` products whose absolute values add up to ``magnitude``."""
    gamma = terms * UNIT_ROUNDOFF / (1 - terms * UNIT_ROUNDOFF)
    return magnitude * gamma


def loosen(inner: ScoredChoices, outer_reference: ScoredChoices, outer_device: ScoredChoices) -> None:
    """Excuse inner differences in rows whose outer choice could rightly have gone the other way (groups before experts)."""
    kept, score = outer_reference.kept, outer_reference.score
    with np.errstate(invalid="ignore"):  # an option that is never selected scores -inf
        slack = (outer_reference.bound + outer_device.bound + np.abs(outer_device.score - score)).max(1)
        gap = np.where(kept, score, np.inf).min(1) - np.where(kept, -np.inf, score).max(1)
    unsure = gap <= 2 * slack
    inner.open = inner.open | unsure[:, None]
    inner.bound = np.where(unsure[:, None], np.inf, inner.bound)


def count_equal(stats: Selection, ours: Array, theirs: Array) -> None:
    """Add the rows of two sides' choices, bool [rows, options], to the counts of ``stats``, without a judgement."""
    stats.rows += len(ours)
    stats.exact += int((ours == theirs).all(1).sum())
    union = (ours | theirs).sum(1)
    stats.jaccard_sum += float(np.where(union, (ours & theirs).sum(1) / np.maximum(union, 1), 1.0).sum())


def judge_selection(stats: Selection, reference: ScoredChoices, device: ScoredChoices, where: str = "") -> Rows:
    """Compare two sides' choices row by row and add them to ``stats``; ``reference.open`` says what competed.

    Where PyTorch kept x and the graph kept y instead, both sides sorted rightly only if the exact scores of x and y lie
    within both sides' rounding bounds plus the measured movement of these two scores. A block is excused when it competes
    and this holds against every block that it may have changed places with.
    """
    a, b = reference.kept, device.kept
    if a.shape != b.shape:
        stats.rows += len(a)
        stats.unexcused += max(int(a.sum()), 1)
        stats.example = (
            stats.example or f"{where}: PyTorch makes {len(a)} choices of {a.shape[1]}, the graph {len(b)} of {b.shape[1]}"
        )
        return Rows(np.full(len(a), WRONG), np.full(len(a), np.nan), np.full(len(a), np.nan))
    count_equal(stats, a, b)
    with np.errstate(invalid="ignore"):
        slack = reference.bound + device.bound + np.abs(device.score - reference.score)
    slack = np.where(np.isnan(slack), np.inf, slack)
    margin, tolerance = relative_margins(reference, slack)
    stats.margins.append(margin)
    stats.tolerances.append(tolerance)
    state = np.full(len(a), SAME)
    for row in np.nonzero((a != b).any(1))[0]:
        ours, theirs = np.nonzero(a[row] & ~b[row])[0], np.nonzero(b[row] & ~a[row])[0]
        with np.errstate(invalid="ignore"):
            distance = np.abs(reference.score[row, ours][:, None] - reference.score[row, theirs])
        allowed = slack[row, ours][:, None] + slack[row, theirs]
        fair = (distance <= allowed) & reference.open[row, ours][:, None] & reference.open[row, theirs]
        excused = int(fair.all(1).sum() + fair.all(0).sum()) if len(ours) == len(theirs) else 0
        wrong = len(ours) + len(theirs) - excused
        stats.excused += excused
        stats.unexcused += wrong
        state[row] = WRONG if wrong else EXCUSED
        if wrong and not stats.example:
            stats.example = _example(f"{where}, row {row}", ours, theirs, distance, allowed)
    return Rows(state, margin, tolerance)


def relative_margins(choice: ScoredChoices, slack: Array) -> tuple[Array, Array]:
    """Of each row, the distance between its last kept and first dropped open score, and the slack of these two: both over the
    larger of the two magnitudes; nan where the row had no choice."""
    rows = np.arange(len(choice.score))
    kept = np.where(choice.kept & choice.open, choice.score, np.inf)
    dropped = np.where(~choice.kept & choice.open, choice.score, -np.inf)
    if not kept.size:
        return np.zeros(len(rows)), np.zeros(len(rows))
    last, first = kept.argmin(1), dropped.argmax(1)
    low, high = kept[rows, last], dropped[rows, first]
    scale = np.maximum(np.abs(low), np.abs(high))
    real = np.isfinite(low) & np.isfinite(high) & (scale > 0)
    scale = np.where(real, scale, 1.0)
    with np.errstate(invalid="ignore"):
        margin = np.where(real, np.abs(low - high) / scale, np.nan)
        tolerance = np.where(real, (slack[rows, last] + slack[rows, first]) / scale, np.nan)
    return margin, tolerance


def _example(where: str, ours: Array, theirs: Array, distance: Array, allowed: Array) -> str:
    """One sentence on a row that differs and is not excused."""
    text = f"{where}: PyTorch alone keeps {ours.tolist()}, the graph alone {theirs.tolist()}"
    if not distance.size:
        return text
    worst = np.unravel_index((distance - allowed).argmax(), distance.shape)
    return f"{text}; their scores differ by up to {distance[worst]:.3g}, {allowed[worst]:.3g} allowed"
