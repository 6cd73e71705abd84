"""RoutedAttention for many tokens as Triton kernels (``plugins/launch/routing.py`` names their arguments and constants).

The query heads that share a key/value head and a choice (a group of GP heads) are packed into the rows of a tile: TOKENS
positions times GP heads. ``attention_plan`` lists, for each tile of positions and each choice, the blocks that some position of
the tile kept, each with a bit per position; ``attention_tiles`` reads those blocks only. Softmax and sums in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bilevel.plugins.kernels.order import LAST, narrow, product
from bilevel.plugins.kernels.routes import horizon_of

LOG2_E = tl.constexpr(1.4426950408889634)  # softmax in powers of two, which the hardware has


@triton.jit(do_not_specialize=["length", "capacity", "slots"])
def attention_plan(
    routes, past_len, new_len, blocks, bits, length, capacity, slots,
    HS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, TOKENS: tl.constexpr,
    TOKENS_P: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The union of a tile's routes, ascending. Grid [ceil(L/TOKENS), HS, B].

    ``blocks`` int32 and ``bits`` int32 or int64, both [B, HS, tiles, slots]: slot 0 holds the number of blocks and the bits of
    the positions that see any token, the slots behind it a block and the bits of the positions that read it.
    """
    tile, s, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    t = tl.arange(0, TOKENS_P)
    i = tile * TOKENS + t
    slot = tl.arange(0, KP)
    live = (t < TOKENS) & (i < tl.minimum(new, length))
    row = ((b * HS + s) * length + i.to(tl.int64))[:, None] * K
    route = tl.load(routes + row + slot[None, :], mask=live[:, None] & (slot < K)[None, :], other=-1)
    horizon = horizon_of(i, past, new, CAUSAL)
    inside = (route >= 0) & (route < capacity // BLOCK)
    # The product cannot overflow: a route inside the cache is below capacity / BLOCK.
    route = tl.where(inside & (tl.where(inside, route, 0) * BLOCK < horizon[:, None]), route, LAST)
    seen = tl.min(route, axis=1) < LAST
    bit = tl.full([TOKENS_P], 1, bits.dtype.element_ty) << t.to(bits.dtype.element_ty)
    base = ((b * HS + s) * tl.num_programs(0) + tile) * slots
    count = 0
    least = tl.min(tl.min(route, axis=1), axis=0)
    while least < LAST:
        hit = route == least
        reads = tl.max(hit.to(tl.int32), axis=1) > 0
        count += 1
        tl.store(blocks + base + count, least)
        tl.store(bits + base + count, tl.sum(tl.where(reads, bit, 0), axis=0))
        route = tl.where(hit, LAST, route)
        least = tl.min(tl.min(route, axis=1), axis=0)
    tl.store(blocks + base, count)
    tl.store(bits + base, tl.sum(tl.where(seen, bit, 0), axis=0))


@triton.jit
def absorb(score, value, most, total, out):
    """Online softmax (base 2): one more tile of scores [R, C] and values [C, D] into the running maximum, sum and output.

    A score of -inf has no weight. Rows that have seen nothing else keep the maximum -inf, the sum 0 and the output 0.
    """
    highest = tl.maximum(most, tl.max(score, axis=1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(score - shift[:, None])
    fade = tl.exp2(most - shift)
    out = out * fade[:, None] + product(narrow(weight, value.dtype), value)
    return highest, total * fade + tl.sum(weight, axis=1), out


@triton.jit
def read_blocks(
    query, k, v, blocks, bits, base, kv, count, last, horizon, t, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PER_BLOCK: tl.constexpr, DP: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(largest score, sum, output not yet divided) of a tile's rows over its listed blocks.

    What a row does not read has the weight 0, and 0 * NaN is NaN. CAREFUL: values that are not finite are left out of the
    products, and added to the rows that do read them.
    """
    STEPS: tl.constexpr = (BLOCK + COLS - 1) // COLS
    AT_ONCE: tl.constexpr = COLS // PER_BLOCK
    d, c = tl.arange(0, DP), tl.arange(0, COLS)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DP], tl.float32)
    for step in range((count + AT_ONCE - 1) // AT_ONCE * STEPS):
        item = step // STEPS * AT_ONCE + c // PER_BLOCK
        offset = step % STEPS * COLS + c % PER_BLOCK
        listed = item < count
        block = tl.load(blocks + base + 1 + item, mask=listed, other=0)
        readers = tl.load(bits + base + 1 + item, mask=listed, other=0)
        token = block * BLOCK + offset
        valid = listed & (offset < BLOCK) & (token < last)
        place = (kv + token.to(tl.int64))[:, None]
        key = tl.load(k + place * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        value = tl.load(v + place * DV + d[None, :], mask=valid[:, None] & (d < DV)[None, :], other=0.0)
        reads = ((readers[None, :] >> t[:, None]) & 1) != 0
        reads = reads & valid[None, :] & (token[None, :] < horizon[:, None])
        score = tl.where(reads, product(query, tl.trans(key)) * (scale * LOG2_E), float("-inf"))
        if CAREFUL:
            wide = value.to(tl.float32)
            is_number = tl.abs(wide) < float("inf")
            most, total, result = absorb(score, tl.where(is_number, value, tl.zeros_like(value)), most, total, result)
            for n in range(COLS):
                odd = tl.sum(tl.where((c == n)[:, None] & (is_number == 0), wide, 0.0), axis=0)
                is_read = tl.max((reads & (c == n)[None, :]).to(tl.int32), axis=1) > 0
                result += tl.where(is_read[:, None], odd[None, :], 0.0)
        else:
            most, total, result = absorb(score, value, most, total, result)
    return most, total, result


@triton.jit(do_not_specialize=["length", "capacity", "slots"])
def attention_tiles(
    q, k, v, past_len, new_len, blocks, bits, out, length, capacity, slots, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, HS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PER_BLOCK: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of rows (position-major, GP heads each) over its listed blocks. Grid [ceil(L/TOKENS), GROUPS, B].

    A step takes COLS keys: COLS/PER_BLOCK blocks of up to PER_BLOCK tokens, or the COLS next tokens of one larger block.
    """
    tile, p, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    GP: tl.constexpr = HQ // GROUPS
    past, new = tl.load(past_len + b), tl.load(new_len + b)
    row, d = tl.arange(0, ROWS), tl.arange(0, DP)
    t = row // GP
    i = tile * TOKENS + t
    used = (t < TOKENS) & (i < length)
    at = ((b * HQ + p * GP + row % GP) * length + i.to(tl.int64))[:, None]
    query = tl.load(q + at * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
    horizon = horizon_of(i, past, new, CAUSAL)
    last = tl.max(tl.where(used, horizon, 0), axis=0)
    base = ((b * HS + p * HS // GROUPS) * tl.num_programs(0) + tile) * slots
    count, seen = tl.load(blocks + base), tl.load(bits + base)
    t = tl.where(t < TOKENS, t, 0).to(seen.dtype)
    kv = (b * HKV + p * HKV // GROUPS) * capacity
    _, total, result = read_blocks(
        query, k, v, blocks, bits, base, kv, count, last, horizon, t, scale, D, DV, BLOCK, ROWS, COLS, PER_BLOCK, DP, False
    )  # fmt: skip
    # Something that is no number was read, or multiplied by a weight of 0. (One reduction: of two, one after the other,
    # Triton 3.7 fails to lay out the accumulator for sm_100.)
    if tl.max(((result * 0.0) != 0.0).to(tl.int32)) > 0:
        _, total, result = read_blocks(
            query, k, v, blocks, bits, base, kv, count, last, horizon, t, scale, D, DV, BLOCK, ROWS, COLS, PER_BLOCK, DP, True
        )  # fmt: skip
    # A row whose scores are all -inf is 0/0, as in any softmax; a row without a token is 0.
    result = tl.where((((seen >> t) & 1) != 0)[:, None], result / total[:, None], 0.0)
    here = used[:, None] & (d < DV)[None, :]
    tl.store(out + at * DV + d[None, :], narrow(result, out.dtype.element_ty), mask=here)
