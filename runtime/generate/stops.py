"""Where a text ends because of what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopFilter:
    """Text up to the first stop text, found across pieces; what may begin a stop text is held back.

    The match that ends first counts (of those, the one that starts first), so the result does not depend on how the text is
    cut into pieces. names: those of the special tokens, which are no part of the text. A stop text that holds one is looked for
    in the text with the names in their places, all others in the text as it is shown.
    """

    def __init__(self, stops: Sequence[str], names: Iterable[str] = ()) -> None:
        names = [name for name in names if name]
        self._named = tuple(stop for stop in stops if any(name in stop for name in names))
        self._shown = tuple(stop for stop in stops if stop not in self._named)
        self._held = ""
        self._hidden: set[int] = set()  # places in what is held that are a name's
        self.is_stopped = False

    def push(self, text: str, is_hidden: bool = False) -> str:
        """The text that is certain not to belong to a stop text. is_hidden: ``text`` is a special token's name."""
        if self.is_stopped or (is_hidden and not self._named):
            return ""
        held = self._held + text
        if is_hidden:
            self._hidden.update(range(len(self._held), len(held)))
        places = [place for place in range(len(held)) if place not in self._hidden] if self._hidden else range(len(held))
        shown = "".join(held[place] for place in places) if self._hidden else held
        matches = [(start + len(stop), start) for stop in self._named if (start := held.find(stop)) >= 0]
        for stop in self._shown:
            if (start := shown.find(stop)) >= 0:
                matches.append((places[start + len(stop) - 1] + 1, places[start]))
        if matches:
            self.is_stopped = True
            return self._take(held, min(matches)[1], drop=True)
        cut = len(held) - _num_open(held, self._named)
        if num_open := _num_open(shown, self._shown):
            cut = min(cut, places[-num_open])
        return self._take(held, cut)

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        return self._take(self._held, len(self._held))

    def _take(self, held: str, cut: int, drop: bool = False) -> str:
        """What is shown of the first ``cut`` characters; the others are held, or dropped."""
        hidden, self._held = self._hidden, "" if drop else held[cut:]
        if not hidden:
            return held[:cut]
        self._hidden = set() if drop else {place - cut for place in hidden if place >= cut}
        return "".join(character for place, character in enumerate(held[:cut]) if place not in hidden)


def _num_open(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)
