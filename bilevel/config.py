"""Model and routing configuration: frozen dataclasses that refuse unknown and contradictory values.

``bilevel/config_json.py`` reads and writes them as Hugging Face's ``config.json``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bilevel.contract import MAX_TOPK
from bilevel.errors import ConfigError

PRESETS = ("two_level", "moba", "moba_gqa", "dense")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# A field's annotation -> what its value must be, and the test for it. JSON may hold anything.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_whole),
    "int | None": ("a whole number or null", lambda value: value is None or _is_whole(value)),
    "float": (
        "a finite number",
        lambda value: (_is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max,
    ),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "tuple[int, ...]": ("a list of whole numbers", lambda value: isinstance(value, tuple) and all(map(_is_whole, value))),
}


def _check_types(owner: str, section: Any) -> None:
    """Raise ConfigError for the first field of a dataclass that does not hold what its annotation says."""
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        expected, holds = _KINDS.get(str(spec.type), ("", lambda value: True))
        if not holds(value):
            raise ConfigError(f"{owner}.{spec.name}={value!r} must be {expected}")


def _positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{owner}.{name}={value!r} must be a positive whole number")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How attention is routed (design: level 1 by word embedding, level 2 by layer).

    preset: two_level, moba, moba_gqa or dense.
    block_size: R, tokens per block. coarse_topk: K1, level 1's candidates (two_level only). topk: K2, blocks a word reads.
    init_blocks / local_blocks: always kept, inside both budgets; local_blocks counts the own block.
    window: words averaged into level 1's query (1 = the word alone). route_dim: width of the learned projection in front of
    level 1 (0 = none: level 1 compares the word embeddings themselves).
    """

    preset: str = "two_level"
    block_size: int = 64
    coarse_topk: int = 32
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 1
    window: int = 1
    route_dim: int = 0

    def __post_init__(self) -> None:
        _check_types("routing", self)
        if self.preset not in PRESETS:
            raise ConfigError(f"routing.preset={self.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        _positive(
            "routing",
            block_size=self.block_size,
            coarse_topk=self.coarse_topk,
            topk=self.topk,
            local_blocks=self.local_blocks,
            window=self.window,
        )
        for name in ("init_blocks", "route_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"routing.{name}={getattr(self, name)} must be a whole number of at least 0")
        if self.preset == "dense":
            return
        for name in ("coarse_topk", "topk"):
            if getattr(self, name) > MAX_TOPK:
                raise ConfigError(
                    f"routing.{name}={getattr(self, name)} exceeds {MAX_TOPK}, the most that TensorRT's TopK can keep; "
                    "use larger blocks or keep fewer"
                )
        if self.is_two_level and self.topk > self.coarse_topk:
            raise ConfigError(
                f"routing.topk={self.topk} (level 2) exceeds coarse_topk={self.coarse_topk} (level 1's candidates); "
                "raise coarse_topk or lower topk"
            )
        if self.init_blocks + self.local_blocks > self.topk:
            raise ConfigError(
                f"routing.init_blocks={self.init_blocks} and local_blocks={self.local_blocks} need more than "
                f"topk={self.topk} blocks; raise topk"
            )

    @property
    def is_two_level(self) -> bool:
        """Whether the word-embedding layer proposes candidates."""
        return self.preset == "two_level"

    @property
    def is_dense(self) -> bool:
        """Whether attention is ordinary attention over every earlier token."""
        return self.preset == "dense"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Expert layers.

    num_experts: E. top_k: experts per word. n_group / topk_group: groups there are and groups kept.
    intermediate_size: f, an expert's width. layers: indices of the layers whose MLP is replaced by experts.
    score_func: sigmoid or softmax. group_score: external (level 1: similarity of the word embedding to a group's centroid),
    max or top2_sum (from the layer's own scores). normalize: the kept weights sum to 1. scale: factor on the weights.
    select_bias: a per-expert bias that moves the choice but not the weights.
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

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        _check_types("experts", self)
        _positive(
            "experts",
            num_experts=self.num_experts,
            top_k=self.top_k,
            intermediate_size=self.intermediate_size,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )
        if self.score_func not in ("sigmoid", "softmax"):
            raise ConfigError(f"experts.score_func={self.score_func!r} must be sigmoid or softmax")
        if self.group_score not in ("external", "max", "top2_sum"):
            raise ConfigError(f"experts.group_score={self.group_score!r} must be external, max or top2_sum")
        if self.num_experts % self.n_group:
            raise ConfigError(f"experts.num_experts={self.num_experts} is not divisible by n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ConfigError(f"experts.topk_group={self.topk_group} exceeds n_group={self.n_group}")
        room = self.topk_group * (self.num_experts // self.n_group)
        if self.top_k > room:
            raise ConfigError(f"experts.top_k={self.top_k} exceeds the {room} experts that the kept groups hold")

    def route_attributes(self) -> dict[str, int | float | str]:
        """Attributes of the contract's ExpertRoute."""
        return {
            "top_k": self.top_k,
            "topk_group": self.topk_group,
            "score_func": self.score_func,
            "group_score": self.group_score,
            "normalize": int(self.normalize),
            "scale": float(self.scale),
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


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies other than the plain ones: ``linear`` or ``llama3`` (Llama 3.1 and later)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ConfigError(
                f"rope_type={self.rope_type!r} is not supported; only default, linear and llama3 positions are implemented"
            )
        _check_types("rope_scaling", self)
        if not self.factor > 0:
            raise ConfigError(f"rope_scaling.factor={self.factor!r} must be greater than 0")
        _positive("rope_scaling", original_max_position_embeddings=self.original_max_position_embeddings)
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor!r} must exceed low_freq_factor={self.low_freq_factor!r}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder in the Llama/Qwen3 shape. Field names are those of Hugging Face's ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    routing: Routing = field(default_factory=lambda: Routing(preset="dense"))
    experts: Experts | None = None

    def __post_init__(self) -> None:
        _check_types("config", self)
        _positive(
            "config",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}; every key/value head must serve the same number of heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs of channels")
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise ConfigError(f"rms_norm_eps={self.rms_norm_eps} and rope_theta={self.rope_theta} must be greater than 0")
        if self.experts is not None:
            for layer in self.experts.layers:
                if not 0 <= layer < self.num_hidden_layers:
                    raise ConfigError(f"experts.layers holds {layer}, but the layers are 0..{self.num_hidden_layers - 1}")

    @property
    def has_qk_norm(self) -> bool:
        """Qwen3 normalises each head's query and key."""
        return self.model_type == "qwen3"

    @property
    def num_selection_heads(self) -> int:
        """Hs of level 2: one route per query head in MoBA, else one per key/value head."""
        return self.num_attention_heads if self.routing.preset == "moba" else self.num_key_value_heads

    def route_attributes(self, level: int) -> dict[str, int]:
        """Attributes of the contract's CoarseRoute (level 1, or level 2 without one) or FineRoute (level 2)."""
        routing = self.routing
        return {
            "block_size": routing.block_size,
            "topk": routing.coarse_topk if level == 1 else routing.topk,
            "num_selection_heads": 1 if level == 1 else self.num_selection_heads,
            "init_blocks": routing.init_blocks,
            "local_blocks": routing.local_blocks,
            "causal": 1,
        }

    @property
    def attention_scale(self) -> float:
        """Factor on q.k before the softmax."""
        return float(self.head_dim**-0.5)

    @property
    def route_dim(self) -> int:
        """Dr of level 1: width of the vectors that are compared."""
        return self.routing.route_dim or self.hidden_size
