"""What several routers share: norms, rotation by position, and the caches' layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ops
from bilevel.errors import ContractError
from bilevel.operators.precision import wide
from bilevel.rotary import apply_rotary


class OffsetNorm(nn.Module):
    """RMSNorm in fp32 whose weight is an offset from 1 (Gemma's form, which MiniMax-M3 and Qwen4-Exp use)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), self.weight.shape, 1.0 + wide(self.weight), self.eps).to(x.dtype)


def positions(past_len: Tensor, length: int) -> Tensor:
    """int64 [B, L]: absolute positions of a call's tokens."""
    return past_len[:, None].long() + torch.arange(length, device=past_len.device)


def rotate(x: Tensor, position: Tensor, channels: int, theta: float) -> Tensor:
    """[B, H, L, D] with its first ``channels`` channels turned by the positions [B, L] (or [1, L]), Hugging Face's layout."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=x.device) / channels
    angle = position[..., None].float() / theta**exponent
    return apply_rotary(x, angle.cos(), angle.sin())


def heads(x: Tensor, count: int) -> Tensor:
    """[B, L, count * D] -> [B, count, L, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def blocks_of(cache: Tensor, block_size: int) -> Tensor:
    """A cache [B, H, M, D] as [B, H, M / block_size, block_size, D]. Raises ContractError."""
    if cache.shape[2] % block_size:
        raise ContractError(
            f"the cache holds {cache.shape[2]} tokens, not a multiple of block_size={block_size}; "
            "pad it with bilevel.ops.pad_to_blocks"
        )
    return cache.unflatten(2, (-1, block_size))


class CachedAttention(nn.Module):
    """What MiniMax-M3's and Qwen4-Exp's attention have in common: norms of q and k per head, part of a head turned, caches.

    The names of parameters are those of transformers. ``gated``: q_proj also gives a gate for the output (Qwen4-Exp).
    """

    def __init__(
        self, width: int, *, query_heads: int, kv_heads: int, head_dim: int, rotary_channels: int, theta: float, eps: float,
        gated: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.query_heads, self.kv_heads, self.head_dim = query_heads, kv_heads, head_dim
        self.rotary_channels, self.theta, self.gated = rotary_channels, theta, gated
        self.q_proj = nn.Linear(width, query_heads * head_dim * (1 + gated), bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(query_heads * head_dim, width, bias=False)
        self.q_norm, self.k_norm = OffsetNorm(head_dim, eps), OffsetNorm(head_dim, eps)

    def attend(
        self, x: Tensor, routes: Tensor, block_size: int, keys: Tensor, values: Tensor, past_len: Tensor, new_len: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, L, width]; routes int32 [B, Hs, L, K]; caches [B, Hkv, M, D]. Returns (out [B, L, width], keys, values)."""
        position = positions(past_len, x.shape[1])
        query, gate = heads(self.q_proj(x), self.query_heads), None
        if self.gated:
            query, gate = query.chunk(2, dim=-1)
        query = rotate(self.q_norm(query), position, self.rotary_channels, self.theta)
        key = rotate(self.k_norm(heads(self.k_proj(x), self.kv_heads)), position, self.rotary_channels, self.theta)
        keys = ops.write_cache(keys, key, past_len)
        values = ops.write_cache(values, heads(self.v_proj(x), self.kv_heads), past_len)
        scale = float(self.head_dim) ** -0.5
        out = ops.routed_attention(query, keys, values, routes, past_len, new_len, block_size=block_size, causal=1, scale=scale)
        if gate is not None:
            out = out * gate.sigmoid()
        return self.o_proj(out.transpose(1, 2).flatten(2)), keys, values
