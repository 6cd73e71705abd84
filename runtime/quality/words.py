"""How the terminal and the page name and write what a report holds."""

from __future__ import annotations

from collections.abc import Sequence

from bilevel.runtime.quality.exams import COPY, LOSS, NEEDLES, PAIRS
from bilevel.runtime.quality.model import DENSE, MASS, ROUTED, WINDOW

LABELS = {NEEDLES: "hidden facts", PAIRS: "key-value pairs", COPY: "rare strings", LOSS: "loss"}
NAMES = {ROUTED: "routed", DENSE: "dense", WINDOW: "sink + window", MASS: "true mass"}


def number(value: float | None, digits: int = 2) -> str:
    """A number, "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """A difference, with its sign; what rounds to nothing has a plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def spread(bounds: Sequence[float] | None, *, has_sign: bool = False) -> str:
    """An interval in brackets, with a blank before it; "" where there is none."""
    if bounds is None:
        return ""
    low, high = (signed(bound) if has_sign else f"{bound:.2f}" for bound in bounds)
    return f" ({low} to {high})"
