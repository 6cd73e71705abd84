"""Calls read out of a text as it comes, in a layout that the grammar has enforced."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bilevel.runtime.generate.literal import MARK
from bilevel.runtime.serve.tools.layouts import Layout


@dataclass
class CallDelta:
    """What has come of a call. id, name: with its first piece only. arguments: the next characters of its JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Delta:
    """What one token added: text of the answer, and pieces of calls, one for each call at most."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class CallParser:
    """Reads one answer. names: of the tools; special: the special tokens that the layout's texts may name.

    num_calls: calls that have begun. A special token comes as its name behind a mark, so that a text which spells one is text.
    """

    def __init__(self, layout: Layout, names: Sequence[str], special: Iterable[str] = ()) -> None:
        self._id_length, self._is_bare = layout.id_length, not layout.opener
        own = f"{layout.opener} {layout.last} {layout.separator} {' '.join(layout.head)}"
        self._special = [name for name in special if name and name in own]
        heads = {name: layout.head_of(name) for name in names}
        self._first = {self._marked(layout.opener + layout.lead + head): name for name, head in heads.items()}
        separator = layout.separator
        self._next = {} if separator is None else {self._marked(separator + head): name for name, head in heads.items()}
        self._held, self._value = "", JsonEnd()
        self._move: Callable[[Delta], bool] = self._before
        self.num_calls = 0

    @property
    def is_whole(self) -> bool:
        """Whether there are calls, the last one with all of its arguments."""
        return self.num_calls > 0 and self._move != self._arguments

    def push(self, text: str, special: str | None = None) -> Delta:
        """What these characters make certain. special: the name of a special token behind them."""
        self._held += text + (MARK + special if special in self._special else "")
        delta = Delta()
        while self._move(delta):
            pass
        return delta

    def finish(self) -> Delta:
        """What was held back, when no more text follows."""
        held, self._held = self._held, ""
        return Delta("" if self.num_calls else held.replace(MARK, ""))

    def _marked(self, text: str) -> str:
        for name in self._special:
            text = text.replace(name, MARK + name)
        return text

    # Moves: each takes what it can of what is held, and says whether another move may follow.

    def _before(self, delta: Delta) -> bool:
        """Text in front of the first call, or without any."""
        place, is_whole = _find(self._held, self._first)
        if self._is_bare and place:
            place, is_whole = len(self._held), False  # it does not begin like a call, so it is none
            self._move = self._only_text
        delta.content += self._held[:place].replace(MARK, "")
        self._held = self._held[place:]
        return is_whole and self._begin(self._first, delta)

    def _only_text(self, delta: Delta) -> bool:
        delta.content += self._held
        self._held = ""
        return False

    def _between(self, delta: Delta) -> bool:
        """Behind a call: the next one, or what closes them."""
        return self._begin(self._next, delta)

    def _arguments(self, delta: Delta) -> bool:
        end = self._value.find(self._held)
        text, self._held = self._held[:end], "" if end is None else self._held[end:]
        index = self.num_calls - 1
        if not delta.calls or delta.calls[-1].index != index:
            delta.calls.append(CallDelta(index))
        delta.calls[-1].arguments += text
        if end is not None:
            self._move = self._between
        return end is not None

    def _begin(self, heads: Mapping[str, str], delta: Delta) -> bool:
        head = next((head for head in heads if self._held.startswith(head)), None)
        if head is None:
            return False
        self._held = self._held[len(head) :]
        length = self._id_length
        call_id = f"call_{secrets.token_hex(12)}" if length is None else secrets.token_hex(length)[:length]
        delta.calls.append(CallDelta(self.num_calls, call_id, heads[head]))
        self.num_calls, self._value, self._move = self.num_calls + 1, JsonEnd(), self._arguments
        return True


class JsonEnd:
    """Looks for the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_text, self._is_escaped = 0, False, False

    def find(self, piece: str) -> int | None:
        """The place in ``piece`` behind the object's last brace, None where it goes on."""
        for place, character in enumerate(piece):
            if self._in_text:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_text = False
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return place + 1
        return None


def _find(text: str, heads: Mapping[str, str]) -> tuple[int, bool]:
    """(the first place where one of ``heads`` stands, True), or (where one may have begun, else the text's length; False)."""
    if places := [place for head in heads if (place := text.find(head)) >= 0]:
        return min(places), True
    longest = max(map(len, heads))
    starts = range(max(0, len(text) - longest + 1), len(text))
    return next((place for place in starts if any(head.startswith(text[place:]) for head in heads)), len(text)), False
