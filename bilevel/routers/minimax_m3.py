"""MiniMax-M3's text model as one module: ``msa`` in its sparse layers, clamped expert layers, a cache in and out.

Source: ``MiniMaxM3VLForCausalLM`` in transformers 5.23, whose parameters' names are kept, so that its state dict loads as it
is. A layer is dense or sparse in attention, and dense or of experts behind it. Norms have weights that are offsets from 1; the
first ``rotary_dim`` channels of a head are turned. Both kinds of MLP compute, from g = gate(x) and u = up(x),

    down(g' sigmoid(alpha g') (u' + 1))      g' = min(g, limit)      u' = u between -limit and limit
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.config import Experts
from bilevel.config_types import check_types
from bilevel.errors import ConfigError
from bilevel.expert_layers import ExpertGate, ExpertWeights
from bilevel.operators.attention import every_block
from bilevel.operators.reference import gated
from bilevel.routers.msa import MsaAttention, MsaRouter
from bilevel.routers.parts import CachedAttention, OffsetNorm

_LAYERS = {
    "layer_types": ("full_attention", "minimax_m3_sparse"),
    "mlp_layer_types": ("dense", "sparse"),
}


@dataclass(frozen=True, kw_only=True)
class MiniMaxM3Config:
    """Field names are those of the released ``text_config``. layer_types, mlp_layer_types: one for each layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    dense_intermediate_size: int
    shared_intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    index_n_heads: int
    index_head_dim: int
    index_block_size: int
    index_topk_blocks: int
    layer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    index_local_blocks: int = 1
    routed_scaling_factor: float = 2.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6

    def __post_init__(self) -> None:
        check_types("text_config", self)
        for name, known in _LAYERS.items():
            kinds = getattr(self, name)
            if not kinds or len(kinds) != len(self.layer_types) or not set(kinds) <= set(known):
                raise ConfigError(f"text_config.{name}={list(kinds)} must hold one of {', '.join(known)} for each layer")
        if not 2 <= self.rotary_dim <= min(self.head_dim, self.index_head_dim) or self.rotary_dim % 2:
            raise ConfigError(f"text_config.rotary_dim={self.rotary_dim} must be even, from 2 to head_dim and index_head_dim")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MiniMaxM3Config:
        """From a ``text_config`` as transformers writes it. Raises ConfigError for what is not computed here.

        transformers turns ``partial_rotary_factor`` of a head where rope_parameters give it; ``rotary_dim`` then says the same.
        """
        rope = raw.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(
                f"text_config.rope_parameters have rope_type {rope['rope_type']!r}; only 'default' is implemented"
            )
        if raw.get("tie_word_embeddings"):
            raise ConfigError("text_config.tie_word_embeddings is true; MiniMax-M3's head is its own: set it to false")
        values = {spec.name: raw[spec.name] for spec in fields(cls) if raw.get(spec.name) is not None}
        values |= {name: tuple(values.get(name, ())) for name in _LAYERS}
        values["rope_theta"] = float(rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta)))
        for name in (spec.name for spec in fields(cls) if spec.default is MISSING and spec.name not in values):
            raise ConfigError(f"text_config does not give {name}")
        share = rope.get("partial_rotary_factor")
        if share is not None and int(values["head_dim"] * share) != values["rotary_dim"]:
            raise ConfigError(
                f"text_config turns {share} of head_dim={values['head_dim']}, but rotary_dim={values['rotary_dim']}; give them "
                "one meaning"
            )
        return cls(**values)

    @property
    def activation(self) -> dict[str, float]:
        """RoutedExperts' attributes."""
        return {"gate_scale": self.swiglu_alpha, "limit": self.swiglu_limit, "up_shift": 1.0}

    @property
    def experts(self) -> Experts:
        """The gate of the expert layers."""
        return Experts(
            num_experts=self.num_local_experts,
            top_k=self.num_experts_per_tok,
            intermediate_size=self.intermediate_size,
            layers=tuple(n for n, kind in enumerate(self.mlp_layer_types) if kind == "sparse"),
            score_func="sigmoid",
            group_score="max",  # one group: nothing to score
            scale=self.routed_scaling_factor,
            select_bias=True,
        )


class BoundedMlp(nn.Module):
    """The MLP of a dense layer, and the shared expert."""

    def __init__(self, config: MiniMaxM3Config, hidden: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(gated(gate, up, **self.activation))


class BoundedExperts(nn.Module):
    """The expert layer: experts by context beside the shared one."""

    def __init__(self, config: MiniMaxM3Config) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = ExpertGate(config.experts, config.hidden_size)
        self.experts = ExpertWeights(config.experts, config.hidden_size)
        self.shared_experts = BoundedMlp(config, config.shared_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, hidden_size]."""
        flat = x.flatten(0, 1)
        ids, weights = self.gate(flat, None, None, None)
        out = ops.routed_experts(flat, ids, weights, self.experts.gate_up_proj, self.experts.down_proj, **self.activation)
        return (out + self.shared_experts(flat)).reshape(x.shape)


class DenseAttention(CachedAttention):
    """A layer that reads everything: routed attention to every block; two caches."""

    def __init__(self, config: MiniMaxM3Config, **sizes: Any) -> None:
        super().__init__(config.hidden_size, rotary_channels=config.rotary_dim, theta=config.rope_theta, **sizes)
        self.block_size = config.index_block_size

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, past_len: Tensor, new_len: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, L, hidden_size]. Returns (out, keys, values)."""
        routes = every_block(keys.shape[2] // self.block_size, x.shape[1], past_len, new_len, self.block_size)
        return self.attend(x, routes, self.block_size, keys, values, past_len, new_len)


def _attention(config: MiniMaxM3Config, is_sparse: bool) -> MsaAttention | DenseAttention:
    sizes = {"query_heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    if not is_sparse:
        return DenseAttention(config, **sizes, eps=config.rms_norm_eps)
    router = MsaRouter(
        config.hidden_size,
        heads=config.index_n_heads,
        head_dim=config.index_head_dim,
        block_size=config.index_block_size,
        topk=config.index_topk_blocks,
        local_blocks=config.index_local_blocks,
        rotary_channels=config.rotary_dim,
        theta=config.rope_theta,
        eps=config.rms_norm_eps,
    )
    return MsaAttention(config.hidden_size, router, **sizes, eps=config.rms_norm_eps)


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: MiniMaxM3Config, index: int) -> None:
        super().__init__()
        self.self_attn = _attention(config, config.layer_types[index] != "full_attention")
        is_dense = config.mlp_layer_types[index] == "dense"
        self.mlp = BoundedMlp(config, config.dense_intermediate_size) if is_dense else BoundedExperts(config)
        self.input_layernorm = OffsetNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OffsetNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, caches: list[Tensor], past_len: Tensor, new_len: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x: [B, L, hidden_size]; caches: the layer's two or three. Returns (x, the caches)."""
        attended, *caches = self.self_attn(self.input_layernorm(x), *caches, past_len, new_len)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), tuple(caches)


class _Stack(nn.Module):
    """What the released names call ``model``."""

    def __init__(self, config: MiniMaxM3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(len(config.layer_types)))
        self.norm = OffsetNorm(config.hidden_size, config.rms_norm_eps)


class MiniMaxM3(nn.Module):
    """The whole text model; ``empty_caches`` makes what the first call takes."""

    def __init__(self, config: MiniMaxM3Config) -> None:
        super().__init__()
        self.config, self.model = config, _Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def empty_caches(self, batch: int, capacity: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Per layer keys and values [batch, Hkv, capacity, head_dim], and of a sparse layer the indexer's keys [batch, 1, ...].
        capacity: a multiple of index_block_size."""
        config, caches = self.config, []
        for kind in config.layer_types:
            shapes = [(config.num_key_value_heads, config.head_dim)] * 2
            shapes += [] if kind == "full_attention" else [(1, config.index_head_dim)]
            caches += [torch.zeros(batch, heads, capacity, width, dtype=dtype) for heads, width in shapes]
        return caches

    def forward(self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """input_ids: int64 [B, L], right-padded. Returns (logits [B, L, vocab], *caches in the order of ``past``)."""
        x, left, present = self.model.embed_tokens(input_ids), list(past), []
        for layer, kind in zip(self.model.layers, self.config.layer_types, strict=True):
            count = 2 if kind == "full_attention" else 3
            own, left = left[:count], left[count:]
            x, own = layer(x, own, past_len, new_len)
            present += own
        return self.lm_head(self.model.norm(x)), *present
