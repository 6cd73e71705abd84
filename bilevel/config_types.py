"""What the fields of a configuration may hold, by their annotations."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from bilevel.contract import MOST_BLOCK, MOST_POSITIONS
from bilevel.errors import ConfigError, short

_MOST = {
    "block_size": MOST_BLOCK,
    "window": MOST_BLOCK,
    "num_hidden_layers": 4096,
    "num_attention_heads": 65_536,
    "num_key_value_heads": 65_536,
    "head_dim": 65_536,
    "num_experts": 65_536,
}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


# A field's annotation -> what its value must be, and the test for it. JSON may hold anything.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_whole),
    "int | None": ("a whole number or null", lambda value: value is None or _is_whole(value)),
    "float": ("a finite number", _is_number),
    "float | None": ("a finite number or null", lambda value: value is None or _is_number(value)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "bool | None": ("true, false or null", lambda value: value is None or isinstance(value, bool)),
    "tuple[float, ...] | None": (
        "a list of finite numbers or null",
        lambda value: value is None or (isinstance(value, tuple) and len(value) > 0 and all(map(_is_number, value))),
    ),
    "tuple[int, ...]": ("a list of whole numbers", lambda value: isinstance(value, tuple) and all(map(_is_whole, value))),
}


def check_types(owner: str, section: Any) -> None:
    """Raise ConfigError for the first field of a dataclass that does not hold what its annotation says."""
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        expected, holds = _KINDS.get(str(spec.type), ("", lambda value: True))
        if not holds(value):
            raise ConfigError(f"{owner}.{spec.name}={short(value)} must be {expected}")


def positive(owner: str, **values: int) -> None:
    """Raise ConfigError for the first value below 1, or above what a file may ask for."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{owner}.{name}={value!r} must be a positive whole number")
        at_most(owner, _MOST.get(name, MOST_POSITIONS), **{name: value})


def at_most(owner: str, most: int, **values: int) -> None:
    """Raise ConfigError for the first value above ``most``."""
    for name, value in values.items():
        if value > most:
            raise ConfigError(f"{owner}.{name}={value!r} must be at most {most}")
