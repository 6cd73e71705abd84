"""Positions as ``config.json`` has them: the older ``rope_theta`` and ``rope_scaling``, and the newer ``rope_parameters``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bilevel.errors import ConfigError
from bilevel.families.shared.family import number, positive_number, whole
from bilevel.rope_scaling import RopeScaling

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
_ALIASES = {"su": "longrope"}
_FIELDS = {spec.name for spec in dataclasses.fields(RopeScaling)}
# Sub-keys that nobody's frequencies depend on.
_INERT = ("finetuned", "rope_theta_scale_done")
# The kinds that count from the trained length; without one it is the declared length.
_FROM_TRAINED_LENGTH = ("llama3", "yarn", "longrope")


def read_rope(raw: dict[str, Any], partial_rotary: bool) -> tuple[dict[str, Any], float]:
    """Take the keys of positions out of ``raw``; returns (fields of ModelConfig, the share of a head that is turned)."""
    section = _section(raw)
    values: dict[str, Any] = {}
    theta, outer = section.pop("rope_theta", None), raw.pop("rope_theta", None)
    if theta is not None or outer is not None:
        values["rope_theta"] = theta if theta is not None else outer
    share = _share(section, raw, partial_rotary)
    trained = raw.pop("original_max_position_embeddings", None)
    kind = section.pop("rope_type", None) or section.pop("type", None) or "default"
    section.pop("type", None)
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    for key in [key for key in section if key in _INERT or section[key] is None]:
        section.pop(key)
    if kind not in ("default", "dynamic"):
        # The kind is judged before its sub-keys: a kind that is not known is what has to be named.
        _complete(section, kind, raw, trained)
    for key in section:
        if key not in _FIELDS:
            raise ConfigError(f"rope_scaling.{key} is not supported for rope_type {kind}; remove it if it does not matter")
    if kind not in ("default", "dynamic"):
        values["rope_scaling"] = RopeScaling(rope_type=kind, **section)
    # Dynamic NTK: plain frequencies up to max_position_embeddings, the length that it was trained for, which is the capacity
    # here. Behind it the frequencies change with the length of the text, and cached keys with them.
    return values, share


def _section(raw: dict[str, Any]) -> dict[str, Any]:
    """Both sections in one; one that is nested by the kind of layer is its full_attention."""
    section: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = raw.pop(key, None) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"config.json's {key} must be an object, not {given!r}")
        kinds = {name: inner for name, inner in given.items() if name.endswith("_attention")}
        if kinds:
            used = [inner for inner in kinds.values() if inner is not None]
            if (
                len(kinds) != len(given)
                or not used
                or any(inner != used[0] for inner in used)
                or not isinstance(used[0], Mapping)
            ):
                raise ConfigError(
                    f"config.json's {key} gives different positions for {', '.join(given)}, which bilevel does not implement; "
                    "give a checkpoint whose layers share them"
                )
            given = used[0]
        section.update(given)
    return section


def _share(section: dict[str, Any], raw: dict[str, Any], partial_rotary: bool) -> float:
    """partial_rotary_factor, from inside the section or beside it."""
    inner = {"partial_rotary_factor": section.pop("partial_rotary_factor", None)}
    outer = {"partial_rotary_factor": raw.pop("partial_rotary_factor", None)}
    given = inner if inner["partial_rotary_factor"] is not None else outer
    share = positive_number(given, "partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and not partial_rotary):
        raise ConfigError(
            f"config.json's partial_rotary_factor is not supported as {share!r}: this model_type turns whole heads; "
            "set the model_type that it belongs to"
        )
    return share


def _complete(section: dict[str, Any], kind: Any, raw: Mapping[str, Any], trained: Any) -> None:
    """Fill in what transformers derives: the trained length, and the factor as declared over trained length."""
    if kind in _FROM_TRAINED_LENGTH:
        declared = whole(raw, "max_position_embeddings", 2048)
        if trained is not None:
            section["original_max_position_embeddings"] = trained
        section.setdefault("original_max_position_embeddings", declared)
        if kind in ("yarn", "longrope") and "factor" not in section:
            length = number(section, "original_max_position_embeddings", 1)
            section["factor"] = declared / max(length, 1)
    elif kind != "linear":
        RopeScaling(rope_type=kind, factor=1.0)  # says which kinds there are
    if "factor" not in section:
        raise ConfigError("rope_scaling.factor is missing")
