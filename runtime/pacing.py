"""How much of a prompt is read between two decode steps, so that those who are generating hardly notice."""

from __future__ import annotations

from collections import deque
from statistics import median

# A client then waits for about 1 + RATIO decode steps between two tokens while somebody's prompt is read; the promise is 3.
RATIO = 1.2
LEAST_SECONDS = 0.015  # nobody notices a pause as short as this, and tiny pieces waste a fast model's time
_FIRST_CHUNK, _NUM_STEPS = 8, 32


class PrefillPacer:
    """Chooses the tokens of a prefill chunk by measured time. most: the bundle's limit.

    Alone, a prompt is read ``most`` tokens at a time. Beside rows that generate, a chunk may take RATIO times the median of
    the last decode steps, or LEAST_SECONDS; its size follows from how long the previous ones took.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, float(min(_FIRST_CHUNK, most))
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)

    def chunk(self, num_decoding: int) -> int:
        """Most tokens of the next chunk while ``num_decoding`` rows generate."""
        return self._most if not num_decoding else max(1, int(self._size))

    def record_decode(self, seconds: float) -> None:
        """A decode step took ``seconds``."""
        self._steps.append(seconds)

    def record_chunk(self, tokens: int, seconds: float) -> None:
        """A chunk of ``tokens``, read beside rows that generate, took ``seconds``."""
        if not self._steps or seconds <= 0:
            return
        budget = max(RATIO * median(self._steps), LEAST_SECONDS)
        wanted = min(tokens * budget / seconds, 3 * self._size)
        if wanted < self._size:
            # Damped: one slow call, for which somebody else on the machine may be to blame, halves the size at most.
            self._size = max(1.0, (self._size + wanted) / 2)
        elif tokens >= int(self._size):
            # (The last piece of a prompt is short and says nothing about a longer one.) At least one more: where most of a call's
            # time is the same for every size, what is wanted by proportion is never reached.
            self._size = min(float(self._most), max(int(self._size) + 1.0, (self._size + wanted) / 2))
