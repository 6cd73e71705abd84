"""RoutedExperts for many tokens as Triton kernels (``plugins/launch/experts.py`` names their arguments and constants).

A counting sort of the (token, expert) pairs by expert (``expert_count``, ``expert_offsets``, ``expert_order``), a matrix
product per tile of rows of one expert (``tile_hidden``, ``tile_output``) and the weighted sum back (``expert_sum``). Nothing
is added atomically: results do not depend on the order in which programs run. The number of tiles has the static bound
min(pairs, ceil(pairs / ROWS) + E); programs beyond the last tile end at once, so work grows with the pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bilevel.plugins.kernels.experts import swiglu
from bilevel.plugins.kernels.order import narrow, product


@triton.jit(do_not_specialize=["pairs"])
def expert_count(ids, counts, pairs, E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr):
    """``counts`` int32 [chunks, E]: how many of CHUNK pairs chose each expert. Grid [ceil(pairs/CHUNK)]."""
    chunk, e = tl.program_id(0), tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    for first in range(0, tl.minimum(CHUNK, pairs - chunk * CHUNK), COLS):
        pair = chunk * CHUNK + first + tl.arange(0, COLS)
        expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
        total += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts + chunk * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["chunks"])
def expert_offsets(counts, places, experts, chunks, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr):
    """``places`` int32 [chunks, E]: where each chunk's first pair of an expert goes. Grid [1].

    ``experts`` int32 [3, E]: the place of an expert's first pair, its number of pairs, and the number of tiles of ROWS pairs
    that it and the experts before it take.
    """
    e = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    for chunk in range(chunks):
        total += tl.load(counts + chunk * E + e, mask=e < E, other=0)
    place = tl.cumsum(total, axis=0) - total
    tl.store(experts + e, place, mask=e < E)
    tl.store(experts + E + e, total, mask=e < E)
    tl.store(experts + 2 * E + e, tl.cumsum((total + ROWS - 1) // ROWS, axis=0), mask=e < E)
    for chunk in range(chunks):
        tl.store(places + chunk * E + e, place, mask=e < E)
        place += tl.load(counts + chunk * E + e, mask=e < E, other=0)


@triton.jit(do_not_specialize=["pairs"])
def expert_order(ids, places, order, pairs, E: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr):
    """``order`` int32 [pairs]: the pairs sorted by expert, in their own order within one. Grid [ceil(pairs/CHUNK)]."""
    chunk, n = tl.program_id(0), tl.arange(0, COLS)
    for first in range(0, tl.minimum(CHUNK, pairs - chunk * CHUNK), COLS):
        pair = chunk * CHUNK + first + n
        expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
        before = tl.zeros([COLS], tl.int32)
        for start in range(0, first + COLS, COLS):
            other = chunk * CHUNK + start + n
            theirs = tl.load(ids + other, mask=other < pairs, other=-1)
            before += tl.sum(((theirs[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])).to(tl.int32), axis=1)
        there = (expert >= 0) & (expert < E)
        place = tl.load(places + chunk * E + expert, mask=there, other=0) + before
        tl.store(order + place, pair, mask=there)


@triton.jit
def tile_of(experts, tile, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first place, number of pairs) of a tile; no pairs for a tile beyond the last."""
    e = tl.arange(0, EP)
    ends = tl.load(experts + 2 * E + e, mask=e < E, other=2**30)
    earlier = ends <= tile
    expert = tl.sum(earlier.to(tl.int32), axis=0)
    there = expert < E
    first = (tile - tl.max(tl.where(earlier, ends, 0), axis=0)) * ROWS
    place = tl.load(experts + expert, mask=there, other=0)
    count = tl.load(experts + E + expert, mask=there, other=0)
    return expert, place + first, tl.where(there, count - first, 0)


@triton.jit
def tile_hidden(
    x, gate_up, experts, order, hidden, gate_scale, limit, up_shift, E: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """``hidden`` [pairs, f], in sorted order: silu(gate.x) * (up.x). Grid [tiles, ceil(f/COLS)]."""
    expert, place, count = tile_of(experts, tl.program_id(0), E, EP, ROWS)
    if count > 0:
        n, col = tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
        pair = tl.load(order + place + n, mask=n < count, other=0)
        rows = x + (pair // TOP_K).to(tl.int64)[:, None] * WIDTH
        weights = gate_up + (expert.to(tl.int64) * 2 * INNER + col)[None, :] * WIDTH
        gate, up = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, WIDTH, DEPTH):
            d = start + tl.arange(0, DEPTH)
            row = tl.load(rows + d[None, :], mask=(n < count)[:, None] & (d < WIDTH)[None, :], other=0.0)
            inside = (d < WIDTH)[:, None] & (col < INNER)[None, :]
            gate += product(row, tl.load(weights + d[:, None], mask=inside, other=0.0))
            up += product(row, tl.load(weights + INNER * WIDTH + d[:, None], mask=inside, other=0.0))
        out = hidden + (place + n).to(tl.int64)[:, None] * INNER + col[None, :]
        value = swiglu(gate, up, gate_scale, limit, up_shift)
        tl.store(out, narrow(value, hidden.dtype.element_ty), mask=(n < count)[:, None] & (col < INNER)[None, :])


@triton.jit
def tile_output(
    down, experts, order, hidden, products, E: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``products`` [pairs, d], in the pairs' own order: down.hidden. Grid [tiles, ceil(d/COLS)]."""
    expert, place, count = tile_of(experts, tl.program_id(0), E, EP, ROWS)
    if count > 0:
        n, col = tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
        rows = hidden + (place + n).to(tl.int64)[:, None] * INNER
        weights = down + (expert.to(tl.int64) * WIDTH + col)[None, :] * INNER
        total = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, INNER, DEPTH):
            f = start + tl.arange(0, DEPTH)
            row = tl.load(rows + f[None, :], mask=(n < count)[:, None] & (f < INNER)[None, :], other=0.0)
            total += product(row, tl.load(weights + f[:, None], mask=(f < INNER)[:, None] & (col < WIDTH)[None, :], other=0.0))
        pair = tl.load(order + place + n, mask=n < count, other=0).to(tl.int64)
        out = products + pair[:, None] * WIDTH + col[None, :]
        tl.store(out, narrow(total, products.dtype.element_ty), mask=(n < count)[:, None] & (col < WIDTH)[None, :])


@triton.jit
def expert_sum(
    ids, weights, products, out, E: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """The weighted sum of a token's products, in the order of its slots. Grid [T, ceil(d/COLS)]."""
    token, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for slot in range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair)
        there = (expert >= 0) & (expert < E)
        one = tl.load(products + pair * WIDTH + col, mask=there & (col < WIDTH), other=0.0).to(tl.float32)
        total += tl.where(there, one * tl.load(weights + pair), 0.0)
    tl.store(out + token * WIDTH + col, narrow(total, out.dtype.element_ty), mask=col < WIDTH)
