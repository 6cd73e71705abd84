"""Word by word: in which routers a word's route differs, and how close its choices were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bilevel.export.check.compare import Judged
from bilevel.export.check.judge import EXCUSED, SAME, WRONG, Array
from bilevel.export.check.layered import Text
from bilevel.export.report.model import Word, WordState

_NAMES: dict[int, WordState] = {SAME: "same", EXCUSED: "excused", WRONG: "wrong"}


class WordStates:
    """Collects what every router did to the words of the first row of ``text``."""

    def __init__(self, text: Text) -> None:
        length = int(text.lengths[0])
        self.ids = text.ids[0, :length]
        self._margin = np.full(length, np.inf)
        self._differs: dict[int, dict[str, int]] = {}

    def add(self, judged: Judged) -> None:
        """Take the rows of one selection (``Comparison``'s on_rows)."""
        call, name = judged.where.call, judged.entry.name
        places = np.broadcast_to(np.arange(judged.mask.shape[2]), judged.mask.shape)[judged.mask]
        row = np.broadcast_to(np.arange(judged.mask.shape[0])[:, None, None], judged.mask.shape)[judged.mask]
        if len(judged.rows.state) != len(places):
            return  # a choice of another shape says nothing about single words
        first = row == 0
        position = call.past[0] + places[first]
        margin = np.where(np.isnan(judged.rows.margin[first]), np.inf, judged.rows.margin[first])
        np.minimum.at(self._margin, position, margin)
        state = judged.rows.state[first]
        for word, new_state in zip(position[state != SAME], state[state != SAME], strict=True):
            known = self._differs.setdefault(int(word), {})
            known[name] = max(known.get(name, SAME), int(new_state))

    def words(self, decode: Callable[[Array], str]) -> tuple[Word, ...]:
        """The report's ``words``. decode: token ids -> text."""
        words = []
        for position, text in enumerate(token_texts(self.ids, decode)):
            differs = self._differs.get(position, {})
            excused, wrong = (tuple(name for name, state in differs.items() if state == kind) for kind in (EXCUSED, WRONG))
            state = _NAMES[max(differs.values(), default=SAME)]
            words.append(Word(text, state, excused, wrong, float(self._margin[position])))  # infinite without a choice: None
        return tuple(words)


def token_texts(ids: Array, decode: Callable[[Array], str], window: int = 8) -> list[str]:
    """What each token adds to the text. Of tokens that make one character together, the last one adds it."""
    texts, start = [], 0
    for position in range(len(ids)):
        start = max(start, position - window)
        before, after = decode(ids[start:position]), decode(ids[start : position + 1])
        added = after[len(before) :] if after.startswith(before) else after.removeprefix(before.rstrip("\ufffd"))
        texts.append("" if added.endswith("\ufffd") else added)
    return texts
