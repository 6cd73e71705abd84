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


def judge_selection(stats: Selection, reference: Choice, device: Choice, where: str = "") -> None:
    """Compare two sides' choices row by row and add them to ``stats``; ``reference.open`` says what competed.

    A block that only one side kept is excused when it competes and its distance to the other side of the reference's cut is
    within both sides' rounding bounds plus the measured movement of the scores involved.
    """
    a, b = reference.kept, device.kept
    differs = a != b
    stats.rows += len(a)
    stats.exact += int((~differs.any(1)).sum())
    union = (a | b).sum(1)
    stats.jaccard_sum += float(np.where(union, (a & b).sum(1) / np.maximum(union, 1), 1.0).sum())
    slack = reference.bound + device.bound + np.abs(device.score - reference.score)
    lowest_kept = np.where(a & reference.open, reference.score, np.inf)
    highest_dropped = np.where(~a & reference.open, reference.score, -np.inf)
    at_kept, at_dropped = lowest_kept.argmin(1), highest_dropped.argmax(1)
    rows = np.arange(len(a))
    cut_kept, cut_dropped = lowest_kept[rows, at_kept], highest_dropped[rows, at_dropped]
    margin = cut_kept - cut_dropped
    if np.isfinite(margin).any():
        scale = np.maximum(np.abs(cut_kept), np.abs(cut_dropped))
        finite = np.isfinite(margin) & (scale > 0)
        stats.smallest_margin = min(stats.smallest_margin, float((margin[finite] / scale[finite]).min(initial=np.inf)))
    for row in np.nonzero(differs.any(1))[0]:
        for option in np.nonzero(differs[row])[0]:
            other = at_dropped[row] if a[row, option] else at_kept[row]
            cut = cut_dropped[row] if a[row, option] else cut_kept[row]
            distance = abs(reference.score[row, option] - cut)
            allowed = slack[row, option] + slack[row, other]
            if reference.open[row, option] and distance <= allowed and a[row].sum() == b[row].sum():
                stats.excused += 1
            else:
                stats.unexcused += 1
                stats.example = stats.example or (
                    f"{where} row {row}: option {option} is kept by {'PyTorch' if a[row, option] else 'the graph'} only, "
                    f"{distance:.3g} from the cut, {allowed:.3g} allowed"
                )
