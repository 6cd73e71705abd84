"""ExpertRoute and RoutedExperts as Triton kernels (``plugins/launch/experts.py`` names their arguments and constants).

RoutedExperts has two forms. Few tokens: each chosen (token, expert) pair reads its expert's weights (``pair_hidden``,
``pair_output``). Many tokens: a counting sort of the pairs by expert (``expert_count``, ``expert_offsets``, ``expert_order``),
tiles of rows of one expert (``tile_hidden``, ``tile_output``) and the weighted sum back (``expert_sum``). Nothing is added
atomically: results do not depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bilevel.plugins.kernels.order import LOWEST, NEVER, index_of, narrow, rank


@triton.jit
def scores_of(logits, FUNC: tl.constexpr):
    """0: sigmoid; 1: softmax over all of a 2-D tile whose unused places hold -inf; 2: sqrt(log(1 + e^x))."""
    if FUNC == 0:
        result = 1.0 / (1.0 + tl.exp(-logits))
    elif FUNC == 2:
        power = tl.exp(-tl.abs(logits))
        # log(1 + p) = 2 artanh(s), s = p / (2 + p) <= 1/3: exact where a hardware's logarithm near 1 is not.
        s = power / (2.0 + power)
        square = s * s
        series = 1.0 / 13.0 + square / 15.0
        for n in tl.static_range(6):
            series = 1.0 / (11.0 - 2.0 * n) + square * series
        softplus = tl.where(logits > 0.0, logits, 0.0) + 2.0 * s * series
        root = tl.sqrt(tl.where(logits == logits, softplus, logits))  # noqa: PLR0124 (NaN)
        result = tl.where(logits < -20.0, tl.exp(0.5 * logits), root)  # where e^x underflows, its root does not
    else:
        largest = tl.max(tl.max(logits, axis=1), axis=0)
        power = tl.exp(logits - largest)
        result = power / tl.sum(tl.sum(power, axis=1), axis=0)
    return result


@triton.jit
def group_ranks(
    choice, group_logits, token, E: tl.constexpr, GROUPS: tl.constexpr, SCORE: tl.constexpr, GP: tl.constexpr
):  # fmt: skip
    """int64 keys [GP] of the groups. choice: keys [GP, SP] of the experts. SCORE: 0 best, 1 two best summed, 2 group_logits."""
    g = tl.arange(0, GP)
    if SCORE == 2:
        value = tl.load(group_logits + token * GROUPS + g, mask=g < GROUPS, other=float("-inf"))
    else:
        best = tl.max(choice, axis=1)
        value = score_of(best)
        if SCORE == 1 and E // GROUPS > 1:
            value += score_of(tl.max(tl.where(choice == best[:, None], NEVER, choice), axis=1))
    return tl.where(g < GROUPS, rank(value, g), NEVER)


@triton.jit
def score_of(key):
    """The fp32 score in a key (the inverse of ``rank``); -inf for what is never selected."""
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(key > LOWEST, bits.to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def expert_route_rows(
    logits, group_logits, select_bias, ids, weights, scale, norm_floor,
    E: tl.constexpr, GROUPS: tl.constexpr, TOP_K: tl.constexpr, TOP_GROUPS: tl.constexpr, FUNC: tl.constexpr,
    SCORE: tl.constexpr, NORMALIZE: tl.constexpr, ZERO_FILL: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One token: groups first, then experts inside them, best first. Grid [T]."""
    token = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // GROUPS
    g, n = tl.arange(0, GP)[:, None], tl.arange(0, SP)[None, :]
    expert = g * SIZE + n
    there = (g < GROUPS) & (n < SIZE)
    score = scores_of(tl.load(logits + token * E + expert, mask=there, other=float("-inf")), FUNC)
    bias = tl.load(select_bias + expert, mask=there, other=0.0)
    choice = tl.where(there, rank(score + bias, expert), NEVER)
    group = group_ranks(choice, group_logits, token, E, GROUPS, SCORE, GP)
    kept = tl.zeros([GP], tl.int32)
    for _ in range(TOP_GROUPS):
        best = tl.max(group, axis=0)
        kept = tl.where((group == best) & (best > LOWEST), 1, kept)
        group = tl.where(group == best, NEVER, group)
    dropped = tl.full([GP, SP], NEVER, tl.int64)
    if ZERO_FILL:
        dropped = tl.where(choice > LOWEST, rank(tl.zeros([GP, SP], tl.float32), expert), NEVER)
    choice = tl.where(kept[:, None] > 0, choice, dropped)
    slot = tl.arange(0, KP)
    chosen, weight = tl.full([KP], -1, tl.int32), tl.zeros([KP], tl.float32)
    for k in range(TOP_K):
        best = tl.max(tl.max(choice, axis=1), axis=0)
        one = (choice == best) & (best > LOWEST)
        its_score = tl.sum(tl.sum(tl.where(one, score, 0.0), axis=1), axis=0)
        chosen = tl.where((slot == k) & (best > LOWEST), index_of(best), chosen)
        weight = tl.where(slot == k, its_score, weight)
        choice = tl.where(one, NEVER, choice)
    if NORMALIZE:
        weight = weight / tl.maximum(tl.sum(weight, axis=0) + 1e-20, norm_floor)
    tl.store(ids + token * TOP_K + slot, chosen, mask=slot < TOP_K)
    tl.store(weights + token * TOP_K + slot, weight * scale, mask=slot < TOP_K)


@triton.jit
def swiglu(gate, up, gate_scale, limit, up_shift):
    """RoutedExperts' hidden layer; limit 0: none. NaN stays."""
    bound = tl.where(limit > 0.0, limit, float("inf"))
    gate = tl.where(gate > bound, bound, gate)
    up = tl.where(up > bound, bound, tl.where(up < -bound, -bound, up))
    return gate / (1.0 + tl.exp(-gate_scale * gate)) * (up + up_shift)


@triton.jit
def pair_hidden(
    x, ids, gate_up, hidden, gate_scale, limit, up_shift, E: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    TOP_K: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``hidden`` [T*k, f] of one pair: silu(gate.x) * (up.x). Grid [ceil(f/COLS), T*k]."""
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + pair)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    if (expert >= 0) & (expert < E):
        gate, up = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
        weights = gate_up + (expert.to(tl.int64) * 2 * INNER + col)[:, None] * WIDTH
        for start in range(0, WIDTH, DEPTH):
            d = start + tl.arange(0, DEPTH)
            row = tl.load(x + pair // TOP_K * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
            inside = (col < INNER)[:, None] & (d < WIDTH)[None, :]
            gate += tl.sum(tl.load(weights + d[None, :], mask=inside, other=0.0).to(tl.float32) * row, axis=1)
            other = tl.load(weights + INNER * WIDTH + d[None, :], mask=inside, other=0.0)
            up += tl.sum(other.to(tl.float32) * row, axis=1)
        value = swiglu(gate, up, gate_scale, limit, up_shift)
        tl.store(hidden + pair * INNER + col, narrow(value, hidden.dtype.element_ty), mask=col < INNER)


@triton.jit
def pair_output(
    ids, weights, down, hidden, out, E: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The weighted sum of one token's experts. Grid [ceil(d/COLS), T]."""
    token = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for slot in range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair)
        there = (expert >= 0) & (expert < E)
        one = tl.zeros([COLS], tl.float32)
        rows = down + (tl.where(there, expert, 0).to(tl.int64) * WIDTH + col)[:, None] * INNER
        for start in range(0, tl.where(there, INNER, 0), DEPTH):
            f = start + tl.arange(0, DEPTH)
            row = tl.load(hidden + pair * INNER + f, mask=f < INNER, other=0.0).to(tl.float32)[None, :]
            weight = tl.load(rows + f[None, :], mask=(col < WIDTH)[:, None] & (f < INNER)[None, :], other=0.0)
            one += tl.sum(weight.to(tl.float32) * row, axis=1)
        total += tl.where(there, one * tl.load(weights + pair), 0.0)
    tl.store(out + token * WIDTH + col, narrow(total, out.dtype.element_ty), mask=col < WIDTH)
