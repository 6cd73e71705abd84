"""What travels through one call of the decoder: the caches, what all layers share, and what the routers did."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.bundle.cache_rows import CacheRows
from bilevel.config import ModelConfig
from bilevel.errors import ContractError
from bilevel.operators.attention import AttentionMask, causal_mask, every_block
from bilevel.rotary import rotary_angles


@dataclass
class LayerState:
    """One layer's cache: key, value [B, Hkv, M, D]; block_key [B, Hkv, N, Dr] (None where attention is dense).

    Packed keys and values are uint8 [B, Hkv, M, C] (``bilevel/bundle/cache_rows.py``); the type alone says that they are.
    """

    key: Tensor
    value: Tensor
    block_key: Tensor | None


@dataclass
class DecoderState:
    """What one call leaves for the next. token_ids int64 [B, M] and word_block_key [B, 1, N, Dr] belong to level 1."""

    layers: list[LayerState]
    token_ids: Tensor | None = None
    word_block_key: Tensor | None = None

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32, caches: str = "fp32"
    ) -> DecoderState:
        """Zeroed caches for ``capacity`` tokens; the capacity must be a multiple of the block size.

        caches: "fp32" (of ``dtype``), or the format "int8" or "int4" of packed keys and values.
        """
        routing = config.routing
        if capacity % routing.block_size:
            raise ContractError(f"capacity={capacity} must be a multiple of routing.block_size={routing.block_size}")
        num_blocks = capacity // routing.block_size

        def zeros(tokens: int, width: int) -> Tensor:
            return torch.zeros(batch, config.num_key_value_heads, tokens, width, dtype=dtype)

        def cache() -> Tensor:
            return empty_cache(config, batch, capacity, dtype, caches)

        routed = config.routed_layers
        layers = [
            LayerState(cache(), cache(), zeros(num_blocks, config.block_key_width) if i in routed else None)
            for i in range(config.num_hidden_layers)
        ]
        if not routing.is_two_level:
            return cls(layers)
        word_block_key = torch.zeros(batch, 1, num_blocks, config.route_dim, dtype=dtype)
        return cls(layers, torch.zeros(batch, capacity, dtype=torch.int64), word_block_key)


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, caches: str = "fp32") -> Tensor:
    """One layer's keys or values, zeroed: [B, Hkv, M, D] of ``dtype``, or uint8 [B, Hkv, M, C] in a format of packed caches."""
    if caches == "fp32":
        return torch.zeros(batch, config.num_key_value_heads, capacity, config.head_dim, dtype=dtype)
    width = CacheRows.of(caches, config.head_dim).num_bytes
    return torch.zeros(batch, config.num_key_value_heads, capacity, width, dtype=torch.uint8)


@dataclass
class Trace:
    """What the routers saw and chose, for training losses, recall and parity checks; filled when given to ``forward``.

    forced: another trace whose choices are obeyed in place of the model's own.
    candidates: level 1's blocks, int32 [B, 1, L, K1]. word_query / word_block_key: what level 1 compared.
    written: per layer, this call's keys and values [B, Hkv, L, D] as they go into the cache; packed: what packed caches hold of
    them and of all tokens before, uint8 [B, Hkv, M, C], first the keys'.
    Per routed layer: query [B, Hr, L, Dr], block_key [B, Hkv, N, Dr], routes int32 [B, Hs, L, K2]. Per layer of a routed model:
    attention [B, Hq, L, D].
    Per expert layer: expert_logits [T, E], group_logits [T, Gp], expert_bias [E], expert_ids int32 [T, k], expert_weights [T,
    k], expert_out [T, d].
    """

    candidates: Tensor | None = None
    word_query: Tensor | None = None
    word_block_key: Tensor | None = None
    written: list[Tensor] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    query: list[Tensor] = field(default_factory=list)
    block_key: list[Tensor] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    expert_logits: list[Tensor] = field(default_factory=list)
    group_logits: list[Tensor] = field(default_factory=list)
    expert_bias: list[Tensor] = field(default_factory=list)
    expert_ids: list[Tensor] = field(default_factory=list)
    expert_weights: list[Tensor] = field(default_factory=list)
    expert_out: list[Tensor] = field(default_factory=list)
    forced: Trace | None = None

    def copy(self) -> Trace:
        """Another trace of the same tensors, to which others can be added."""
        lists: dict[str, Any] = {name: list(value) for name, value in vars(self).items() if isinstance(value, list)}
        return replace(self, **lists)

    def given(self, kind: str) -> Tensor | None:
        """The choice of this kind ("candidates", "routes", ...) that the next router has to obey, None where it is free."""
        if self.forced is None:
            return None
        forced = getattr(self.forced, kind)
        if not isinstance(forced, list):
            return forced
        index = len(getattr(self, kind))
        return forced[index] if index < len(forced) else None


@dataclass
class Step:
    """What every layer of one call shares. cos, sin: [B, L, D/2]; words: unit word embeddings [B, L, d] or None; token_ids
    int64 [B, L], where a layer chooses by them."""

    past_len: Tensor
    new_len: Tensor
    cos: Tensor
    sin: Tensor
    candidates: Tensor | None
    words: Tensor | None
    trace: Trace | None
    token_ids: Tensor | None = None
    _mask: AttentionMask | None = None
    _every_block: Tensor | None = None
    _token_angles: tuple[Tensor, Tensor] | None = None
    _block_angles: tuple[Tensor, Tensor] | None = None

    def causal_mask(self, capacity: int, length: int) -> AttentionMask:
        """Of dense layers, which all have the same: made by the first of them, and traced once."""
        if self._mask is None:
            self._mask = causal_mask(capacity, length, self.past_len, self.new_len)
        return self._mask

    def every_block(self, capacity: int, length: int, block_size: int) -> Tensor:
        """Routes to all that is visible, of the dense layers of a routed model; made once a call."""
        if self._every_block is None:
            self._every_block = every_block(capacity // block_size, length, self.past_len, self.new_len, block_size)
        return self._every_block

    def token_angles(self, config: ModelConfig, first: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B, num_blocks, R, r/2] of the tokens of the blocks from each row's ``first`` on; made once a call."""
        if self._token_angles is None:
            token = torch.arange(config.routing.block_size, device=first.device)
            self._token_angles = rotary_angles(_starts(config, first, num_blocks)[..., None] + token, config)
        return self._token_angles

    def block_angles(self, config: ModelConfig, first: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B, num_blocks, r/2] of the blocks' first tokens; made once a call."""
        if self._block_angles is None:
            self._block_angles = rotary_angles(_starts(config, first, num_blocks), config)
        return self._block_angles


def _starts(config: ModelConfig, first: Tensor, num_blocks: int) -> Tensor:
    """Positions [B, num_blocks] at which the blocks from each row's ``first`` on begin."""
    return (first[:, None] + torch.arange(num_blocks, device=first.device)) * config.routing.block_size
