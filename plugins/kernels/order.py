"""What the routing kernels share (Triton): the normative order as one integer, keeping the K best, writing a route.

A score and its index become one int64 key, the score's bits (made to order as integers) above the inverted index, so that
"score descending, index ascending" is the order of integers and the better of two is their maximum. A forced block has a key
above every score, a block that is never selected the lowest of all.

Kernels that call these functions hold a position's choice in ``best`` [rows, KP]: KP is K rounded up to a power of two, the
slots beyond K stay FULL. Nothing here depends on the order of the slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NEVER = tl.constexpr(-(2**63))  # the key of what is not selected
LOWEST = tl.constexpr(-(2**63) + 2**32)  # below the key of every score, above NEVER and the markers of free slots
FULL = tl.constexpr(2**63 - 1)  # the content of slots beyond K
FORCED = tl.constexpr(0x7FFFFFFF << 32)  # a forced block's score; the largest finite number gives 0x7F7FFFFF
LAST = tl.constexpr(0x7FFFFFFF)  # indices are below this, and inverted by an exclusive or with it
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def product(a, b):
    """a @ b, accumulated in fp32; fp32 operands are not rounded to TF32."""
    if INTERPRETED:  # Triton's interpreter holds bfloat16 as bit patterns and would multiply those; widening is exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 in another float type, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter would cut the lower bits off
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # noqa: PLR0124 (NaN)
    return x.to(DTYPE)


@triton.jit
def rank(score, index):
    """int64 keys of fp32 scores and int32 indices of the same shape: NaN is -inf, +inf the largest finite number, -0 is 0."""
    score = tl.where(score == score, score, float("-inf"))  # noqa: PLR0124 (NaN)
    score = tl.where(score > FLOAT_MAX, FLOAT_MAX, score)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # two's complement in place of sign and magnitude
    key = (ordered.to(tl.int64) << 32) | (index ^ LAST).to(tl.int64)
    return tl.where(score == float("-inf"), NEVER, key)


@triton.jit
def forced_rank(index):
    """The keys of forced blocks: above every score."""
    return (index ^ LAST).to(tl.int64) | FORCED


@triton.jit
def index_of(key):
    """The index that a key holds."""
    return ((key & 0xFFFFFFFF) ^ LAST).to(tl.int32)


@triton.jit
def no_choice(ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """``best`` before anything is kept. Free slots differ from one another, so that the least of a row is one slot."""
    slot = tl.arange(0, KP)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return tl.where(slot < K, slot.to(tl.int64) + NEVER, FULL)


@triton.jit
def keep_best(best, keys, MAY_REPEAT: tl.constexpr):
    """``best`` [R, KP] after ``keys`` [R, C]: the best key takes the place of the least that is kept, while it is better.

    MAY_REPEAT: an index may come more than once; it is kept once.
    """
    top = tl.max(keys, axis=1)
    least = tl.min(best, axis=1)
    better = top > least
    while tl.max(better.to(tl.int32), axis=0) > 0:
        replaced = better[:, None] & (best == least[:, None])
        if MAY_REPEAT:
            same = (best & 0xFFFFFFFF) == (top & 0xFFFFFFFF)[:, None]
            known = tl.max((same & (best > LOWEST)).to(tl.int32), axis=1) > 0
            replaced = replaced & (known == 0)[:, None]
            keys = tl.where((keys & 0xFFFFFFFF) == (top & 0xFFFFFFFF)[:, None], NEVER, keys)
        else:
            keys = tl.where(keys == top[:, None], NEVER, keys)
        best = tl.where(replaced, top[:, None], best)
        top = tl.max(keys, axis=1)
        least = tl.min(best, axis=1)
        better = top > least
    return best


@triton.jit
def drop_scored(best, K: tl.constexpr, SCORED_K: tl.constexpr):
    """``best`` [R, KP] with the least of the scored ones let go until SCORED_K of them are left; forced ones stay."""
    if SCORED_K < K:
        scored = (best > LOWEST) & (best < FORCED)
        many = tl.sum(scored.to(tl.int32), axis=1) > SCORED_K
        while tl.max(many.to(tl.int32), axis=0) > 0:
            least = tl.min(tl.where(scored, best, FULL), axis=1)
            best = tl.where(many[:, None] & (best == least[:, None]), NEVER, best)
            scored = (best > LOWEST) & (best < FORCED)
            many = tl.sum(scored.to(tl.int32), axis=1) > SCORED_K
    return best


@triton.jit
def ascending(best, ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """The kept indices int32 [ROWS, KP] in ascending order, -1 behind them."""
    slot = tl.arange(0, KP)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    left = tl.where((slot < K) & (best > LOWEST), index_of(best), LAST)
    route = tl.full([ROWS, KP], -1, tl.int32)
    for n in range(K):
        least = tl.min(left, axis=1)[:, None]
        route = tl.where((slot == n) & (least < LAST), least, route)
        left = tl.where(left == least, LAST, left)
    return route
