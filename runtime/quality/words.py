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


def spread(bounds: Sequence[float] | None, sign: str = "") -> str:
    """An interval in brackets, with a blank before it; "" where there is none."""
    return "" if bounds is None else f" ({bounds[0]:{sign}.2f} to {bounds[1]:{sign}.2f})"
