"""Packed caches, vectorised: what is written, what is read, and attention over it (``bilevel/bundle/cache_rows.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.bundle.cache_rows import BIAS, NOT_FINITE, SMALLEST
from bilevel.operators.attention import routed_attention


def pack_rows(x: Tensor, bits: int, groups: int) -> Tensor:
    """Numbers [..., D] as uint8 rows [..., C], rounded to nearest, ties to even. See ``reference_rows.pack_row``."""
    most, half = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
    x = x.detach().float().unflatten(-1, (groups, -1))
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, 0)
    peak = x.abs().amax(-1, keepdim=True)
    used = peak >= SMALLEST
    scale = torch.where(used, peak, 1) / most
    _, exponent = torch.frexp(scale)  # 2^(exponent - 1) <= scale
    exponent = exponent - 8
    mantissa = torch.ldexp(scale, -exponent).ceil()
    exponent, mantissa = exponent + (mantissa > 255), torch.where(mantissa > 255, 128, mantissa)
    codes = (torch.where(used, x, 0) / torch.ldexp(mantissa, exponent)).round().to(torch.int32) + half
    if bits == 4:
        lower, upper = codes.chunk(2, -1)
        codes = lower | upper << 4
    exponent = torch.where(finite, torch.where(used, exponent + BIAS, 0), NOT_FINITE)
    scales = torch.cat([torch.where(used, mantissa, 0).to(torch.int32), exponent.to(torch.int32)], -1)
    return torch.cat([codes.flatten(-2), scales.flatten(-2)], -1).to(torch.uint8)


def unpack_rows(rows: Tensor, width: int, bits: int, groups: int) -> Tensor:
    """The numbers fp32 [..., D] of rows [..., C]."""
    codes, scales = rows.split([width * bits // 8, 2 * groups], -1)
    codes, scales = codes.unflatten(-1, (groups, -1)), scales.unflatten(-1, (groups, 2)).int()
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    mantissa, exponent = scales.split(1, -1)
    scale = torch.where(exponent == NOT_FINITE, torch.nan, torch.ldexp(mantissa.float(), exponent - BIAS))
    return ((codes.float() - 2 ** (bits - 1)) * scale).flatten(-2)


def unpack_cache(rows: Tensor, *, bits: int, groups: int, width: int) -> Tensor:
    """The numbers fp32 [B, H, U, S, D] of blocks [B, H, U, S, C] (contract: UnpackCache)."""
    return unpack_rows(rows, width, bits, groups)


def write_cache_quantized(update: Tensor, cache: Tensor, start: Tensor, *, bits: int, groups: int) -> Tensor:
    """A new cache (see ``bilevel.operators.reference.write_cache_quantized``)."""
    out, rows = cache.clone(), pack_rows(update, bits, groups)
    for row, first in enumerate(start.tolist()):
        out[row].narrow(1, first, rows.shape[2]).copy_(rows[row])
    return out


def routed_attention_quantized(
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
    bits: int,
    groups: int,
) -> Tensor:
    """``routed_attention`` over the numbers of packed caches uint8 [B, Hkv, M, C] (contract: RoutedAttentionQuantized)."""
    k, v = (unpack_rows(cache, q.shape[3], bits, groups).to(q.dtype) for cache in (k, v))
    return routed_attention(q, k, v, routes, past_len, new_len, block_size=block_size, causal=causal, scale=scale)
