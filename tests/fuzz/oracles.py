"""What holds whatever comes in: one sentence and no traceback, an end in time, and no memory beyond a bound.

    make fuzz                                   an hour, other cases each time
    FUZZ_EXAMPLES=5000 pytest tests/fuzz        so many of each kind

In ``make test`` every kind has a few dozen cases, the same ones each time.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from bilevel.errors import BilevelError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SECONDS = 30  # of one case, on a machine that does other things too
MEMORY = 1 << 20  # KiB that the process may grow by in one case


def cases(few: int) -> settings:
    """Settings of a test: ``few`` cases in make test, the same in every run; FUZZ_EXAMPLES fresh ones where it is set."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if EXAMPLES else [])],
        suppress_health_check=list(HealthCheck),
    )


class TooLong(BaseException):
    """A case has not ended in time."""


@contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of one case."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"{SECONDS} s are over")

    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEMORY, f"the process has grown by {grown >> 10} MiB"


def outcome(call: Callable[[], Any], *refusals: type[BaseException]) -> str:
    """What became of a call: "done", or the sentence of a refusal: a BilevelError, or one of ``refusals``.

    Anything else that it raises is a fault, and so is a refusal that is no sentence.
    """
    with bounded():
        try:
            call()
        except (BilevelError, *refusals) as error:
            sentence = str(error)
            assert sentence and "\n" not in sentence and "Traceback" not in sentence, sentence
            assert len(sentence) < 3000, sentence[:200]
            return sentence
    return "done"
