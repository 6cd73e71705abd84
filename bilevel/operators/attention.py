"""Attention over the tokens of the routed blocks, vectorised and trainable."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel.operators import cpu_library, routed_tiles
from bilevel.operators.precision import wide
from bilevel.operators.routing import head_map


def visible_tokens(capacity: int, length: int, past_len: Tensor, new_len: Tensor, causal: bool) -> Tensor:
    """bool [B, L, M]: the tokens that each position of this call may see; rows at or beyond new_len see none."""
    token = torch.arange(capacity, device=past_len.device)
    offset = torch.arange(length, device=past_len.device)
    end = past_len[:, None] + (offset + 1 if causal else new_len[:, None])
    return (token < end[..., None]) & (offset < new_len[:, None])[..., None]


class AttentionMask(NamedTuple):
    """allowed: bool [B, 1 or Hq, L, M], what a position reads; all True where it reads nothing, as empty [..., L, 1] says."""

    allowed: Tensor
    empty: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> AttentionMask:
        """From bool [B, 1 or Hq, L, M], True where a token is read."""
        empty = ~mask.any(-1, keepdim=True)
        return cls(mask | empty, empty)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Softmax attention in fp32 (fp64 for fp64 operands); a row that reads nothing gives 0 (and no NaN gradient).

    q: [B, Hq, L, D]. k, v: [B, Hkv, M, D]. Returns [B, Hq, L, D] in q's dtype.
    """
    heads = head_map(q.shape[1], k.shape[1], q.device)
    out = F.scaled_dot_product_attention(wide(q), wide(k)[:, heads], wide(v)[:, heads], attn_mask=mask.allowed, scale=scale)
    return torch.where(mask.empty, 0.0, out).to(q.dtype)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    past_len: Tensor,
    new_len: Tensor,
    *,
    block_size: int,
    causal: int,
    scale: float,
) -> Tensor:
    """Softmax attention over the tokens of the routed blocks (see ``bilevel.operators.reference.routed_attention``); ``v`` may
    be of another width than ``k``. Time and memory, of the gradients too, follow the blocks that are kept."""
    call = routed_tiles.Call(
        routes, past_len, new_len, block_size, bool(causal), float(scale), q.shape[1], k.shape[1], k.shape[2]
    )
    return _RoutedAttention.apply(q, k, v, call)


class _RoutedAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and each row's log-sum-exp; probabilities are computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: routed_tiles.Call) -> Tensor:
        kernels = cpu_library if any(ctx.needs_input_grad) and cpu_library.covers(q, k, v) else None
        out, lse = kernels.attention_forward(q, k, v, call) if kernels else routed_tiles.forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.kernels = call, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gradients: Any = ctx.kernels.attention_backward if ctx.kernels else routed_tiles.backward
        return (*gradients(grad, *ctx.saved_tensors, ctx.call), None)


def every_block(num_blocks: int, length: int, past_len: Tensor, new_len: Tensor, block_size: int) -> Tensor:
    """Routes int32 [B, 1, L, num_blocks] that hold all blocks that a position sees: with them ``routed_attention`` is ordinary
    causal attention, whose cost follows the tokens there are and not the cache's capacity."""
    first = torch.arange(num_blocks, device=past_len.device) * block_size
    offset = torch.arange(length, device=past_len.device)[:, None]
    seen = (first <= past_len[:, None, None] + offset) & (offset < new_len[:, None, None])
    return torch.where(seen, torch.arange(num_blocks, device=past_len.device), -1)[:, None].to(torch.int32)


def causal_mask(capacity: int, length: int, past_len: Tensor, new_len: Tensor) -> AttentionMask:
    """Ordinary causal attention over the cache: what ``routed_attention`` equals when every block is kept."""
    return AttentionMask.of(visible_tokens(capacity, length, past_len, new_len, True)[:, None])
