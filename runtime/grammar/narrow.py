"""Schemas made narrower where they leave open whether an object may hold more than they name.

JSON Schema lets an object hold anything that it does not forbid, and a small model fills it with that until its tokens run out.
What is written by the narrower schema fits the wider one. (xgrammar, with which vLLM compiles schemas, does the same.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # of schemas, by name
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "contains")
_TOLD = ("additionalProperties", "unevaluatedProperties", "patternProperties")
_JOINED = ("allOf", "anyOf", "oneOf", "$ref")  # beside them, properties are only part of the object's


def narrowed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with ``additionalProperties: false`` in every object that names its properties, all those required
    among them, and says nothing of others.

    Unchanged where parts of a schema are joined, each of which names only some of the properties.
    """
    if any(_is_joined(each) for each in _parts(schema)):
        return schema
    return _narrowed(schema)


def _is_joined(schema: Mapping[str, Any]) -> bool:
    parts = schema.get("allOf")
    return (isinstance(parts, list) and len(parts) > 1) or ("properties" in schema and any(name in schema for name in _JOINED))


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema and all schemas in it."""
    yield schema
    for name, value in schema.items():
        for inner in _inner(name, value):
            yield from _parts(inner)


def _inner(name: str, value: Any) -> list[Mapping[str, Any]]:
    listed = list(value.values()) if name in _MAPS and isinstance(value, Mapping) else []
    listed += value if name in _LISTS and isinstance(value, list) else []
    listed += [value] if name in _SINGLE else []
    return [each for each in listed if isinstance(each, Mapping)]


def _narrowed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, Mapping):
            value = {key: _narrowed(each) for key, each in value.items()}
        elif name in _LISTS and isinstance(value, list):
            value = [_narrowed(each) for each in value]
        elif name in _SINGLE:
            value = _narrowed(value)
        made[name] = value
    if isinstance(made.get("properties"), Mapping) and not any(name in made for name in _TOLD) and _names_required(made):
        made["additionalProperties"] = False
    return made


def _names_required(schema: Mapping[str, Any]) -> bool:
    """Whether an object may hold nothing but its ``properties``."""
    required = schema.get("required", [])
    return isinstance(required, list) and all(isinstance(name, str) and name in schema["properties"] for name in required)
