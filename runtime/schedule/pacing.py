"""How much of a prompt is read between two decode steps, so that those who are generating hardly notice."""

from __future__ import annotations

from collections import deque
from statistics import median

# A client then waits for about 1 + RATIO decode steps between two tokens while another's long prompt is read. The promise is
# 3: what is left of it is for the machine's own hiccups, which make one step in a hundred half as long again.
RATIO = 1.0
LEAST_SECONDS = 0.02  # a pause this short goes unnoticed, and tiny pieces waste a fast model's time
# A short prompt is read at once, in one pause of this length at most. A call has costs that are the same for every size, so in
# pieces it would hold the others up for several times as long in all.
WHOLE_SECONDS = 0.1
_FIRST_CHUNK, _NUM_STEPS, _TELLING_CHUNK = 8, 32, 16


class PrefillPacer:
    """Chooses the tokens of a prefill chunk by measured time. most: the bundle's or the engine's limit.

    Alone, a prompt is read ``most`` tokens at a time. Beside rows that generate, a short one is read at once; a chunk of a long
    one may take RATIO times the median of the last decode steps, or LEAST_SECONDS, and its size follows from how long the
    previous ones took.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, float(min(_FIRST_CHUNK, most))
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self._token_seconds: float | None = None  # in chunks of some length

    def chunk(self, num_decoding: int, num_unread: int, *, is_begun: bool) -> int:
        """Tokens of the next chunk of a prompt that has ``num_unread`` left, while ``num_decoding`` rows generate.

        is_begun: whether part of the prompt was read before; the last piece of a long prompt is no short prompt.
        """
        if not num_decoding:
            return min(num_unread, self._most)
        if not is_begun and self._token_seconds is not None and num_unread * self._token_seconds <= WHOLE_SECONDS:
            return min(num_unread, self._most)
        return min(num_unread, max(1, int(self._size)))

    def record_decode(self, seconds: float) -> None:
        """A decode step took ``seconds``."""
        self._steps.append(seconds)

    def record_chunk(self, tokens: int, seconds: float, *, num_decoding: int) -> None:
        """A chunk of ``tokens``, read beside ``num_decoding`` rows that generate, took ``seconds``."""
        if tokens >= _TELLING_CHUNK:
            self._token_seconds = seconds / tokens
        if not num_decoding or not self._steps or seconds <= 0 or tokens > self._size:
            return
        budget = max(RATIO * median(self._steps), LEAST_SECONDS)
        wanted = min(tokens * budget / seconds, 3 * self._size)
        if wanted < self._size:
            # Damped: one slow call, which other processes on the machine may have caused, halves the size at most.
            self._size = max(1.0, (self._size + wanted) / 2)
        elif tokens >= int(self._size):
            # (The last piece of a prompt is short and says nothing about a longer one.) At least one more: where most of a
            # call's time is the same for every size, what is wanted by proportion is never reached.
            self._size = min(float(self._most), max(int(self._size) + 1.0, (self._size + wanted) / 2))
