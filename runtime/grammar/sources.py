"""What clients ask for, as grammars of llguidance (Lark's syntax with ``%json``). Nothing is compiled here.

Schemas and grammars are strangers' input: their bytes and nesting are limited here, their compilation in ``worker``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.errors import RequestError, require
from bilevel.runtime.grammar.narrow import narrowed

MOST_BYTES, MOST_DEPTH = 64 << 10, 64
# Between the parts of a JSON text: bounded, because small models that may write spaces for ever do.
_WHITESPACE = r"[ \t\r\n]{0,32}"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def json_rule(schema: Mapping[str, Any], name: str, *, is_lenient: bool = False) -> str:
    """A Lark expression for JSON texts that fit ``schema``; objects hold what it names, unless it speaks of other properties.

    name: of the schema, for errors. is_lenient: keywords that cannot be enforced are ignored, not refused.
    Raises RequestError for a schema that is too long or too deep.
    """
    _check_depth(schema, name)
    options = {"whitespace_pattern": _WHITESPACE, "lenient": is_lenient, "coerce_one_of": True}
    text = json.dumps({**narrowed(schema), "x-guidance": options})
    _check_length(text, name)
    return f"%json {text}"


def json_grammar(schema: Mapping[str, Any], name: str) -> str:
    """The texts that ``json_rule`` describes."""
    return f"start: {json_rule(schema, name)}"


def regex_grammar(pattern: str, name: str) -> str:
    """The texts that ``pattern`` matches as a whole: the syntax of Rust's crate regex, which knows no look-around."""
    _check_length(pattern, name)
    return str(require("llguidance").LLMatcher.grammar_from_regex(pattern))


def choice_grammar(texts: Sequence[str], name: str) -> str:
    """One of ``texts``."""
    grammar = "start: " + " | ".join(map(json.dumps, texts))
    _check_length(grammar, name)
    return grammar


def free_grammar(grammar: str, name: str) -> str:
    """A grammar as it was written: Lark, or GBNF (``root ::= ...``). Raises RequestError where it is neither."""
    _check_length(grammar, name)
    library = require("llguidance")
    try:
        return str(library.grammar_from("grammar", grammar))
    except Exception as error:  # noqa: BLE001 - whatever the converter stumbles over
        raise RequestError(f"{name} is no grammar in Lark's syntax or GBNF: {one_line(error)}") from None


def one_line(message: object) -> str:
    """What a library's message says, without the place in a text that only this package has seen, and not more than a line."""
    text = re.sub(r"^(at )?\d+\(\d+\): ", "", str(message).strip().partition("\n")[0])
    return text if len(text) <= 200 else f"{text[:197]}..."


def _check_length(text: str, name: str) -> None:
    if len(text) > MOST_BYTES:
        raise RequestError(f"{name} is {len(text)} characters long, this server takes {MOST_BYTES}; shorten it")


def _check_depth(value: Any, name: str) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level for inner in _inner(each)]
        if not level:
            return
    raise RequestError(f"{name} is nested more than {MOST_DEPTH} deep; flatten it, or name its parts in $defs")


def _inner(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else ()
