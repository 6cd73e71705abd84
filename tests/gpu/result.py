"""How the checks of ``make gpu-test`` say what they found. Needs nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One line of the report. measure: the worst error or a count; ok: None where it was not run; ``measure`` is the reason."""

    name: str
    what: str
    measure: str
    ok: bool | None
