"""What the fields of a configuration may hold, by their annotations, and the section "experts"."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel.contract import MOST_BLOCK, MOST_POSITIONS, SCORE_FUNCS
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


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Expert layers.

    num_experts: E. top_k: experts per word. n_group / topk_group: groups there are and groups kept.
    intermediate_size: f, an expert's width. layers: indices of the layers whose MLP is replaced by experts.
    shared_intermediate_size: width of the shared expert, which every word goes through beside its own (0 = none).
    score_func: sigmoid, softmax or sqrtsoftplus. group_score: external (level 1: similarity of the word embedding to a group's
    centroid), max or top2_sum (from the layer's own scores). normalize: the kept weights sum to 1. scale: factor on the
    weights. select_bias: a per-expert bias that moves the choice but not the weights. norm_floor: what their sum is at least
    taken for when they are normalised. zero_fill: experts of groups that are not kept compete with a score of 0.
    hash_layers: those of ``layers`` in which a table gives a word's experts, whatever the context (DeepSeek-V4's first layers);
    the context only weighs them. They have no groups and no bias.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    layers: tuple[int, ...]
    n_group: int = 1
    topk_group: int = 1
    score_func: str = "sigmoid"
    group_score: str = "external"
    normalize: bool = True
    scale: float = 1.0
    select_bias: bool = False
    shared_intermediate_size: int = 0
    norm_floor: float = 0.0
    zero_fill: bool = False
    hash_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "hash_layers"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types("experts", self)
        positive(
            "experts",
            num_experts=self.num_experts,
            top_k=self.top_k,
            intermediate_size=self.intermediate_size,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )
        if self.shared_intermediate_size < 0:
            raise ConfigError(f"experts.shared_intermediate_size={self.shared_intermediate_size} must be at least 0")
        at_most("experts", MOST_POSITIONS, shared_intermediate_size=self.shared_intermediate_size)
        if self.norm_floor < 0:
            raise ConfigError(f"experts.norm_floor={self.norm_floor} must be at least 0; 0 is no floor")
        if self.score_func not in SCORE_FUNCS:
            raise ConfigError(f"experts.score_func={self.score_func!r} must be one of {', '.join(SCORE_FUNCS)}")
        if self.group_score not in ("external", "max", "top2_sum"):
            raise ConfigError(f"experts.group_score={self.group_score!r} must be external, max or top2_sum")
        if self.num_experts % self.n_group:
            raise ConfigError(f"experts.num_experts={self.num_experts} is not divisible by n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ConfigError(f"experts.topk_group={self.topk_group} exceeds n_group={self.n_group}")
        room = self.topk_group * (self.num_experts // self.n_group)
        if self.top_k > room:
            raise ConfigError(f"experts.top_k={self.top_k} exceeds the {room} experts that the kept groups hold")
        self._check_hash_layers()

    def _check_hash_layers(self) -> None:
        for layer in self.hash_layers:
            if layer not in self.layers:
                raise ConfigError(f"experts.hash_layers holds {layer}, which is none of experts.layers={list(self.layers)}")
        if self.hash_layers and self.n_group > 1 and self.group_score != "external":
            raise ConfigError(
                f"experts.hash_layers beside n_group={self.n_group} and group_score={self.group_score!r} are two ways to score "
                "groups, which no graph here has; set group_score to external or n_group to 1"
            )

    @property
    def has_centroids(self) -> bool:
        """Whether some layer keeps groups by the word's similarity to their centroids."""
        return self.group_score == "external" and not set(self.layers) <= set(self.hash_layers)

    def num_groups(self, by_table: bool) -> int:
        """Gp of a layer's gate. by_table: it is one of hash_layers, whose table keeps experts as groups of one."""
        return self.num_experts if by_table else self.n_group

    def route_attributes(self, by_table: bool = False) -> dict[str, int | float | str]:
        """Attributes of the contract's ExpertRoute. by_table: of a layer of hash_layers.

        All gates of a graph score groups in one way: beside hash_layers a gate of one group is given that group's score, 0.
        """
        if by_table:
            kept = {"topk_group": self.top_k, "zero_fill": 0}
            return {**self.route_attributes(), **kept}
        return {
            "top_k": self.top_k,
            "topk_group": self.topk_group,
            "score_func": self.score_func,
            "group_score": "external" if self.hash_layers else self.group_score,
            "normalize": int(self.normalize),
            "scale": float(self.scale),
            "norm_floor": float(self.norm_floor),
            "zero_fill": int(self.zero_fill),
        }

    @classmethod
    def deepseek_v3(cls, *, layers: tuple[int, ...], **changes: Any) -> Experts:
        """DeepSeek-V3's gate: 256 experts in 8 groups, 4 kept by their two best biased scores, 8 experts, scale 2.5."""
        values: dict[str, Any] = {
            "num_experts": 256,
            "top_k": 8,
            "intermediate_size": 2048,
            "n_group": 8,
            "topk_group": 4,
            "score_func": "sigmoid",
            "group_score": "top2_sum",
            "normalize": True,
            "scale": 2.5,
            "select_bias": True,
        }
        return cls(layers=layers, **{**values, **changes})

    @classmethod
    def deepseek_v4(cls, *, layers: tuple[int, ...], **changes: Any) -> Experts:
        """DeepSeek-V4-Flash's gates: 256 experts without groups, 6 by sqrtsoftplus, the first three layers' by a table."""
        values: dict[str, Any] = {
            "num_experts": 256,
            "top_k": 6,
            "intermediate_size": 2048,
            "score_func": "sqrtsoftplus",
            "group_score": "max",  # one group: nothing to score
            "normalize": True,
            "scale": 1.5,
            "select_bias": True,
            "hash_layers": layers[:3],
        }
        return cls(layers=layers, **{**values, **changes})
