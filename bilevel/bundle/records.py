"""Records as JSON: frozen dataclasses that are written, read back and described by a JSON Schema, all by their fields' types.

A field is annotated with a str, bool, int, float, ``Any``, ``Literal``, a tuple, another record or one of these ``| None``.
``Annotated`` adds what it means (a text) and what limits it (``limits``); a record's meaning is its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Schema = dict[str, Any]
R = TypeVar("R", bound="Record")
Keywords = tuple[tuple[str, Any], ...]
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def limits(**keywords: Any) -> Keywords:
    """Keywords of JSON Schema for ``Annotated``, which wants them hashable: lists are given as tuples."""
    return tuple(keywords.items())


Count = Annotated[int, limits(minimum=0)]
Positive = Annotated[int, limits(minimum=1)]
Rate = Annotated[float, limits(minimum=0, maximum=1)]


@dataclass(frozen=True)
class Record:
    """What becomes a JSON object, a field becoming a key.

    JSON has no infinity and no NaN: such a number is None in every field, from the start. A field whose default is None is left
    out of the JSON where it is None; every other field is always there.
    """

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, _finite(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """This record as what ``json`` writes."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: _plain(value) for name, (value, default) in values.items() if value is not None or default is not None}


def read_record(record: type[R], values: Mapping[str, Any]) -> R:
    """The record whose ``to_dict`` gave ``values``. Raises KeyError, TypeError or AttributeError for anything else."""
    hints: dict[str, Any] = _hints(cast(Hashable, record))
    return record(**{name: _read(hints[name], value) for name, value in values.items()})


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@cache
def _hints(record: Any) -> dict[str, Any]:
    """The fields' types without their meaning; of what may be None, the type of the rest."""
    return {name: _some(hint)[0] for name, hint in get_type_hints(record).items()}


def _some(hint: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    (some,) = (arg for arg in get_args(hint) if arg is not NoneType)
    return some, True


def _read(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if get_origin(hint) is tuple:
        return tuple(_read(get_args(hint)[0], item) for item in value)
    return read_record(hint, value) if isinstance(hint, type) and issubclass(hint, Record) else value


def json_schema(hint: Any) -> Schema:
    """The JSON Schema (draft 2020-12) of a record, or of what may stand in a field of one."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = json_schema(args[0])
        for note in args[1:]:
            keywords = (("description", note),) if isinstance(note, str) else note
            schema |= {key: list(value) if isinstance(value, tuple) else value for key, value in keywords}
        return schema
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        size = {} if args[-1] is Ellipsis else {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "items": json_schema(args[0]), **size}
    some, optional = _some(hint)
    if optional:
        schema = json_schema(some)
        return {**schema, "type": [schema["type"], "null"]}
    if isinstance(hint, type) and issubclass(hint, Record):
        return _object_schema(hint)
    return {} if hint is Any else {"type": _TYPES[hint]}


def _object_schema(record: type[Record]) -> Schema:
    hints = get_type_hints(record, include_extras=True)
    absent = {field.name for field in fields(record) if field.default is None}
    return {
        "type": "object",
        "description": " ".join((record.__doc__ or "").split()),
        "properties": {name: json_schema(_some(hint)[0] if name in absent else hint) for name, hint in hints.items()},
        "required": [name for name in hints if name not in absent],
        "additionalProperties": False,
    }
