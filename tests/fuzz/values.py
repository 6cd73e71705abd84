"""JSON that is almost right, and text files that are not JSON at all."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

DEEP, _NESTED = "deep", b"[" * 5_000 + b"]" * 5_000  # a text that is written as lists in lists

odd_numbers = st.sampled_from(
    [
        0,
        -1,
        1,
        2**31 - 1,
        2**31,
        2**63,
        10**9,
        10**30,
        10**400,
        -(10**30),
        0.5,
        1e308,
        float("inf"),
        float("nan"),
        -0.0,
        True,
        False,
    ]
)
odd_texts = st.sampled_from(
    [
        "",
        " ",
        "\x1b[2J",
        "\u202e",
        "../../etc/passwd",
        "/etc/passwd",
        "a" * 5000,
        "\0",
        "%s%n",
        "{{ 7 * 7 }}",
        "batch",
        "float32",
        "é",
    ]
) | st.text(max_size=8)
leaves: SearchStrategy[Any] = st.none() | odd_numbers | odd_texts | st.just(DEEP)
json_values: SearchStrategy[Any] = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value in a JSON value."""
    found = [place]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*place, key))
    return found


@st.composite
def altered(draw: DrawFn, value: Any, most: int = 2) -> Any:
    """``value`` with one or more of its parts replaced, doubled or left out, or with a part that nobody expects."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = [place for place in _places(value) if place]
        if not places:
            return value
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"]))
        if action == "replace":
            holder[last] = draw(json_values)
        elif action == "remove":
            del holder[last]
        elif action == "swap":
            other = draw(st.sampled_from(places))
            source = value
            for key in other:
                source = source[key] if isinstance(source, (dict, list)) and _has(source, key) else None
            holder[last] = copy.deepcopy(source)
        elif isinstance(holder, dict):
            holder[draw(odd_texts)] = draw(json_values)
        else:
            holder.insert(draw(st.integers(0, len(holder))), draw(json_values))
    return value


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and key < len(holder)


def written(value: Any) -> bytes:
    """As a file: infinity and NaN as Python writes them, halves of pairs too; whole numbers of any length."""
    return json.dumps(value).encode().replace(b'"deep"', _NESTED)


no_json: SearchStrategy[bytes] = st.binary(max_size=40) | st.sampled_from(
    [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"-" * 10, b'{"a": 1e99999}', b"\xef\xbb\xbf{}"]
)
