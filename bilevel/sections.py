"""JSON objects while they are being read: values of the right type, or one sentence that says what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from bilevel.errors import BilevelError, short
from bilevel.folders import read_json

_KINDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}
_REQUIRED = object()


def _is(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of a kind: true and false are no numbers, whole numbers are numbers, infinity is none."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _named(key: str) -> str:
    """A key from a file, in a sentence."""
    return key if len(key) <= 80 and key.isprintable() else short(key)


class Section:
    """One object of a JSON file.

    file: what errors call the file. fail: makes the error of a problem, and adds the remedy to it. prefix: where in the file
    the object stands, as in "graph.inputs[0]." Every key that is asked for may be a dotted one, as in "limits.max_positions".
    """

    def __init__(self, values: Any, file: str, fail: Callable[[str], BilevelError], prefix: str = "") -> None:
        self.file, self.fail, self.prefix = file, fail, prefix
        if not isinstance(values, Mapping):
            where = f"{prefix.removesuffix('.')}=" if prefix else ""
            raise fail(f"{file} holds {where}{short(values)}, which must be an object")
        self.values: Mapping[str, Any] = values

    @classmethod
    def read(cls, path: Path, fail: Callable[[str], BilevelError]) -> Section:
        """The object that a file holds. Raises OSError where it cannot be read."""
        try:
            values = read_json(path)
        except ValueError as error:
            raise fail(f"{path.name} {error}") from None
        return cls(values, path.name, fail)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def wrong(self, key: str, value: Any, expected: str) -> BilevelError:
        """The error of a value that is none of what is expected, as in "a whole number"."""
        return self.fail(f"{self.file} gives {self.prefix}{key}={short(value)}, which must be {expected}")

    def get(self, key: str, *kinds: type, default: Any = _REQUIRED) -> Any:
        """The value at a key, of one of the kinds: int, float (whole ones too), str, bool, list, dict, NoneType."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                if default is not _REQUIRED:
                    return default
                raise self.fail(f"{self.file} does not give {self.prefix}{key}")
            value = value[part]
        if not any(_is(value, kind) for kind in kinds):
            raise self.wrong(key, value, " or ".join(_KINDS[kind] for kind in kinds))
        return value

    def number(self, key: str, least: int = 1, most: int = 2**63 - 1) -> int:
        """The whole number at a key, from ``least`` to ``most``."""
        value = self.get(key, int)
        if value < least:
            raise self.wrong(key, value, f"at least {least}")
        if value > most:
            raise self.wrong(key, value, f"at most {most}")
        return int(value)

    def numbers(self, key: str) -> tuple[int, ...]:
        """The list of whole numbers at a key."""
        values = self.get(key, list)
        if not all(_is(value, int) for value in values):
            raise self.wrong(key, values, "a list of whole numbers")
        return tuple(values)

    def choice(self, key: str, choices: Collection[str]) -> str:
        """The text at a key, which is one of ``choices``."""
        value = self.get(key, str)
        if value not in choices:
            raise self.wrong(key, value, f"one of {', '.join(choices)}")
        return str(value)

    def section(self, key: str) -> Section:
        """The object at a key."""
        return Section(self.get(key, dict), self.file, self.fail, f"{self.prefix}{key}.")

    def named(self, key: str) -> dict[str, Section]:
        """The objects in the object at a key, by their names, in which a dot is a dot."""
        prefix = f"{self.prefix}{key}"
        return {name: Section(each, self.file, self.fail, f"{prefix}.{name}.") for name, each in self.get(key, dict).items()}

    def listed(self, key: str) -> list[Section]:
        """The objects in the list at a key."""
        prefix = f"{self.prefix}{key}"
        return [Section(each, self.file, self.fail, f"{prefix}[{i}].") for i, each in enumerate(self.get(key, list))]

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Refuse the first key that is none of ``known``, with the one that was probably meant."""
        for key in self.values:
            if key not in known:
                from difflib import get_close_matches

                close = get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
                raise self.fail(f"{self.file} gives the unknown key {self.prefix}{_named(key)} ({hint})")
