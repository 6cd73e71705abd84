"""The texts of an answer that may hold tool calls, as a grammar: arguments follow their schemas by construction."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bilevel.runtime.grammar.sources import json_rule
from bilevel.runtime.serve.tools.layouts import Layout

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: a JSON schema. is_strict: no keyword of it is to be ignored."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NO_PARAMETERS)
    is_strict: bool = False


class Literals:
    """Texts in which special tokens stand by name, in Lark's syntax. special: {id: name}."""

    def __init__(self, special: Mapping[int, str]) -> None:
        self._ids = {name: token for token, name in special.items() if name}
        names = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(names)})") if names else None

    def lark(self, text: str) -> str:
        """An expression for ``text``; that for no text is empty."""
        parts = [text] if self._split is None else self._split.split(text)
        return " ".join(f"<[{self._ids[part]}]>" if part in self._ids else json.dumps(part) for part in parts if part)

    def is_special(self, text: str) -> bool:
        """Whether ``text`` is the name of a special token."""
        return text in self._ids


def calls_grammar(
    layout: Layout, tools: Sequence[Tool], literals: Literals, *, required: bool, parallel: bool, text: str | None = None
) -> str:
    """The answers that may call ``tools``, at least one.

    required: there is a call; else a text may stand before it, or instead of it. parallel: several may follow each other.
    text: a Lark expression for an answer without a call (None: anything); nothing stands before a call then.
    Raises RequestError for a schema that is too long or too deep.
    """
    heads = [literals.lark(layout.head_of(tool.name)) for tool in tools]
    rules = [
        f"call_{index}: {head} {_arguments(tool, required)}"
        for index, (tool, head) in enumerate(zip(tools, heads, strict=True))
    ]
    call = " | ".join(f"call_{index}" for index in range(len(tools)))
    more = f"({literals.lark(layout.separator)} call)*" if parallel and layout.separator is not None else ""
    is_free = not required and text is None
    opening = "opening" if layout.opener and is_free else literals.lark(layout.opener)
    calls = f"calls: {opening} {literals.lark(layout.lead)} call {more} {literals.lark(layout.last)}"
    answers = "calls" if required else f"calls | {text or 'text'}"
    lines = ["%llguidance {}", f"start: {answers}", calls, f"call: {call}", *rules]
    if is_free:
        lines += [*_beginning(layout, literals), "text: TEXT", f"TEXT: {_free(layout, tools)}"]
    return "\n".join(lines)


def _arguments(tool: Tool, required: bool) -> str:
    return json_rule(tool.parameters, f"the parameters of tool {tool.name}", is_lenient=not (tool.is_strict or required))


def _beginning(layout: Layout, literals: Literals) -> list[str]:
    """Any text up to the opener, where there is one."""
    if not layout.opener:
        return []
    # A lazy lexeme ends where it can, so no text goes on behind an opener that is text.
    is_lazy = "" if literals.is_special(layout.opener) else "[lazy]"
    return [f"opening{is_lazy}: BEFORE {literals.lark(layout.opener)}", r"BEFORE: /(.|\n)*/"]


def _free(layout: Layout, tools: Sequence[Tool]) -> str:
    """A regular expression for text without a call: where calls have no opener, text that does not begin like one."""
    if layout.opener:
        return r"/(.|\n)*/"
    heads = "|".join(re.escape(layout.head_of(tool.name)).replace("/", r"\/") for tool in tools)
    return rf"/(.|\n)*/ & ~/({heads})(.|\n)*/"
