"""Judgements of parity, as pure functions of arrays. One number never decides: a selection is judged by its margins, what is
computed from equal selections by its error.

Why a differing block can be right: two implementations add the same products in different orders. A dot product of n terms in
precision u is off by at most gamma_n * sum|q_i||k_i| with gamma_n = n*u / (1 - n*u) (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., eq. 3.5). Two blocks whose exact scores differ by less than both implementations' bounds may be
ordered either way; so may blocks whose scores moved because the operands themselves differ, which is measured, not guessed
(and judged on its own as computation). Every other difference is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
UNIT_ROUNDOFF = 2.0**-24  # fp32
COMPUTATION_LIMIT = 1e-4  # fp32: largest allowed error over the largest magnitude of the tensor


@dataclass
class Selection:
    """How one router's choices agree, over all rows judged so far.

    rows: choices compared. exact: rows with equal sets. jaccard_sum: sum of |A and B| / |A or B|. excused, unexcused: blocks
    chosen by one side only. smallest_margin: the least distance between a kept and a dropped score, over the larger of the two
    magnitudes; nan when no row had a choice.
    """

    name: str
    rows: int = 0
    exact: int = 0
    jaccard_sum: float = 0.0
    excused: int = 0
    unexcused: int = 0
    smallest_margin: float = float("inf")
    example: str = ""

    @property
    def passed(self) -> bool:
        return self.unexcused == 0

    def as_dict(self) -> dict[str, Any]:
        rows = max(self.rows, 1)
        return {
            "name": self.name,
            "rows": self.rows,
            "exact_rate": self.exact / rows,
            "jaccard": self.jaccard_sum / rows,
            "excused": self.excused,
            "unexcused": self.unexcused,
            "smallest_margin": None if np.isinf(self.smallest_margin) else self.smallest_margin,
            "example": self.example,
        }


@dataclass
class Computation:
    """Largest error of one tensor over the largest magnitude of its reference, over everything judged so far."""

    name: str
    error: float = 0.0
    limit: float = COMPUTATION_LIMIT

    def add(self, got: Array, expected: Array) -> None:
        """Compare one pair of arrays; a non-finite value on one side only counts as an infinite error."""
        if not expected.size:
            return
        scale = float(np.abs(expected).max()) or 1.0
        difference = float(np.abs(got.astype(np.float64) - expected).max()) / scale
        self.error = max(self.error, difference if np.isfinite(difference) else float("inf"))

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "error": self.error, "limit": self.limit}


@dataclass
class Choice:
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


def loosen(inner: Choice, outer_reference: Choice, outer_device: Choice) -> None:
    """Excuse inner differences in rows whose outer choice could rightly have gone the other way (groups before experts)."""
    kept, score = outer_reference.kept, outer_reference.score
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


def judge_selection(stats: Selection, reference: Choice, device: Choice, where: str = "") -> None:
    """Compare two sides' choices row by row and add them to ``stats``; ``reference.open`` says what competed.

    Where PyTorch kept x and the graph kept y instead, both sides sorted rightly only if the exact scores of x and y lie
    within both sides' rounding bounds plus the measured movement of these two scores. A block is excused when it competes
    and this holds against every block that it may have changed places with.
    """
    a, b = reference.kept, device.kept
    if a.shape != b.shape:
        stats.rows += len(a)
        stats.unexcused += int(a.sum())
        stats.example = (
            stats.example or f"{where}: PyTorch makes {len(a)} choices of {a.shape[1]}, the graph {len(b)} of {b.shape[1]}"
        )
        return
    differs = a != b
    count_equal(stats, a, b)
    stats.smallest_margin = min(stats.smallest_margin, _smallest_margin(reference))
    slack = reference.bound + device.bound + np.abs(device.score - reference.score)
    for row in np.nonzero(differs.any(1))[0]:
        ours, theirs = np.nonzero(a[row] & ~b[row])[0], np.nonzero(b[row] & ~a[row])[0]
        distance = np.abs(reference.score[row, ours][:, None] - reference.score[row, theirs])
        allowed = slack[row, ours][:, None] + slack[row, theirs]
        fair = (distance <= allowed) & reference.open[row, ours][:, None] & reference.open[row, theirs]
        excused = int(fair.all(1).sum() + fair.all(0).sum()) if len(ours) == len(theirs) else 0
        stats.excused += excused
        stats.unexcused += len(ours) + len(theirs) - excused
        if excused < len(ours) + len(theirs) and not stats.example:
            stats.example = _example(f"{where} row {row}", ours, theirs, distance, allowed)


def _smallest_margin(choice: Choice) -> float:
    """The least distance between a kept and a dropped score that competed, over the larger of their magnitudes."""
    lowest_kept = np.where(choice.kept & choice.open, choice.score, np.inf).min(1)
    highest_dropped = np.where(~choice.kept & choice.open, choice.score, -np.inf).max(1)
    scale = np.maximum(np.abs(lowest_kept), np.abs(highest_dropped))
    real = np.isfinite(lowest_kept) & np.isfinite(highest_dropped) & (scale > 0)
    return float(((lowest_kept - highest_dropped)[real] / scale[real]).min(initial=np.inf))


def _example(where: str, ours: Array, theirs: Array, distance: Array, allowed: Array) -> str:
    """One sentence on a row that differs and is not excused."""
    text = f"{where}: PyTorch alone keeps {ours.tolist()}, the graph alone {theirs.tolist()}"
    if not distance.size:
        return text
    worst = np.unravel_index((distance - allowed).argmax(), distance.shape)
    return f"{text}; their scores differ by up to {distance[worst]:.3g}, {allowed[worst]:.3g} allowed"
