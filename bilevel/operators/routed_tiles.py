"""Attention over routed blocks in tiles of one block each, forward and backward: time and memory follow the kept blocks.

Any float type, any device, plain PyTorch. A call's (position, block) pairs are sorted by block and cut into tiles of at most
``_TILE`` positions, so that a tile multiplies its rows of queries with the keys and values of one block; what its rows get from
their blocks is put together by their log-sum-exps (arXiv 1805.02867). The backward pass computes the probabilities again from
the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691) instead of storing them. Sums are fp32, of fp64 operands fp64, and
always in the same order.

Letters as in ``bilevel/contract.py``. G: consecutive query heads that share a key/value head and a choice of blocks (a group);
V = Hq/G groups. E: width of a value (``v`` may be wider or narrower than ``k``). T: positions of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.operators.precision import wide
from bilevel.operators.routing import head_map

_TILE = 64  # positions of a tile; fewer where a block is kept by few positions of a chunk
_PAIRS = 2**16  # (position, block) pairs of all rows and groups that are sorted and held at a time
_SCORES = 2**20  # scores that are held at a time


class Call(NamedTuple):
    """What does not change from tile to tile. Tensors as the operator gets them."""

    routes: Tensor
    past_len: Tensor
    new_len: Tensor
    block_size: int
    causal: bool
    scale: float
    heads: int
    kv_heads: int
    capacity: int

    @property
    def group(self) -> int:
        """G."""
        return math.gcd(self.heads // self.kv_heads, self.heads // self.routes.shape[1])

    @property
    def groups(self) -> int:
        """V."""
        return self.heads // self.group

    @property
    def blocks(self) -> int:
        """N, blocks that the cache has room for."""
        return self.capacity // self.block_size

    @property
    def length(self) -> int:
        """L."""
        return self.routes.shape[2]


class Tiles(NamedTuple):
    """The sorted pairs of positions [first, last). rows: int64 [n, T], (b*V + v)*L + i of each row; 0 where a tile has no more.
    seen: int64 [n, T], tokens of the block that the row sees; 0 likewise. unit: int64 [n], (b*Hkv + h)*N + block.
    place: int64 [B, V, last-first, K], where a pair lies among the n*T rows; n*T where it reads nothing.
    """

    first: int
    last: int
    rows: Tensor
    seen: Tensor
    unit: Tensor
    place: Tensor


def _horizon(call: Call, position: Tensor) -> Tensor:
    """int64 [B, C]: how many tokens of the cache each of the positions [C] of the call sees; 0 at and beyond new_len."""
    past, new = call.past_len.long()[:, None], call.new_len.long()[:, None]
    end = past + (position + 1 if call.causal else new)
    return torch.where(position < new, end, 0)


def _tiles(call: Call, first: int, last: int) -> Tiles:
    """The pairs of the positions [first, last), each once, sorted by row of the batch, group and block."""
    device, groups, blocks = call.routes.device, call.groups, call.blocks
    position = torch.arange(first, last, device=device)
    route = call.routes[:, head_map(groups, call.routes.shape[1], device), first:last].long().sort(-1).values
    horizon = _horizon(call, position)[:, None, :, None]
    seen = torch.where((route >= 0) & (route < blocks), horizon - route * call.block_size, 0).clamp(0, call.block_size)
    seen[..., 1:].masked_fill_(route[..., 1:] == route[..., :-1], 0)  # a route is a set
    batch = torch.arange(route.shape[0], device=device)[:, None, None, None]
    group = torch.arange(groups, device=device)[:, None, None]
    owner = batch * groups + group
    pair = (seen > 0).flatten().nonzero()[:, 0]
    unit = (owner * blocks + route).flatten()[pair]  # of all groups: two may read the same keys, but in tiles of their own
    order = torch.sort(unit, stable=True).indices
    pair, unit = pair[order], unit[order]
    count = torch.bincount(unit, minlength=int(route.shape[0]) * groups * blocks)
    size = min(_TILE, max(1, int(count.max()))) if len(pair) else 1
    tiles = -(-count // size)
    start, begin = tiles.cumsum(0) - tiles, count.cumsum(0) - count
    at = start[unit] * size + torch.arange(len(pair), device=device) - begin[unit]
    total = int(tiles.sum())
    rows = torch.zeros(total * size, dtype=torch.int64, device=device)
    rows[at] = (owner * call.length + position[:, None]).expand_as(route).flatten()[pair]
    limit = torch.zeros_like(rows)
    limit[at] = seen.flatten()[pair]
    place = torch.full((route.numel(),), total * size, device=device)
    place[pair] = at
    owner = torch.arange(len(count), device=device).repeat_interleave(tiles)
    kv_head = head_map(groups, call.kv_heads, device)[owner // blocks % groups]
    keys = (owner // (groups * blocks) * call.kv_heads + kv_head) * blocks + owner % blocks
    return Tiles(first, last, rows.view(total, size), limit.view(total, size), keys, place.view_as(route))


def _chunks(call: Call) -> Iterator[Tiles]:
    """All tiles of the call, some positions at a time."""
    batch, _, length, kept = call.routes.shape
    step = max(1, _PAIRS // max(1, batch * call.groups * kept))
    for first in range(0, length, step):
        yield _tiles(call, first, min(length, first + step))


def _pieces(call: Call, tiles: Tiles) -> Iterator[slice]:
    """Ranges of tiles whose scores are held at a time."""
    step = max(1, _SCORES // (tiles.rows.shape[1] * call.group * call.block_size))
    for first in range(0, len(tiles.rows), step):
        yield slice(first, min(len(tiles.rows), first + step))


def _grouped(x: Tensor, call: Call) -> Tensor:
    """[B, Hq, L, W] as rows [B*V*L, G*W]."""
    return x.unflatten(1, (call.groups, call.group)).transpose(2, 3).reshape(-1, call.group * x.shape[-1])


def _ungrouped(rows: Tensor, call: Call, batch: int) -> Tensor:
    """The reverse of ``_grouped``."""
    x = rows.view(batch, call.groups, call.length, call.group, -1).transpose(2, 3)
    return x.reshape(batch, call.heads, call.length, -1)


def _blocks(x: Tensor, call: Call) -> Tensor:
    """[B, Hkv, M, W] as blocks [B*Hkv*N, R, W]."""
    return x.reshape(-1, call.block_size, x.shape[-1])


def _queries(rows: Tensor, tiles: Tiles, piece: slice, call: Call) -> Tensor:
    """What the tiles' rows are of [B*V*L, G*W]: [n, T*G, W], accumulated type; 0 where a tile has no more rows."""
    picked = wide(rows[tiles.rows[piece]])
    picked = torch.where(tiles.seen[piece, :, None] > 0, picked, 0.0)
    return picked.view(len(picked), -1, picked.shape[-1] // call.group)


def _visible(tiles: Tiles, piece: slice, call: Call) -> Tensor:
    """bool [n, T*G, R]: which of its block's tokens each row sees."""
    limit = tiles.seen[piece].repeat_interleave(call.group, dim=1)
    return torch.arange(call.block_size, device=limit.device) < limit[..., None]


def _clean(x: Tensor) -> Tensor:
    """Without what is not finite: where such a token is read, the row's probabilities or gradients already say so."""
    return torch.where(x.isfinite(), x, 0.0)


def _mixed(weight: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """weight [n, T*G, R] times value [n, R, E], but a token that a row does not see does not reach it, not even as 0 * NaN."""
    out = weight @ _clean(value)
    for special in (torch.inf, -torch.inf, torch.nan):
        found = value.isnan() if math.isnan(special) else value == special
        if bool(found.any()):
            out = torch.where((visible.to(out.dtype) @ found.to(out.dtype)) > 0, out + special, out)
    return out


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, L, E] in q's dtype, log-sum-exp [B, Hq, L] of the scaled scores; 0 and -inf of a row that reads nothing).

    q: [B, Hq, L, D]. k: [B, Hkv, M, D]. v: [B, Hkv, M, E].
    """
    batch, width, group = q.shape[0], v.shape[-1], call.group
    queries, keys, values = _grouped(q, call), _blocks(k, call), _blocks(v, call)
    out = q.new_zeros(batch, call.groups, call.length, group, width)
    lse = wide(q).new_full((batch, call.groups, call.length, group), -torch.inf)
    for tiles in _chunks(call):
        many = tiles.rows.numel()
        part = lse.new_zeros(many + 1, group, width)
        peak, total = lse.new_full((many + 1, group), -torch.inf), lse.new_zeros(many + 1, group)
        for piece in _pieces(call, tiles):
            visible = _visible(tiles, piece, call)
            score = _queries(queries, tiles, piece, call) @ wide(keys[tiles.unit[piece]]).mT * call.scale
            score = score.masked_fill(~visible, -torch.inf)
            most = score.amax(-1, keepdim=True)
            weight = torch.where(visible, torch.exp(score - torch.where(most == -torch.inf, 0.0, most)), 0.0)
            at = slice(piece.start * tiles.rows.shape[1], piece.stop * tiles.rows.shape[1])
            part[at] = _mixed(weight, wide(values[tiles.unit[piece]]), visible).view(-1, group, width)
            peak[at], total[at] = most.view(-1, group), weight.sum(-1).view(-1, group)
        peaks, place = peak[tiles.place], tiles.place  # [B, V, C, K, G]
        most = peaks.amax(3)
        factor = torch.exp(peaks - torch.where(most == -torch.inf, 0.0, most)[:, :, :, None])
        sums, mixed = torch.zeros_like(most), torch.zeros_like(part[place[:, :, :, 0]])
        for slot in range(
            place.shape[3]
        ):  # one by one: what is missing adds exactly 0, so that a route is a set to the last bit
            sums += factor[:, :, :, slot] * total[place[..., slot]]
            mixed += factor[:, :, :, slot, :, None] * part[place[..., slot]]
        some = (place < many).any(3)[..., None]
        out[:, :, tiles.first : tiles.last] = torch.where(some[..., None], mixed / sums[..., None], 0.0).to(out.dtype)
        lse[:, :, tiles.first : tiles.last] = most + sums.log()
    return _ungrouped(out, call, batch), _ungrouped(lse, call, batch)[..., 0]


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their dtypes. grad, out: [B, Hq, L, E]; lse: [B, Hq, L]."""
    batch, group = q.shape[0], call.group
    grad = torch.where(lse[..., None] == -torch.inf, 0.0, wide(grad))  # a row that reads nothing takes no part
    delta = (grad * torch.where(lse[..., None] == -torch.inf, 0.0, wide(out))).sum(-1, keepdim=True)
    sides = torch.cat([grad, delta, wide(lse)[..., None]], -1)
    queries, sides = _grouped(q, call), _grouped(sides, call)
    keys, values = _clean(_blocks(k, call)), _clean(_blocks(v, call))
    grad_q = sides.new_zeros(batch * call.groups * call.length, group * q.shape[-1])
    grad_k, grad_v = (sides.new_zeros(x.shape) for x in (keys, values))
    for tiles in _chunks(call):
        part = sides.new_zeros(tiles.rows.numel() + 1, group * q.shape[-1])
        for piece in _pieces(call, tiles):
            visible, unit = _visible(tiles, piece, call), tiles.unit[piece]
            query, key, value = _queries(queries, tiles, piece, call), wide(keys[unit]), wide(values[unit])
            side = _queries(sides, tiles, piece, call)
            taught, inner, total = side[..., :-2], side[..., -2:-1], side[..., -1:]
            weight = torch.where(visible, torch.exp(query @ key.mT * call.scale - total), 0.0)
            change = torch.where(visible, weight * (taught @ value.mT - inner), 0.0) * call.scale
            grad_v.index_add_(0, unit, weight.mT @ taught)
            grad_k.index_add_(0, unit, change.mT @ query)
            at = slice(piece.start * tiles.rows.shape[1], piece.stop * tiles.rows.shape[1])
            part[at] = (change @ key).view(-1, group * q.shape[-1])
        place = tiles.place
        summed = part[place[..., 0]]
        for slot in range(1, place.shape[3]):
            summed = summed + part[place[..., slot]]
        grad_q.view(batch, call.groups, call.length, -1)[:, :, tiles.first : tiles.last] = summed
    return (
        _ungrouped(grad_q, call, batch).to(q.dtype),
        grad_k.view_as(k).to(k.dtype),
        grad_v.view_as(v).to(v.dtype),
    )
