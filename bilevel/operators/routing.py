"""Route selection, vectorised: ``select_blocks``, ``coarse_route`` and ``fine_route`` of the contract, and the gathering of
blocks to pool."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel import contract
from bilevel.operators.precision import wide

_FLOAT_MAX = torch.finfo(torch.float32).max  # in an fp64 model too: its routes mean the same


def head_map(num_from: int, num_to: int, device: torch.device | None = None) -> Tensor:
    """Index [num_from]: head h of ``num_from`` reads head floor(h*num_to/num_from) of ``num_to``."""
    return torch.arange(num_from, device=device) * num_to // num_from


def block_scores(query: Tensor, unit_key: Tensor, num_selection_heads: int) -> Tensor:
    """fp32 (fp64 for fp64 operands) scores [B, Hs, L, U] of every unit: dot products summed over the route heads that share a
    selection head.

    query: [B, Hr, L, Dr]. unit_key: [B, Hk, U, Dr]. Summing the queries first is the same sum and G times cheaper, where
    all heads of one choice read the same key head (only infinite keys tell the two apart: 2*inf - 1*inf).
    """
    num_route_heads, num_key_heads = query.shape[1], unit_key.shape[1]
    query, unit_key = wide(query), wide(unit_key)
    if num_selection_heads % num_key_heads == 0:
        query = query.unflatten(1, (num_selection_heads, num_route_heads // num_selection_heads)).sum(2)
        return query @ unit_key[:, head_map(num_selection_heads, num_key_heads, query.device)].mT
    scores = query @ unit_key[:, head_map(num_route_heads, num_key_heads, query.device)].mT
    return scores.unflatten(1, (num_selection_heads, num_route_heads // num_selection_heads)).sum(2)


def _positions(length: int, past_len: Tensor) -> Tensor:
    """Absolute positions [B, L] of this call's tokens."""
    return past_len[:, None].long() + torch.arange(length, device=past_len.device)


def _forced(block: Tensor, own: Tensor, horizon: Tensor, attributes: dict[str, int]) -> Tensor:
    """bool [B, 1, L, U]: the blocks kept whatever their score, at most topk of them."""
    block_size, local_blocks = attributes["block_size"], attributes["local_blocks"]
    partial = horizon // block_size
    forces = attributes["partial_block"] == contract.ALWAYS_KEPT
    is_partial = (block == partial) & (horizon % block_size != 0) & forces
    # Where the partial block is not the own one that local_blocks forces anyway, it takes one slot of the budget for itself.
    apart = (horizon % block_size != 0) & ((partial > own) | (local_blocks == 0)) & forces
    topk = attributes["topk"] - apart.long()
    # Own and recent local blocks win over init ones when K is too small for all of them.
    local = topk.clamp(max=local_blocks)
    is_local = (block <= own) & (block > own - local)
    room = torch.where(block < own, topk - local, topk)
    is_init = (block < attributes["init_blocks"]) & (block < room) & (block * block_size < horizon)
    return is_partial | is_local | is_init


def select_blocks(scores: Tensor, past_len: Tensor, new_len: Tensor, **attributes: int) -> Tensor:
    """Keep K blocks by given scores: int32 [B, Hs, L, K] (see ``bilevel.operators.reference.select_blocks``)."""
    contract.SELECT_BLOCKS.check_attributes(attributes)
    block_size, topk = attributes["block_size"], attributes["topk"]
    length, num_units = scores.shape[2:]
    position = _positions(length, past_len)[:, None, :, None]
    block = torch.arange(num_units, device=scores.device)
    valid = (past_len + new_len).long()[:, None, None, None]
    horizon = position + 1 if attributes["causal"] else valid
    forced = _forced(block, position // block_size, horizon, attributes) & (position < valid)
    needed = 1 if attributes["partial_block"] == contract.SCORED else block_size
    scored = (block * block_size + needed <= horizon) & (position < valid)
    score = torch.where(scores.isnan(), -torch.inf, scores.clamp(max=_FLOAT_MAX))
    score = torch.where(forced, torch.inf, torch.where(scored, score, -torch.inf))
    # torch.topk breaks ties in no fixed order; a stable sort keeps the lower index first.
    best, index = torch.sort(score, dim=-1, descending=True, stable=True)
    best, index = best[..., :topk], index[..., :topk]
    most = forced.sum(-1, keepdim=True) + attributes["scored_topk"]
    wanted = (best > -torch.inf) & (torch.arange(best.shape[-1], device=scores.device) < most)
    kept = torch.where(wanted, index, num_units).sort(dim=-1).values
    kept = torch.where(kept < num_units, kept, -1)
    return torch.nn.functional.pad(kept, (0, topk - kept.shape[-1]), value=-1).to(torch.int32)


def _as_selection(attributes: dict[str, int]) -> dict[str, int]:
    """The attributes of CoarseRoute and FineRoute as those of SelectBlocks."""
    rest = {name: value for name, value in attributes.items() if name != "num_selection_heads"}
    return {**rest, "scored_topk": attributes["topk"], "partial_block": contract.NEVER_SCORED}


def coarse_route(query: Tensor, unit_key: Tensor, past_len: Tensor, new_len: Tensor, **attributes: int) -> Tensor:
    """Score every visible block and keep K: int32 [B, Hs, L, K] (see ``bilevel.operators.reference.coarse_route``)."""
    contract.COARSE_ROUTE.check_attributes(attributes)
    scores = block_scores(query, unit_key, attributes["num_selection_heads"])
    return select_blocks(scores, past_len, new_len, **_as_selection(attributes))


def block_mask(routes: Tensor, num_blocks: int) -> Tensor:
    """Routes int32 [..., K] as a set: bool [..., num_blocks]; indices out of range are ignored."""
    inside = (routes >= 0) & (routes < num_blocks)
    mask = torch.zeros(*routes.shape[:-1], num_blocks + 1, dtype=torch.bool, device=routes.device)
    return mask.scatter(-1, torch.where(inside, routes, num_blocks).long(), True)[..., :num_blocks]


def fine_route(
    query: Tensor, unit_key: Tensor, candidates: Tensor, past_len: Tensor, new_len: Tensor, **attributes: int
) -> Tensor:
    """The same among the candidates and the forced blocks (see ``bilevel.operators.reference.fine_route``)."""
    contract.FINE_ROUTE.check_attributes(attributes)
    num_selection_heads = attributes["num_selection_heads"]
    scores = block_scores(query, unit_key, num_selection_heads)
    allowed = block_mask(candidates, unit_key.shape[2])
    allowed = allowed[:, head_map(num_selection_heads, candidates.shape[1], query.device)]
    return select_blocks(torch.where(allowed, scores, -torch.inf), past_len, new_len, **_as_selection(attributes))


def gather_blocks(tokens: Tensor, first_block: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """``num_blocks`` consecutive blocks of each row's cache.

    tokens: [B, H, M, D], M a multiple of block_size. first_block: [B]. Returns [B, H, num_blocks, block_size, D].
    """
    batch, heads, capacity, width = tokens.shape
    blocks = capacity // block_size
    row = torch.arange(batch * heads, device=tokens.device).reshape(batch, heads, 1) * blocks
    index = row + first_block.long()[:, None, None] + torch.arange(num_blocks, device=tokens.device)
    flat = tokens.reshape(-1, block_size * width).index_select(0, index.reshape(-1))
    return flat.reshape(batch, heads, num_blocks, block_size, width)
