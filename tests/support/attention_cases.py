"""Calls of routed attention that are ugly on purpose, and the formula that its outputs and gradients are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import ops

SHAPES = {
    "B1-Hq1-Hkv1-Hs1-R1-L1": ((1, 1, 1), 1, 1, [0], [1]),
    "B2-Hq4-Hkv2-Hs2-R3-L5": ((4, 2, 2), 3, 4, [6, 0], [5, 2]),
    "B3-Hq6-Hkv3-Hs2-R4-L7": ((6, 3, 2), 4, 3, [5, 1, 3], [7, 0, 4]),
    "B1-Hq12-Hkv4-Hs6-R2-L6": ((12, 4, 6), 2, 5, [3], [6]),
}
# (Hq, Hkv, Hs), among them groups that do not nest: Hq=12, Hkv=4, Hs=6.
HEADS = [(1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 4), (4, 4, 2), (6, 2, 3), (6, 3, 2), (12, 4, 6)]


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    past_len: Tensor
    new_len: Tensor
    block_size: int
    causal: int
    scale: float = 0.7

    def attend(self, function: object = ops.routed_attention, **changes: object) -> Tensor:
        values = {**vars(self), **changes}
        attributes = {name: values.pop(name) for name in ("block_size", "causal", "scale")}
        return function(*values.values(), **attributes)  # type: ignore[operator]


def make_case(
    heads: tuple[int, int, int],
    block_size: int,
    num_blocks: int,
    past_len: list[int],
    new_len: list[int],
    *,
    topk: int = 3,
    causal: int = 1,
    width: int = 5,
    value_width: int | None = None,
    seed: int = 0,
) -> Case:
    """Random inputs; routes repeat themselves and point outside the cache; tokens that nobody may see are NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, capacity = len(past_len), max(*new_len, 1), num_blocks * block_size

    def normal(num_heads: int, tokens: int, width: int = width) -> Tensor:
        return torch.randn(batch, num_heads, tokens, width, generator=generator)

    q, k, v = normal(heads[0], length), normal(heads[1], capacity), normal(heads[1], capacity, value_width or width)
    for b in range(batch):
        k[b, :, past_len[b] + new_len[b] :] = torch.nan
        v[b, :, past_len[b] + new_len[b] :] = torch.nan
    shape = (batch, heads[2], length, topk)
    routes = torch.randint(-2, num_blocks + 2, shape, generator=generator, dtype=torch.int32)
    lengths = (torch.tensor(n, dtype=torch.int32) for n in (past_len, new_len))
    return Case(q, k, v, routes, *lengths, block_size=block_size, causal=causal)


def masked_formula(
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
    """softmax(scale q k' + mask) v in the inputs' own dtype: one mask over all tokens, written out from the definition."""
    num_heads, length = q.shape[1:3]
    token, offset = torch.arange(k.shape[2]), torch.arange(length)[:, None]
    past, new = past_len[:, None, None], new_len[:, None, None]
    visible = (offset < new) & (token < (past + offset + 1 if causal else past + new))  # [B, L, M]
    kept = (routes[..., None] == token // block_size).any(3)  # [B, Hs, L, M]
    mask = visible[:, None] & kept[:, torch.arange(num_heads) * routes.shape[1] // num_heads]
    k, v = (x.nan_to_num().repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    score = torch.where(mask, q @ k.mT * scale, torch.finfo(q.dtype).min)
    return torch.where(mask, score.softmax(-1), 0.0) @ v
