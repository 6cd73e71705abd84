"""Several tokens a call: what a text will probably go on with is copied from where its last words stood before.

Prompt-lookup speculation (Saxena, "Prompt Lookup Decoding", 2023): a draft is what followed an earlier occurrence of the text's
last tokens (``ngrams``); one call computes the logits behind every token of it, and tokens are chosen from them one after the
other as if there were no draft, until one differs from it. What is drafted decides how many tokens a call gives, never which
ones: a row draws as many random numbers from the same generator. Keys and values of refused tokens lie behind what the row
holds, where the next call writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bilevel.runtime.backend.session import Caches, Logits
from bilevel.runtime.generate.rows import Row
from bilevel.runtime.generate.sampling import RowLogits

T = TypeVar("T")
# Drafts may lose this share of the time that generating takes, and so many steps at first: what it costs to find out whether
# they pay on this machine and this text.
_SHARE, _STEPS = 0.02, 2.0
_MOST_CREDIT = 4.0  # steps that drafts which paid may lose later
_REFRESH = 32  # steps with drafts, after which one without is timed again


class DraftBudget:
    """Whether drafts pay: time saved against steps without them, as it is measured; they stop where they lose."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}  # rows -> seconds of a step without drafts
        self._balance, self._spent, self._since = 0.0, 0.0, 0

    def allows(self, num_rows: int) -> bool:
        """Whether a step of ``num_rows`` may have drafts."""
        plain = self._plain.get(num_rows)
        if plain is None or self._since >= _REFRESH:
            self._since = 0
            return False
        return self._balance > -(_STEPS * plain + _SHARE * self._spent)

    def record(self, num_rows: int, num_drafted: int, num_tokens: int, seconds: float) -> None:
        """A step of ``num_rows`` with ``num_drafted`` tokens in its drafts gave ``num_tokens`` in ``seconds``."""
        self._spent += seconds
        plain = self._plain.get(num_rows)
        if num_drafted and plain is not None:
            self._since += 1
            self._balance = min(self._balance + num_tokens / num_rows * plain - seconds, _MOST_CREDIT * plain)
        elif not num_drafted:
            self._plain[num_rows] = seconds if plain is None else plain + 0.2 * (seconds - plain)


def draft_for(rows: Sequence[Row], room: int) -> dict[Row, list[int]]:
    """Drafts for those of ``rows``, all of which generate, whose text is likely to go on in a known way.

    room: tokens that the caches hold behind the last one of any row that the call runs over.
    """
    drafts = {row: row.draft(room) for row in rows}
    return {row: draft for row, draft in drafts.items() if draft}


@dataclass(frozen=True)
class DraftedCall:
    """One call for a token, or a draft's worth of them, in each of some rows of caches.

    lines: the row of the caches of each. input_ids: int64 [B, L]. new_len: int32 [B], 0 where none of the rows is.
    """

    lines: Mapping[Row, int]
    drafts: Mapping[Row, list[int]]
    input_ids: NDArray[np.int64]
    new_len: NDArray[np.int32]

    @classmethod
    def of(cls, lines: Mapping[Row, int], batch: int, drafts: Mapping[Row, list[int]]) -> DraftedCall:
        """Takes each row's last token, which counts as cached from now on."""
        length = 1 + max(map(len, drafts.values()), default=0)
        input_ids, new_len = np.zeros((batch, length), np.int64), np.zeros(batch, np.int32)
        for row, line in lines.items():
            tokens = [*row.take(1), *drafts.get(row, ())]
            input_ids[line, : len(tokens)], new_len[line] = tokens, len(tokens)
        return cls(lines, drafts, input_ids, new_len)

    @property
    def num_drafted(self) -> int:
        """Tokens of all drafts."""
        return sum(map(len, self.drafts.values()))

    def logits(self, caches: Caches, last: Logits) -> dict[Row, list[RowLogits]]:
        """Of each row, behind its last token and behind every token of its draft. last: what the call returned."""
        places = [(line, column) for row, line in self.lines.items() for column in range(len(self.drafts.get(row, ())))]
        scores = iter(caches.score(*zip(*places, strict=True)) if places else ())
        return {row: [*(next(scores) for _ in self.drafts.get(row, ())), last[line]] for row, line in self.lines.items()}


def follow(
    row: Row, draft: Sequence[int], logits: Sequence[RowLogits], extend: Callable[[RowLogits], tuple[T, bool]]
) -> list[T]:
    """Extend a row as long as it says what was drafted, and by the token that differs; what ``extend`` gave for each.

    extend: chooses one token and says whether the row goes on.
    """
    results: list[T] = []
    for place, each in enumerate(logits):
        result, goes_on = extend(each)
        results.append(result)
        if not goes_on or place == len(draft) or row.last_token != draft[place]:
            break
        row.num_cached += 1
    if draft:
        row.drafter.taken(len(results) - 1, len(draft))
    return results
