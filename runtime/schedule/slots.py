"""The places of a running batch: who sits where, and which tokens' caches each place holds."""

from __future__ import annotations

from collections.abc import Sequence

from bilevel.runtime.generate.rows import Row


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of equal first tokens of two lists; quick where they differ early."""
    most, start, step = min(len(a), len(b)), 0, 64
    while start < most and a[start : start + step] == b[start : start + step]:
        start, step = min(start + step, most), 2 * step
    end = min(start + step, most)
    return next((i for i in range(start, end) if a[i] != b[i]), most)


class Slots:
    """``count`` places, each taken by a row or free; a free one still holds the caches of the row that left it.

    Whether those caches may be used again is decided by token ids alone: keys, values and block keys of a prefix depend on
    nothing else.
    """

    def __init__(self, count: int) -> None:
        self.rows: list[Row | None] = [None] * count
        self._left: list[list[int]] = [[] for _ in range(count)]
        self._used = [0] * count
        self._clock = 0

    @property
    def active(self) -> list[Row]:
        """The rows, in the order of their places."""
        return [row for row in self.rows if row is not None]

    @property
    def has_room(self) -> bool:
        """Whether a place is free."""
        return None in self.rows

    def cached(self, index: int) -> Sequence[int]:
        """The tokens whose caches place ``index`` holds."""
        row = self.rows[index]
        return self._left[index] if row is None else row.cached_ids

    def num_cached_at(self, index: int) -> int:
        """The number of tokens whose caches place ``index`` holds."""
        row = self.rows[index]
        return len(self._left[index]) if row is None else row.num_cached

    @property
    def num_cached(self) -> int:
        """Tokens held in all places together."""
        return sum(map(self.num_cached_at, range(len(self.rows))))

    def longest_prefix(self, prompt: Sequence[int]) -> tuple[int, int]:
        """(place, length) of the longest cached prefix of ``prompt``, less its last token, which must be run for its logits."""
        wanted = prompt[:-1]
        lengths = [common_prefix(self.cached(index), wanted) for index in range(len(self.rows))]
        best = max(range(len(lengths)), key=lambda index: (lengths[index], self.rows[index] is None))
        return best, lengths[best]

    def choose(self, source: int, length: int) -> int:
        """A free place for a prompt whose first ``length`` tokens are cached at ``source``.

        Its own, where the prompt continues everything that is held there; else the one that keeps the active rows closest
        together, and of those the least recently used: what others may still continue is kept as long as possible.
        """
        if self.rows[source] is None and length == len(self._left[source]) > 0:
            return source
        taken = [index for index, row in enumerate(self.rows) if row is not None]

        def cost(index: int) -> tuple[int, int]:
            return max([*taken, index]) - min([*taken, index]), self._used[index]

        return min((index for index, row in enumerate(self.rows) if row is None), key=cost)

    def hold(self, index: int, tokens: Sequence[int]) -> None:
        """Note that a free place holds the caches of these tokens now."""
        self._left[index] = list(tokens)
        self._touch(index)

    def enter(self, row: Row) -> None:
        """Give ``row`` the place row.index."""
        self.rows[row.index], self._left[row.index] = row, []
        self._touch(row.index)

    def leave(self, row: Row, *, is_whole: bool = True) -> None:
        """Free the place of ``row``; what it cached stays for others unless it is not whole."""
        self.rows[row.index] = None
        self._left[row.index] = list(row.cached_ids) if is_whole else []
        self._touch(row.index)

    def _touch(self, index: int) -> None:
        self._clock += 1
        self._used[index] = self._clock
