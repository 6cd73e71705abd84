"""What a family of released models is, for the loader: how its ``config.json`` and its tensors' names become this package's.

A family adds no code to the model. It maps names, folds constant factors into weights and sets the fields of ``ModelConfig``;
what cannot be said that way is refused by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bilevel.config import ModelConfig
from bilevel.errors import ConfigError

Raw = Mapping[str, Any]

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")
QKV, EMBEDDING, HEAD = (Q, K, V), "model.embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a checkpoint stores the model's tensors. Names of what is in a layer go without their ``model.layers.{i}.``.

    names: this package's module (or tensor) -> the stored one, where they differ. fused: stored module -> the modules whose
    rows it holds one after another. factors: module -> what its weight and bias are multiplied with. interleaved: positions
    turn the channels (2i, 2i+1) instead of (i, i + r/2), so the rows of q and k are reordered. tied: the output head is the
    stored embedding, where the model has two tensors because their factors differ. unused: prefixes of full names whose
    tensors belong to parts that no token of the text passes through. one_row: vectors that are stored as [1, n].
    """

    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    interleaved: bool = False
    tied: bool = False
    unused: tuple[str, ...] = ()
    one_row: tuple[str, ...] = ()


def _no_values(raw: Raw) -> dict[str, Any]:
    return {}


def _plain_layout(raw: Raw, config: ModelConfig) -> Layout:
    return Layout()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One file of ``bilevel/families``.

    model_types: of the ``config.json`` that it reads. reads: keys that it takes beside the common ones.
    defaults: what transformers takes a missing key for, where that is not what ``ModelConfig`` says (a null stays null).
    values: fields of ModelConfig that follow from ``reads``. layout: how the weights are stored.
    windows: what makes a sliding window count: "switch" (only with use_sliding_window: true) or "always" (wherever
    sliding_window is a number). partial_rotary: whether partial_rotary_factor is part of the family.
    """

    model_types: tuple[str, ...]
    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    values: Callable[[Raw], dict[str, Any]] = _no_values
    layout: Callable[[Raw, ModelConfig], Layout] = _plain_layout
    windows: str = "always"
    partial_rotary: bool = False


def number(raw: Raw, key: str, default: float) -> float:
    """The finite number at ``key``; a missing or null one is the default. Raises ConfigError."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"config.json sets {key}={value!r}, which must be a finite number")
    return float(value)


def whole(raw: Raw, key: str, default: int) -> int:
    """The whole number of at least 0 at ``key``; a missing or null one is the default. Raises ConfigError."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config.json sets {key}={value!r}, which must be a whole number of at least 0")
    return value


def flag(raw: Raw, key: str, default: bool) -> bool:
    """The truth value at ``key``; a missing or null one is the default. Raises ConfigError."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, bool):
        raise ConfigError(f"config.json sets {key}={value!r}, which must be true or false")
    return value


def whole_list(raw: Raw, key: str) -> list[int] | None:
    """The list of whole numbers at ``key``, None where there is none. Raises ConfigError."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise ConfigError(f"config.json sets {key}={value!r}, which must be a list of whole numbers")
    return value


def positive_number(raw: Raw, key: str, default: float) -> float:
    """The number greater than 0 at ``key``. Raises ConfigError."""
    value = number(raw, key, default)
    if value <= 0:
        raise ConfigError(f"config.json sets {key}={raw[key]!r}, which must be greater than 0")
    return value


def scaled(factors: Mapping[str, float]) -> dict[str, float]:
    """The factors other than 1. Raises ConfigError for one that is no number any more."""
    for name, factor in factors.items():
        if not math.isfinite(factor) or factor == 0:
            raise ConfigError(f"config.json's factors make {factor} of {name}'s weights; they must be finite and not 0")
    return {name: factor for name, factor in factors.items() if factor != 1}
