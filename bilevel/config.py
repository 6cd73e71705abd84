"""Model and routing configuration: frozen dataclasses that refuse unknown and contradictory values.

``bilevel/config_json.py`` reads and writes them as Hugging Face's ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bilevel.config_types import Experts, at_most, check_types, positive
from bilevel.contract import MAX_TOPK, MOST_BLOCK
from bilevel.errors import ConfigError
from bilevel.rope_scaling import RopeScaling

__all__ = ["BLOCK_KEYS", "PRESETS", "Experts", "ModelConfig", "Routing"]
PRESETS = ("two_level", "moba", "moba_gqa", "dense")
BLOCK_KEYS = ("mean", "bounds", "gate")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How attention is routed (design: level 1 by word embedding, level 2 by layer).

    preset: two_level, moba, moba_gqa or dense.
    block_size: R, tokens per block. coarse_topk: K1, level 1's candidates (two_level only). topk: K2, blocks a word reads.
    init_blocks / local_blocks: always kept, inside both budgets; local_blocks counts the own block.
    window: words averaged into level 1's query (1 = the word alone). route_dim: width of the learned projection in front of
    level 1 (0 = none: level 1 compares the word embeddings themselves). weighted_words: queries have a projection of their own,
    every vocabulary entry a weight, so that frequent words can be light, and every place of the window one.
    key: what level 2 compares a word's queries with (``bilevel/block_keys.py``). mean: the mean of a block's keys. bounds:
    their least and greatest value in each channel. gate: learned projections of both sides; gate_norm: which are normalised.
    dense_layers: layers that read everything. coarse_local_blocks: local blocks of level 1 (0 = as many as of level 2).
    """

    preset: str = "two_level"
    block_size: int = 64
    coarse_topk: int = 32
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 1
    window: int = 1
    route_dim: int = 0
    key: str = "mean"
    gate_norm: bool = True
    dense_layers: tuple[int, ...] = ()
    coarse_local_blocks: int = 0
    weighted_words: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, list):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        check_types("routing", self)
        if self.preset not in PRESETS:
            raise ConfigError(f"routing.preset={self.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        positive(
            "routing",
            block_size=self.block_size,
            coarse_topk=self.coarse_topk,
            topk=self.topk,
            local_blocks=self.local_blocks,
            window=self.window,
        )
        for name in ("init_blocks", "route_dim", "coarse_local_blocks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"routing.{name}={getattr(self, name)} must be a whole number of at least 0")
            at_most("routing", MOST_BLOCK, **{name: getattr(self, name)})
        if self.key not in BLOCK_KEYS:
            raise ConfigError(f"routing.key={self.key!r} is unknown; choose one of {', '.join(BLOCK_KEYS)}")
        if self.preset == "dense":
            return
        self._check_budgets()

    def _check_budgets(self) -> None:
        """What is kept must fit, and a gate must have a choice to make."""
        if self.preset == "moba" and self.key == "gate":
            raise ConfigError(
                "routing.key='gate' chooses once for each key/value head, but preset='moba' for each query head; "
                "set preset to moba_gqa or two_level"
            )
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
        if self.weighted_words and not (self.is_two_level and self.route_dim):
            raise ConfigError(
                f"routing.weighted_words needs a level 1 with a projection, but preset={self.preset!r} and "
                f"route_dim={self.route_dim}; set preset to two_level and route_dim to its width"
            )
        if self.init_blocks + self.local_blocks > self.topk:
            raise ConfigError(
                f"routing.init_blocks={self.init_blocks} and local_blocks={self.local_blocks} need more than "
                f"topk={self.topk} blocks; raise topk"
            )
        if self.is_two_level and self.init_blocks + self.coarse_local_blocks > self.coarse_topk:
            raise ConfigError(
                f"routing.init_blocks={self.init_blocks} and coarse_local_blocks={self.coarse_local_blocks} need more than "
                f"coarse_topk={self.coarse_topk} candidates; raise coarse_topk"
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
class ModelConfig:
    """A decoder in the Llama/Qwen3 shape. Field names are those of Hugging Face's ``config.json``, where it has them.

    model_type: what ``config.json`` is written as; ``bilevel/families`` says which types are read, and as what.
    attention_bias: of q, k, v and, unless attention_output_bias says otherwise, of the output projection.
    qk_norm: none, head (each head's q and k are normalised) or projection (all heads' together); None: head for qwen3, else
    none. rotary_dim: channels of a head that positions turn, from the first one; None: all. nope_layers: layers without
    positions.
    """

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
    attention_output_bias: bool | None = None
    qk_norm: str | None = None
    rotary_dim: int | None = None
    nope_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.nope_layers, list):
            object.__setattr__(self, "nope_layers", tuple(self.nope_layers))
        check_types("config", self)
        positive(
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
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise ConfigError(f"rms_norm_eps={self.rms_norm_eps} and rope_theta={self.rope_theta} must be greater than 0")
        if self.qk_norm not in (None, "none", "head", "projection"):
            raise ConfigError(f"qk_norm={self.qk_norm!r} must be none, head or projection")
        self._check_positions()
        self._check_layers()

    def _check_layers(self) -> None:
        """Layers that are named must exist, and a routed model has a layer that is routed."""
        for name, layers in (
            ("experts.layers", self.experts.layers if self.experts else ()),
            ("nope_layers", self.nope_layers),
            ("routing.dense_layers", self.routing.dense_layers),
        ):
            for layer in layers:
                if not 0 <= layer < self.num_hidden_layers:
                    raise ConfigError(f"{name} holds {layer}, but the layers are 0..{self.num_hidden_layers - 1}")
        if not self.routing.is_dense and not self.routed_layers:
            raise ConfigError(
                f"routing.dense_layers names all {self.num_hidden_layers} layers; leave one out, or set preset to dense"
            )

    def _check_positions(self) -> None:
        """The rotary channels, and what the scaling says of them."""
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs of channels")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim):
            raise ConfigError(f"rotary_dim={self.rotary_dim} must be an even number from 2 to head_dim={self.head_dim}")
        scaling = self.rope_scaling
        if scaling is None:
            return
        if scaling.rope_type == "yarn" and not self.rope_theta > 1:
            raise ConfigError(f"rope_theta={self.rope_theta} must be greater than 1 for rope_type yarn")
        for name in ("short_factor", "long_factor"):
            factors = getattr(scaling, name)
            if scaling.rope_type == "longrope" and len(factors) != self.rotated_channels // 2:
                raise ConfigError(
                    f"rope_scaling.{name} holds {len(factors)} factors, but the {self.rotated_channels} rotary channels of a "
                    f"head need {self.rotated_channels // 2}"
                )

    @property
    def qk_norm_kind(self) -> str:
        """none, head or projection."""
        return self.qk_norm or ("head" if self.model_type == "qwen3" else "none")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised before they are turned."""
        return self.qk_norm_kind != "none"

    @property
    def has_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that positions turn."""
        return self.rotary_dim or self.head_dim

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose words choose what they read."""
        if self.routing.is_dense:
            return ()
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in self.routing.dense_layers)

    @property
    def block_key_width(self) -> int:
        """Dr of level 2: channels of a block's key."""
        return 2 * self.head_dim if self.routing.key == "bounds" else self.head_dim

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
            "local_blocks": routing.coarse_local_blocks or routing.local_blocks if level == 1 else routing.local_blocks,
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
