"""SelectBlocks, CoarseRoute and FineRoute as Triton kernels; ``plugins/launch/launches.py`` says with what arguments and
constants they run.

Scores that a kernel computes never reach memory: a program streams over the blocks, or over its candidates, and keeps the K
best of what it has seen (``order``). Letters as in the contract. A choice (selection head) s sums HR/HS route heads, which
read KEY_HEADS key heads, SUMMED route heads each; heads that read one key are summed first (q1.k + q2.k = (q1 + q2).k),
except where that would cost the tensor cores: sums of 16-bit queries have no 16-bit form.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bilevel.plugins.kernels.order import (
    LOWEST,
    NEVER,
    ascending,
    drop_scored,
    forced_rank,
    keep_best,
    no_choice,
    product,
    rank,
)


@triton.jit
def is_forced(block, own, horizon, BLOCK: tl.constexpr, K: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr):
    """Whether a block is kept whatever its score; where K is too small, own and recent blocks win over the first ones.

    INIT and LOCAL are at most K.
    """
    local = (block <= own) & (block > own - LOCAL)
    room = tl.where(block < own, K - LOCAL, K)
    first = (block < INIT) & (block < room) & (block * BLOCK < horizon)
    return local | first


@triton.jit
def horizon_of(i, past, new, CAUSAL: tl.constexpr):
    """How many tokens position i of the call may see; 0 for a row at or beyond new_len."""
    if CAUSAL:
        seen = past + i + 1
    else:
        seen = past + new
    return tl.where(i < new, seen, 0)


@triton.jit(do_not_specialize=["length", "units"])
def coarse_route_tiles(
    query, unit_key, past_len, new_len, routes, length, units,
    HR: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, DR: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr, KEY_HEADS: tl.constexpr, SUMMED: tl.constexpr,
    SUM_FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Many tokens: ROWS positions against tiles of COLS blocks. Grid [ceil(L/ROWS), HS, B]."""
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < tl.minimum(new, length)
    horizon = horizon_of(i, past, new, CAUSAL)
    own = (past + i) // BLOCK
    best = no_choice(ROWS, K, KP)
    visible = tl.minimum(tl.where(live, (horizon + BLOCK - 1) // BLOCK, 0), units)  # whatever past_len says
    for first in range(0, tl.max(visible, axis=0), COLS):
        block = first + tl.arange(0, COLS)
        there = block < units
        score = tl.zeros([ROWS, COLS], tl.float32)
        for n in range(KEY_HEADS):
            route_head = s * (HR // HS) + n * SUMMED
            keys = unit_key + (b * HK + route_head * HK // HR) * units * DR + block.to(tl.int64)[None, :] * DR
            rows = query + ((b * HR + route_head) * length + i.to(tl.int64))[:, None] * DR
            for start in range(0, DR, DEPTH):
                d = start + tl.arange(0, DEPTH)
                key = tl.load(keys + d[:, None], mask=(d < DR)[:, None] & there[None, :], other=0.0)
                inside = live[:, None] & (d < DR)[None, :]
                if SUM_FIRST:
                    total = tl.zeros([ROWS, DEPTH], tl.float32)
                    for m in range(SUMMED):
                        total += tl.load(rows + m * length.to(tl.int64) * DR + d[None, :], mask=inside, other=0.0).to(
                            tl.float32
                        )
                    score += product(total, key.to(tl.float32))
                else:
                    for m in range(SUMMED):
                        part = tl.load(rows + m * length.to(tl.int64) * DR + d[None, :], mask=inside, other=0.0)
                        score += product(part, key)
        complete = there[None, :] & ((block + 1)[None, :] * BLOCK <= horizon[:, None])
        forced = (
            is_forced(block[None, :], own[:, None], horizon[:, None], BLOCK, K, INIT, LOCAL) & live[:, None] & there[None, :]
        )
        index = block[None, :] + tl.zeros([ROWS, 1], tl.int32)
        ranks = tl.where(forced, forced_rank(index), tl.where(complete, rank(score, index), NEVER))
        best = keep_best(best, ranks, False)
    slot = tl.arange(0, KP)
    out = routes + ((b * HS + s) * length + i.to(tl.int64))[:, None] * K + slot[None, :]
    tl.store(out, ascending(best, ROWS, K, KP), mask=(i < length)[:, None] & (slot < K)[None, :])


@triton.jit
def score_blocks(
    query, unit_key, b, s, i, length, units, block, there,
    HR: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, DR: tl.constexpr, KEY_HEADS: tl.constexpr, SUMMED: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """fp32 scores [1, COLS] of any ``block`` [COLS] for position i and choice s; ``there``: which ones to read."""
    score = tl.zeros([COLS], tl.float32)
    for n in range(KEY_HEADS):
        route_head = s * (HR // HS) + n * SUMMED
        keys = unit_key + (b * HK + route_head * HK // HR) * units * DR + block.to(tl.int64)[:, None] * DR
        row = query + ((b * HR + route_head) * length + i) * DR
        for start in range(0, DR, DEPTH):
            d = start + tl.arange(0, DEPTH)
            total = tl.zeros([DEPTH], tl.float32)
            for m in range(SUMMED):
                total += tl.load(row + m * length.to(tl.int64) * DR + d, mask=d < DR, other=0.0).to(tl.float32)
            key = tl.load(keys + d[None, :], mask=there[:, None] & (d < DR)[None, :], other=0.0).to(tl.float32)
            score += tl.sum(key * total[None, :], axis=1)
    return score[None, :]


@triton.jit(do_not_specialize=["length", "units", "splits"])
def coarse_route_split(
    query, unit_key, past_len, new_len, ranks, length, units, splits,
    HR: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, DR: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr, KEY_HEADS: tl.constexpr, SUMMED: tl.constexpr,
    UNITS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Few tokens: the best K keys of UNITS blocks, to ``ranks`` int64 [B, HS, L, splits, K]. Grid [splits, HS, B*L].

    UNITS is a multiple of COLS.
    """
    split, s, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, i = row // length, (row % length).to(tl.int32)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    horizon = horizon_of(i, past, new, CAUSAL)
    own = (past + i) // BLOCK
    best = no_choice(1, K, KP)
    for first in range(split * UNITS, tl.minimum((split + 1) * UNITS, (horizon + BLOCK - 1) // BLOCK), COLS):
        block = first + tl.arange(0, COLS)
        complete = (block < units) & ((block + 1) * BLOCK <= horizon)
        score = score_blocks(
            query, unit_key, b, s, i, length, units, block, complete, HR, HK, HS, DR, KEY_HEADS, SUMMED, COLS, DEPTH
        )
        scored = tl.where(complete[None, :], rank(score, block[None, :]), NEVER)
        forced = is_forced(block, own, horizon, BLOCK, K, INIT, LOCAL) & (block < units)
        best = keep_best(best, tl.where(forced[None, :], forced_rank(block[None, :]), scored), False)
    slot = tl.arange(0, KP)[None, :]
    out = ranks + (((b * HS + s) * length + i) * splits + split) * K + slot
    tl.store(out, tl.where(best > LOWEST, best, NEVER), mask=slot < K)


@triton.jit(do_not_specialize=["length", "splits"])
def coarse_route_merge(
    ranks, routes, length, splits,
    HS: tl.constexpr, K: tl.constexpr, SCORED_K: tl.constexpr, COLS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The K best of all splits, at most SCORED_K of them for their score, written as routes. Grid [L, HS, B]."""
    i, s, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (b * HS + s) * length + i
    best = no_choice(1, K, KP)
    for first in range(0, splits * K, COLS):
        at = first + tl.arange(0, COLS)[None, :]
        keys = tl.load(ranks + row * splits * K + at, mask=at < splits * K, other=NEVER)
        best = keep_best(best, keys, False)
    best = drop_scored(best, K, SCORED_K)
    slot = tl.arange(0, KP)[None, :]
    tl.store(routes + row * K + slot, ascending(best, 1, K, KP), mask=slot < K)


@triton.jit
def is_kept(
    block, own, horizon, BLOCK: tl.constexpr, K: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PARTIAL: tl.constexpr
):
    """``is_forced``, and where PARTIAL is 2 the block that the horizon cuts; where that is not the own block which LOCAL forces
    anyway, it takes one slot for itself."""
    if PARTIAL == 2:
        cut = horizon // BLOCK
        is_cut = horizon % BLOCK != 0
        apart = is_cut & ((cut > own) | (LOCAL == 0))
        topk = tl.where(apart, K - 1, K)
        kept = ((block == cut) & is_cut) | is_forced(block, own, horizon, BLOCK, topk, INIT, tl.minimum(topk, LOCAL))
    else:
        kept = is_forced(block, own, horizon, BLOCK, K, INIT, LOCAL)
    return kept


@triton.jit
def score_ranks(
    score, block, own, horizon, units,
    K: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """int64 keys [R, C] of given scores [R, C]. block: [1, C]; own, horizon: [R, 1], horizon 0 where the row is idle."""
    there = (block < units) & (horizon > 0)
    index = block + tl.zeros_like(own)
    needed = 1 if PARTIAL == 1 else BLOCK
    scored = tl.where(there & (block * BLOCK + needed <= horizon), rank(score, index), NEVER)
    return tl.where(is_kept(block, own, horizon, BLOCK, K, INIT, LOCAL, PARTIAL) & there, forced_rank(index), scored)


@triton.jit(do_not_specialize=["length", "units"])
def select_blocks_tiles(
    scores, past_len, new_len, routes, length, units,
    HS: tl.constexpr, K: tl.constexpr, SCORED_K: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    PARTIAL: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Many tokens: ROWS positions, COLS scores at a time. Grid [ceil(L/ROWS), HS, B]."""
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    horizon = horizon_of(i, past, new, CAUSAL)[:, None]
    own = ((past + i) // BLOCK)[:, None]
    best = no_choice(ROWS, K, KP)
    rows = ((b * HS + s) * length + i.to(tl.int64))[:, None]
    for first in range(0, tl.minimum((tl.max(horizon) + BLOCK - 1) // BLOCK, units), COLS):
        block = first + tl.arange(0, COLS)[None, :]
        score = tl.load(scores + rows * units + block, mask=(i < length)[:, None] & (block < units), other=0.0)
        best = keep_best(best, score_ranks(score, block, own, horizon, units, K, BLOCK, INIT, LOCAL, PARTIAL), False)
    best = drop_scored(best, K, SCORED_K)
    slot = tl.arange(0, KP)[None, :]
    tl.store(routes + rows * K + slot, ascending(best, ROWS, K, KP), mask=(i < length)[:, None] & (slot < K))


@triton.jit(do_not_specialize=["length", "units", "splits"])
def select_blocks_split(
    scores, past_len, new_len, ranks, length, units, splits,
    HS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    PARTIAL: tl.constexpr, CAUSAL: tl.constexpr, UNITS: tl.constexpr, COLS: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Few tokens: the best K keys of UNITS scores, as ``coarse_route_split`` does it. Grid [splits, HS, B*L]."""
    split, s, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, i = row // length, (row % length).to(tl.int32)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    horizon = horizon_of(i, past, new, CAUSAL)
    own = (past + i) // BLOCK
    best = no_choice(1, K, KP)
    place = (b * HS + s) * length + i
    ends = tl.minimum((horizon + BLOCK - 1) // BLOCK, units)
    for first in range(split * UNITS, tl.minimum((split + 1) * UNITS, ends), COLS):
        block = first + tl.arange(0, COLS)[None, :]
        score = tl.load(scores + place * units + block, mask=block < units, other=0.0)
        one = tl.zeros([1, 1], tl.int32)
        keys = score_ranks(score, block, own + one, horizon + one, units, K, BLOCK, INIT, LOCAL, PARTIAL)
        best = keep_best(best, keys, False)
    slot = tl.arange(0, KP)[None, :]
    tl.store(ranks + (place * splits + split) * K + slot, tl.where(best > LOWEST, best, NEVER), mask=slot < K)


@triton.jit(do_not_specialize=["length", "units"])
def fine_route_rows(
    query, unit_key, candidates, past_len, new_len, routes, length, units,
    HR: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, HC: tl.constexpr, DR: tl.constexpr, K1: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_HEADS: tl.constexpr, SUMMED: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, KP: tl.constexpr,
    FP: tl.constexpr,
):  # fmt: skip
    """One position: its forced blocks, then its candidates, COLS at a time. Grid [L, HS, B].

    FP: a power of two that holds the LOCAL and the INIT blocks.
    """
    i, s, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    horizon = horizon_of(i, past, new, CAUSAL)
    own = (past + i) // BLOCK
    n = tl.arange(0, FP)
    always = tl.where(n < LOCAL, own - n, n - LOCAL)
    forced = (always >= 0) & (always < units) & is_forced(always, own, horizon, BLOCK, K, INIT, LOCAL) & (i < new)
    best = no_choice(1, K, KP)
    best = keep_best(best, tl.where(forced, forced_rank(always), NEVER)[None, :], True)
    listed = candidates + ((b * HC + s * HC // HS) * length + i) * K1
    for first in range(0, tl.where(i < new, K1, 0), COLS):
        at = first + tl.arange(0, COLS)
        block = tl.load(listed + at, mask=at < K1, other=-1)
        complete = (block >= 0) & (block < units) & (block < horizon // BLOCK)
        score = score_blocks(
            query, unit_key, b, s, i, length, units, block, complete, HR, HK, HS, DR, KEY_HEADS, SUMMED, COLS, DEPTH
        )
        usable = complete & (is_forced(block, own, horizon, BLOCK, K, INIT, LOCAL) == 0)
        best = keep_best(best, tl.where(usable[None, :], rank(score, block[None, :]), NEVER), True)
    slot = tl.arange(0, KP)[None, :]
    out = routes + ((b * HS + s) * length + i) * K + slot
    tl.store(out, ascending(best, 1, K, KP), mask=slot < K)
