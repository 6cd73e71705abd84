"""Attention over the tokens of the routed blocks, vectorised and trainable."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

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


# Products of two such numbers, added up over any head dim, are finite in fp32: what is masked is 0 times a number, not NaN.
_TAME = 2.0**56
_MOST_NUMBERS = 2**24  # of a tensor [B, Hq, rows, M, D] at a time


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Softmax attention in fp32 (fp64 for fp64 operands); a row that reads nothing gives 0 (and no NaN gradient).

    q: [B, Hq, L, D]. k: [B, Hkv, M, D]. v: [B, Hkv, M, Dv]. Returns [B, Hq, L, Dv] in q's dtype. A matrix product
    multiplies what is masked, and 0 times NaN is NaN. So what no row reads is set to 0 where it could do harm; where a row
    still reads what another one does not, each row's own tokens are laid out instead.
    """
    heads = head_map(q.shape[1], k.shape[1], q.device)
    dtype, q, k, v = q.dtype, wide(q), wide(k), wide(v)
    if not torch.compiler.is_compiling() and not _is_tame(q, k, v):
        q = torch.where(mask.empty, 0.0, q)
        read = (mask.allowed & ~mask.empty).any(2)
        read = read if read.shape[1] == 1 else read.unflatten(1, (k.shape[1], -1)).any(2)
        k, v = (torch.where(read[..., None], x, 0.0) for x in (k, v))
        if not _is_tame(q, k, v):
            return _by_rows(q, k[:, heads], v[:, heads], mask, scale).to(dtype)
    out = F.scaled_dot_product_attention(q, k[:, heads], v[:, heads], attn_mask=mask.allowed, scale=scale)
    return torch.where(mask.empty, 0.0, out).to(dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, new_len: Tensor, scale: float) -> Tensor:
    """Ordinary causal attention of whole texts, without a mask of L x L numbers; rows at or beyond new_len give 0.

    q: [B, Hq, L, D]. k, v: [B, Hkv, L, D]. new_len: [B]. Returns [B, Hq, L, D] in q's dtype.
    """
    if not torch.compiler.is_compiling() and not _is_tame(q, k, v):
        return masked_attention(q, k, v, causal_mask(k.shape[2], q.shape[2], torch.zeros_like(new_len), new_len), scale)
    heads = head_map(q.shape[1], k.shape[1], q.device)
    out = F.scaled_dot_product_attention(wide(q), wide(k)[:, heads], wide(v)[:, heads], is_causal=True, scale=scale)
    used = torch.arange(q.shape[2], device=q.device) < new_len[:, None]
    return torch.where(used[:, None, :, None], out, 0.0).to(q.dtype)


def _is_tame(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether whatever is masked counts for nothing in forward and backward products."""
    with torch.no_grad():
        limits = ((q, _TAME), (k, _TAME), (v, _TAME))
        return all(not x.numel() or bool(x.abs().amax() <= limit) for x, limit in limits)


def _by_rows(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """The same with every row's tokens laid out, those that it does not read as 0: slow, and nothing else reaches a row.

    q: [B, Hq, L, D]. k: [B, Hq, M, D]. v: [B, Hq, M, Dv].
    """
    numbers = q.shape[0] * q.shape[1] * k.shape[2] * max(q.shape[3], v.shape[3])
    pieces = zip(*(x.split(max(1, _MOST_NUMBERS // max(numbers, 1)), 2) for x in (q, mask.allowed, mask.empty)), strict=True)
    return torch.cat([checkpoint(_rows, *piece, k, v, scale, use_reentrant=False) for piece in pieces], 2)


def _rows(q: Tensor, allowed: Tensor, empty: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    read = (allowed & ~empty)[..., None]
    keys, values = (torch.where(read, x[:, :, None], 0.0) for x in (k, v))
    scores = (q[..., None, :] * keys).sum(-1) * scale
    probability = torch.softmax(torch.where(allowed, scores, -torch.inf), -1)
    return torch.where(empty, 0.0, (probability[..., None] * values).sum(-2))


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
    return _RoutedAttention.apply(q, k, v, None, call)


def routed_attention_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    past_len: Tensor,
    new_len: Tensor,
    sinks: Tensor,
    *,
    block_size: int,
    causal: int,
    scale: float,
) -> Tensor:
    """The same with sinks fp32 [Hq] (see ``bilevel.operators.reference.routed_attention_sinks``)."""
    call = routed_tiles.Call(
        routes, past_len, new_len, block_size, bool(causal), float(scale), q.shape[1], k.shape[1], k.shape[2]
    )
    return _RoutedAttention.apply(q, k, v, sinks, call)


class _RoutedAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and each row's log-sum-exp; probabilities are computed again on the way back.

    A sink is one more token that every row reads, of value 0: it joins the log-sum-exp, and that is all that the gradients of
    q, k and v need to know of it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: routed_tiles.Call) -> Tensor:
        kernels = cpu_library if any(ctx.needs_input_grad) and cpu_library.covers(q, k, v) else None
        out, lse = kernels.attention_forward(q, k, v, call) if kernels else routed_tiles.forward(q, k, v, call)
        if sinks is not None:
            joined = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))
            share = torch.where(lse > -torch.inf, (lse - joined).exp(), 0.0)  # a row that reads nothing has none
            out, lse = (wide(out) * share[..., None]).to(q.dtype), joined
        ctx.save_for_backward(q, k, v, out, lse, *(() if sinks is None else (sinks,)))
        ctx.call, ctx.kernels = call, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        gradients: Any = ctx.kernels.attention_backward if ctx.kernels else routed_tiles.backward
        q, k, v, out, lse, *sinks = ctx.saved_tensors
        by_sinks = None
        if sinks:
            weight = torch.where(lse > -torch.inf, (sinks[0].to(lse.dtype)[:, None] - lse).exp(), 0.0)
            by_sinks = -(weight * (wide(grad) * wide(out)).sum(-1)).sum((0, 2)).to(sinks[0].dtype)
        return (*gradients(grad, q, k, v, out, lse, ctx.call), by_sinks, None)


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
