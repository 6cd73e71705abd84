"""What a text may go on with: what followed its last tokens where they stood before."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 8  # tokens of a draft
NGRAM = 2  # last tokens that must have stood before
_PLACES, _CONTEXT = 16, 8  # latest places that are compared, by how many tokens before them are the text's last
_PATIENCE = 64  # most steps that a row whose drafts are refused goes without one


class Drafter:
    """Drafts for one row's text, at most ``LONGEST`` tokens each; longer ones where they are taken, rarer ones where not."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], list[int]] = {}  # last tokens -> places behind them, ascending
        self._indexed = NGRAM
        self._next, self._at = 0, 0  # where the last draft was copied from, and where it was put
        self._longest, self._refused, self._rest = 4, 0, 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow ``tokens``; empty where nothing is known."""
        for place in range(self._indexed, len(tokens)):
            self._places.setdefault(tuple(tokens[place - NGRAM : place]), []).append(place)
        self._indexed = max(self._indexed, len(tokens))
        if self._rest:
            self._rest -= 1
            return []
        places = self._places.get(tuple(tokens[-NGRAM:]), [])
        if not places or most < 1:
            return []
        place = self._best(places, tokens)
        draft = list(tokens[place : place + min(most, self._longest)])
        self._next, self._at = place, len(tokens)
        return draft

    def _best(self, places: Sequence[int], tokens: Sequence[int]) -> int:
        """The place with the longest context in common; of several the nearest to where the last draft would have gone on."""
        wanted = self._next + len(tokens) - self._at if self._at else places[-1]

        def rank(place: int) -> tuple[int, int]:
            equal = NGRAM
            while equal < min(_CONTEXT, place) and tokens[place - 1 - equal] == tokens[-1 - equal]:
                equal += 1
            return equal, -abs(place - wanted)

        return max(places[-_PLACES:], key=rank)

    def taken(self, count: int, drafted: int) -> None:
        """``count`` of ``drafted`` tokens were what the text went on with."""
        if count == drafted:
            self._longest = min(2 * self._longest, LONGEST)
        else:
            self._longest = max(2, count + 1)
        self._refused = 0 if count else self._refused + 1
        if self._refused > 1:
            self._rest = min(2**self._refused, _PATIENCE)
