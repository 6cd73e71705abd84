"""RoutedAttention for few tokens as Triton kernels (``plugins/launch/routing.py`` names their arguments and constants).

One token has too few rows to fill a GPU: its kept blocks are split among programs, whose partial results (maximum, sum, output)
are merged by log-sum-exp in a second kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bilevel.plugins.kernels.attention import LOG2_E, absorb
from bilevel.plugins.kernels.order import narrow, product
from bilevel.plugins.kernels.routes import horizon_of


@triton.jit(do_not_specialize=["length", "capacity"])
def attention_split(
    q, k, v, routes, past_len, new_len, partial, statistics, length, capacity, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, HS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, PER_BLOCK: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One group of heads of one token over SPLIT slots of its route. Grid [SPLITS, GROUPS, B*L].

    Writes ``partial`` fp32 [B, L, HQ, SPLITS, DV], not yet divided by the sum, and ``statistics`` fp32 [B, L, HQ, SPLITS, 2]:
    the largest score (base 2) and the sum.
    """
    split, p, line = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    GP: tl.constexpr = HQ // GROUPS
    STEPS: tl.constexpr = (BLOCK + COLS - 1) // COLS
    AT_ONCE: tl.constexpr = COLS // PER_BLOCK
    b, i = line // length, (line % length).to(tl.int32)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    row, d, c, slot = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, COLS), tl.arange(0, KP)
    inside = (row < GP)[:, None] & (d < D)[None, :]
    query = tl.load(q + ((b * HQ + p * GP + row) * length + i)[:, None] * D + d[None, :], mask=inside, other=0.0)
    horizon = horizon_of(i, past, new, CAUSAL)
    route = routes + ((b * HS + p * HS // GROUPS) * length + i) * K
    all_blocks = tl.load(route + slot, mask=slot < K, other=-1)
    kv = (b * HKV + p * HKV // GROUPS) * capacity
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DP], tl.float32)
    for step in range(tl.where(horizon > 0, (SPLIT + AT_ONCE - 1) // AT_ONCE * STEPS, 0)):
        item = split * SPLIT + step // STEPS * AT_ONCE + c // PER_BLOCK
        offset = step % STEPS * COLS + c % PER_BLOCK
        listed = item < tl.minimum(K, (split + 1) * SPLIT)
        block = tl.load(route + item, mask=listed, other=-1)
        # A route is a set: of equal slots the first counts.
        again = tl.max(((all_blocks[None, :] == block[:, None]) & (slot[None, :] < item[:, None])).to(tl.int32), axis=1)
        usable = listed & (again == 0) & (block >= 0) & (block < capacity // BLOCK) & (offset < BLOCK)
        token = tl.where(usable, block, 0) * BLOCK + offset
        valid = usable & (token < horizon)
        place = (kv + token.to(tl.int64))[:, None]
        key = tl.load(k + place * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        value = tl.load(v + place * DV + d[None, :], mask=valid[:, None] & (d < DV)[None, :], other=0.0)
        score = tl.where(valid[None, :], product(query, tl.trans(key)) * (scale * LOG2_E), float("-inf"))
        most, total, result = absorb(score, value, most, total, result)
    at = ((line * HQ + p * GP + row) * SPLITS + split)[:, None]
    tl.store(partial + at * DV + d[None, :], result, mask=(row < GP)[:, None] & (d < DV)[None, :])
    which = tl.arange(0, 2)[None, :]
    tl.store(statistics + at * 2 + which, tl.where(which == 0, most[:, None], total[:, None]), mask=(row < GP)[:, None])


@triton.jit(do_not_specialize=["length", "capacity"])
def attention_merge(
    routes, past_len, new_len, partial, statistics, out, length, capacity,
    HQ: tl.constexpr, HS: tl.constexpr, DV: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    SPLITS: tl.constexpr, COLS: tl.constexpr, SP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One head's output from its splits, COLS at a time. Grid [HQ, B*L]."""
    h, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, i = line // length, (line % length).to(tl.int32)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    horizon = horizon_of(i, past, new, CAUSAL)
    d, slot, n = tl.arange(0, DP), tl.arange(0, KP), tl.arange(0, SP)
    block = tl.load(routes + ((b * HS + h * HS // HQ) * length + i) * K + slot, mask=slot < K, other=-1)
    inside = (block >= 0) & (block < capacity // BLOCK)
    seen = tl.max((inside & (tl.where(inside, block, 0) * BLOCK < horizon)).to(tl.int32), axis=0)
    base = (line * HQ + h) * SPLITS
    most = tl.load(statistics + (base + n) * 2, mask=n < SPLITS, other=float("-inf"))
    highest = tl.max(most, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    sums = tl.load(statistics + (base + n) * 2 + 1, mask=n < SPLITS, other=0.0)
    total = tl.sum(tl.exp2(most - shift) * sums, axis=0)
    result = tl.zeros([DP], tl.float32)
    for first in range(0, SPLITS, COLS):
        m = first + tl.arange(0, COLS)
        fade = tl.exp2(tl.load(statistics + (base + m) * 2, mask=m < SPLITS, other=float("-inf")) - shift)
        here = (m < SPLITS)[:, None] & (d < DV)[None, :]
        part = tl.load(partial + (base + m)[:, None] * DV + d[None, :], mask=here, other=0.0)
        result += tl.sum(part * fade[:, None], axis=0)
    result = tl.where(seen > 0, result / total, 0.0)
    at = ((b * HQ + h) * length + i) * DV + d
    tl.store(out + at, narrow(result, out.dtype.element_ty), mask=d < DV)
