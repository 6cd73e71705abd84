"""Portable body of ``RoutedAttention`` in standard ONNX operators: exact, and its work grows with the kept blocks.

A long call is dispatched: (token, block) pairs are sorted by block, each block's list is padded to tiles, one batched matrix
product serves all tiles, and the partial softmaxes of a token's blocks are merged by log-sum-exp. The number of tiles has a
static bound, so no shape depends on data. A short call gathers each token's blocks directly.

"Virtual heads" V = the query heads that share one kv head and one selection head; P = B * V lists of queries.
"""

from __future__ import annotations

from onnxscript import script
from onnxscript.values import Opset

from bilevel.contract import DOMAIN
from bilevel.export.graph.bodies.routes import FLOAT, INT32, INT64, horizons, joint_heads, positions
from bilevel.export.graph.schemas import ONNX_OPSET

op = Opset("", ONNX_OPSET)
_bilevel = Opset(DOMAIN, 1)
_private = Opset("bilevel.private", 1)


@script(_private, default_opset=op)
def spread_routes(routes, virtual):
    """int64 [B, V, L, K]: each virtual head's routes."""
    batch = op.Shape(routes, start=0, end=1)
    selection = op.Shape(routes, start=1, end=2)
    rest = op.Shape(routes, start=2, end=4)
    shape = op.Concat(batch, selection, op.Div(virtual, selection), rest, axis=0)
    wide = op.Expand(op.Unsqueeze(op.Cast(routes, to=INT64), [2]), shape)
    return op.Reshape(wide, op.Concat(batch, virtual, rest, axis=0))


@script(_private, default_opset=op)
def first_rows(k, virtual, num_blocks):
    """int64 [B, V, 1, 1]: row of each virtual head's first block in k.reshape(B * Hkv * N, R * D)."""
    batch = op.Shape(k, start=0, end=1)
    kv_heads = op.Shape(k, start=1, end=2)
    head = op.Div(op.Range(0, op.Squeeze(virtual), 1) * kv_heads, virtual)
    row = op.Unsqueeze(op.Range(0, op.Squeeze(batch), 1) * kv_heads, [1])
    return op.Unsqueeze((op.Unsqueeze(head, [0]) + row) * num_blocks, [2, 3])


@script(_private, default_opset=op)
def group_queries(q, virtual):
    """[B, V, L, Gv, D]: the query heads of one virtual head side by side."""
    shape = op.Concat(
        op.Shape(q, start=0, end=1),
        virtual,
        op.Div(op.Shape(q, start=1, end=2), virtual),
        op.Shape(q, start=2, end=4),
        axis=0,
    )
    return op.Transpose(op.Reshape(q, shape), perm=[0, 1, 3, 2, 4])


@script(_private, default_opset=op)
def numbers_of(rows, width):
    """fp32 [..., D] of a cache's rows. The body for packed caches has another one in its place; width: int64 [1], D there."""
    return op.Cast(rows, to=FLOAT)


@script(_private, default_opset=op)
def value_width_of(v, q):
    """int64 [1]: numbers of a value, Dv; of packed caches those of a key, which q [B, V, L, Gv, D] tells."""
    return op.Shape(v, start=3, end=4)


@script(_private, default_opset=op)
def attend_gathered(q, k, v, blocks, visible, rows, horizon, size, scale):
    """Gather each token's blocks: q [B, V, L, Gv, D], blocks int64 and visible bool [B, V, L, K] -> fp32 [B, V, L, Gv, Dv], and
    of every row the largest score and the sum of the others' weights beside it, [B, V, L, Gv, 1]."""
    num_kept = op.Shape(blocks, start=3, end=4)
    stored = op.Shape(k, start=3, end=4)
    # A block named twice counts once.
    earlier = op.Range(0, op.Squeeze(num_kept), 1)
    before = op.Unsqueeze(earlier, [0]) < op.Unsqueeze(earlier, [1])
    same = op.Equal(op.Unsqueeze(blocks, [3]), op.Unsqueeze(blocks, [4]))
    repeated = op.ReduceMax(op.Cast(op.And(same, before), to=INT32), [4], keepdims=0) > 0
    used = op.And(visible, op.Not(repeated))
    some_used = op.Max(op.ReduceMax(op.Where(used, blocks, -1), [3], keepdims=1), op.Constant(value_int=0))
    index = op.Where(used, blocks, some_used) + rows
    flat = op.Concat([-1], size * stored, axis=0)
    shape = op.Concat(op.Shape(blocks, start=0, end=3), num_kept * size, stored, axis=0)
    keys = numbers_of(op.Reshape(op.Gather(op.Reshape(k, flat), index, axis=0), shape), op.Shape(q, start=4, end=5))
    offset = op.Range(0, op.Squeeze(size), 1)
    token = op.Unsqueeze(blocks * size, [4]) + offset
    seen = op.And(op.Unsqueeze(used, [4]), token < op.Unsqueeze(horizon, [4]))
    # A weight of 0 must not meet a value that may be anything (0 * NaN is NaN): the first of a block that is read stands in.
    read = op.Unsqueeze(index * size, [4]) + op.Where(seen, offset, 0)
    value_width = value_width_of(v, q)
    value_shape = op.Concat(op.Shape(blocks, start=0, end=3), num_kept * size, value_width, axis=0)
    tokens = op.Reshape(v, op.Concat([-1], op.Shape(v, start=3, end=4), axis=0))
    values = op.Reshape(numbers_of(op.Gather(tokens, read, axis=0), value_width), value_shape)
    scores = op.MatMul(op.Cast(q, to=FLOAT), op.Transpose(keys, perm=[0, 1, 2, 4, 3])) * scale
    seen = op.Reshape(seen, op.Concat(op.Shape(blocks, start=0, end=3), [1], num_kept * size, axis=0))
    any_seen = op.ReduceMax(op.Cast(seen, to=INT32), [4], keepdims=1) > 0
    nothing = op.Constant(value_float=0.0)
    unseen = op.Where(any_seen, op.Constant(value_float=float("-inf")), nothing)
    masked = op.Where(seen, scores, unseen)
    probability = op.Softmax(masked, axis=-1)
    # The largest weight is 1 over the sum.
    total = op.Reciprocal(op.ReduceMax(probability, [4], keepdims=1))
    out = op.Where(any_seen, op.MatMul(probability, values), nothing)
    return out, op.ReduceMax(masked, [4], keepdims=1), total


@script(_private, default_opset=op)
def pair_slots(blocks, visible, num_blocks, tile):
    """Where each (token, block) pair goes when pairs are sorted by block and every block's list is padded to tiles.

    blocks int64, visible bool [P, S, K]. Returns slot int64 [P, S, K], and which pairs are the one that stands for a
    block named several times.
    """
    lists = op.Shape(blocks, start=0, end=1)
    length = op.Shape(blocks, start=1, end=2)
    num_kept = op.Shape(blocks, start=2, end=3)
    column = op.Where(visible, blocks, num_blocks)  # pairs that are not used go to a dummy column
    number = op.Expand(op.Range(1, op.Squeeze(num_kept + 1), 1), op.Shape(blocks))
    empty = op.Expand(op.Constant(value_int=0), op.Concat(lists, length, num_blocks + 1, axis=0))
    winner = op.ScatterElements(empty, column, number, axis=2)
    used = op.And(visible, op.Equal(op.GatherElements(winner, column, axis=2), number))
    kept = op.Cast(winner > 0, to=INT32)
    order = op.CumSum(kept, op.Constant(value_int=1))
    count = op.Squeeze(op.Slice(order, [-1], [9223372036854775807], [1]), [1])
    tiles = op.Div(op.Cast(count, to=INT64) + (tile - 1), tile)
    # The dummy column's tiles are not laid out.
    tiles = op.Slice(tiles, [0], [-1], [1])
    last = op.CumSum(op.Reshape(tiles, [-1]), op.Constant(value_int=0))
    first = op.Pad(op.Reshape(last, op.Shape(tiles)) - tiles, [0, 0, 0, 1])
    flat = op.Reshape(column, op.Concat(lists, [-1], axis=0))
    start = op.Reshape(op.GatherElements(first, flat, axis=1), op.Shape(blocks))
    rank = op.Cast(op.GatherElements(order, column, axis=2), to=INT64) - 1
    return start * tile + rank, used


@script(_private, default_opset=op)
def odd_tokens(tokens, width, rows, horizon, past_len, size, num_blocks):
    """bool [P, L + 2]: which of this call's tokens have values that a row which does not see them must not be given: those
    that are not finite, and all behind the text. The first flag stands for all tokens before the call, the last for all behind
    it. tokens: all values, [B * Hkv * M, D] (width: D)."""
    length = op.Shape(horizon, start=2, end=3)
    place = op.Min(positions(past_len, length), num_blocks * size - 1)
    zero = op.Expand(op.Constant(value_float=0.0), op.Concat(width, [1], axis=0))
    # 0 times a row of numbers is 0; of a row that holds NaN or an infinity it is NaN.
    own = op.IsNaN(op.MatMul(numbers_of(op.Gather(tokens, rows * size + place, axis=0), width), zero))
    own = op.Or(op.Squeeze(own, [4]), op.Equal(horizon, 0))
    flags = op.Cast(op.Reshape(own, op.Concat([-1], length, axis=0)), to=INT32)
    before = op.Pad(flags, [0, 1, 0, 0])
    return op.Pad(before, [0, 0, 0, 1], op.Cast(op.Constant(value_int=1), to=INT32)) > 0


@script(_private, default_opset=op)
def attend_dispatched(q, k, v, blocks, visible, rows, horizon, past_len, size, scale):
    """The same by dispatch to tiles; shapes as in ``attend_gathered``."""
    tile = op.Constant(value_ints=[16])
    stored = op.Shape(k, start=3, end=4)
    width = op.Shape(q, start=4, end=5)
    num_kept = op.Shape(blocks, start=3, end=4)
    length = op.Shape(blocks, start=2, end=3)
    heads = op.Shape(q, start=3, end=4)
    lists = op.Shape(blocks, start=0, end=1) * op.Shape(blocks, start=1, end=2)
    num_blocks = op.Div(op.Shape(k, start=2, end=3), size)
    num_pairs = lists * length * num_kept
    # A list of c pairs takes ceil(c / tile) tiles; summed over lists that is at most this many.
    num_tiles = op.Div(num_pairs + (tile - 1), tile) + op.Min(lists * num_blocks, num_pairs)

    shape = op.Concat(lists, length, num_kept, axis=0)
    block = op.Reshape(blocks, shape)
    slot, used = pair_slots(block, op.Reshape(visible, shape), num_blocks, tile)
    num_slots = num_tiles * tile
    slot = op.Reshape(op.Where(used, slot, num_slots), [-1])  # unused pairs share one dummy slot at the end
    query_row = op.Expand(op.Reshape(op.Range(0, op.Squeeze(lists * length), 1), op.Concat(lists, length, [1], axis=0)), shape)
    nothing = op.Expand(op.Constant(value_int=0), num_slots + 1)
    slot_query = op.Slice(op.ScatterElements(nothing, slot, op.Reshape(query_row, [-1]), axis=0), [0], [-1], [0])
    kv_row = op.Reshape(op.Where(visible, blocks, 0) + rows, [-1])
    empty = op.Expand(op.Constant(value_int=0), num_tiles + num_pairs)  # TensorRT: no fewer places than indices
    tile_kv = op.Slice(op.ScatterElements(empty, op.Div(slot, tile), kv_row, axis=0), [0], num_tiles, [0])

    flat_queries = op.Reshape(q, op.Concat(lists * length, heads * width, axis=0))
    tile_rows = op.Concat(num_tiles, tile * heads, width, axis=0)
    queries = op.Cast(op.Reshape(op.Gather(flat_queries, slot_query, axis=0), tile_rows), to=FLOAT)
    flat = op.Concat([-1], size * stored, axis=0)
    tile_keys = op.Concat(num_tiles, size, stored, axis=0)
    keys = numbers_of(op.Reshape(op.Gather(op.Reshape(k, flat), tile_kv, axis=0), tile_keys), width)

    # A weight of 0 must not meet a value that may be anything (0 * NaN is NaN). Only this call's tokens are read by some rows
    # of a tile and not by others; the odd ones among them give way to the block's first, and who does see them becomes NaN.
    value_width = value_width_of(v, q)
    tokens = op.Reshape(v, op.Concat([-1], op.Shape(v, start=3, end=4), axis=0))
    virtual = op.Shape(blocks, start=1, end=2)
    tile_list = op.Div(
        op.Squeeze(op.Slice(op.Reshape(slot_query, op.Concat(num_tiles, tile, axis=0)), [0], [1], [1]), [1]), length
    )
    first = op.Mod(tile_kv, num_blocks) * size - op.Gather(op.Cast(past_len, to=INT64), op.Div(tile_list, virtual), axis=0)
    offset = op.Range(0, op.Squeeze(size), 1)
    place = op.Max(op.Min(op.Unsqueeze(first, [1]) + offset, length), op.Constant(value_ints=[-1])) + 1
    flags = op.Reshape(odd_tokens(tokens, value_width, rows, horizon, past_len, size, num_blocks), [-1])
    is_odd = op.Gather(flags, op.Unsqueeze(tile_list, [1]) * (length + 2) + place, axis=0)
    read = op.Unsqueeze(tile_kv * size, [1]) + op.Where(is_odd, 0, offset)
    values = numbers_of(op.Gather(tokens, read, axis=0), value_width)

    # How many tokens of its block each slot's query sees.
    wide_horizon = op.Expand(horizon, op.Concat(op.Shape(blocks, start=0, end=3), [1], axis=0))
    slot_horizon = op.Reshape(op.Gather(op.Reshape(wide_horizon, [-1]), slot_query, axis=0), op.Concat(num_tiles, tile, axis=0))
    room = slot_horizon - op.Unsqueeze(op.Mod(tile_kv, num_blocks) * size, [1])
    seen = op.Unsqueeze(room, [2, 3]) > op.Range(0, op.Squeeze(size), 1)
    scores = op.MatMul(queries, op.Transpose(keys, perm=[0, 2, 1])) * scale
    lowest = op.Constant(value_float=-3.4028234663852886e38)
    by_head = op.Reshape(scores, op.Concat(num_tiles, tile, heads, size, axis=0))
    masked = op.Reshape(op.Where(seen, by_head, op.Constant(value_float=float("-inf"))), op.Shape(scores))
    peak = op.Max(op.ReduceMax(masked, [2], keepdims=1), lowest)  # finite where all scores are -inf
    weight = op.Exp(masked - peak)
    total = op.ReduceSum(weight, [2], keepdims=1)
    sees_odd = op.ReduceMax(op.Cast(op.And(seen, op.Unsqueeze(is_odd, [1, 2])), to=INT32), [3], keepdims=1)
    row_odd = op.Reshape(op.Expand(sees_odd, op.Concat(num_tiles, tile, heads, [1], axis=0)), op.Shape(total)) > 0
    total = op.Where(row_odd, op.Constant(value_float=float("nan")), total)
    partial = op.MatMul(weight, values)

    # Merge each token's blocks; the dummy slot weighs nothing.
    slot_heads = op.Concat(num_slots, heads, axis=0)
    one = op.Constant(value_ints=[1])
    padded = op.Concat([0, 0], one, [0], axis=0)
    flat_partial = op.Pad(op.Reshape(partial, op.Concat(num_slots, heads * value_width, axis=0)), padded)
    flat_peak = op.Pad(op.Reshape(peak, slot_heads), padded, lowest)
    flat_total = op.Pad(op.Reshape(total, slot_heads), padded)
    per_pair = op.Concat(lists * length, num_kept, heads, [-1], axis=0)
    pair_peak = op.Reshape(op.Gather(flat_peak, slot, axis=0), per_pair)
    pair_total = op.Reshape(op.Gather(flat_total, slot, axis=0), per_pair)
    pair_out = op.Reshape(op.Gather(flat_partial, slot, axis=0), per_pair)
    factor = op.Exp(pair_peak - op.ReduceMax(pair_peak, [1], keepdims=1))
    numerator = op.ReduceSum(factor * pair_out, [1], keepdims=0)
    denominator = op.ReduceSum(factor * pair_total, [1], keepdims=0)
    any_seen = op.ReduceMax(
        op.Cast(op.Reshape(visible, op.Concat(lists * length, num_kept, axis=0)), to=INT32), [1], keepdims=1
    )
    out = op.Where(op.Unsqueeze(any_seen, [2]) > 0, numerator / denominator, op.Constant(value_float=0.0))
    by_row = op.Concat(op.Shape(q, start=0, end=4), [-1], axis=0)
    top = op.ReduceMax(pair_peak, [1], keepdims=0)
    return op.Reshape(out, by_row), op.Reshape(top, by_row), op.Reshape(denominator, by_row)


@script(_private, default_opset=op)
def attend(q, k, v, routes, past_len, new_len, size, causal, scale):
    """By virtual heads: fp32 [B, V, L, Gv, Dv], and of every row the largest score and the sum of the weights beside it, [B, V,
    L, Gv, 1]. size: int64 [1]."""
    length = op.Shape(q, start=2, end=3)
    kv_heads = op.Shape(k, start=1, end=2)
    virtual = joint_heads(op.Shape(routes, start=1, end=2), kv_heads, op.Shape(q, start=1, end=2))
    num_blocks = op.Div(op.Shape(k, start=2, end=3), size)
    blocks = spread_routes(routes, virtual)
    horizon = horizons(positions(past_len, length), past_len, new_len, causal)
    visible = op.And(op.And(blocks >= 0, blocks < num_blocks), blocks * size < horizon)
    rows = first_rows(k, virtual, num_blocks)
    queries = group_queries(q, virtual)
    if op.Squeeze(length) <= 8:
        out, peak, total = attend_gathered(queries, k, v, blocks, visible, rows, horizon, size, scale)
    else:
        out, peak, total = attend_dispatched(queries, k, v, blocks, visible, rows, horizon, past_len, size, scale)
    return out, peak, total


@script(_private, default_opset=op)
def heads_together(out, q):
    """[B, V, L, Gv, Dv] -> [B, Hq, L, Dv], in the type of q."""
    heads_first = op.Transpose(out, perm=[0, 1, 3, 2, 4])
    return op.CastLike(op.Reshape(heads_first, op.Concat(op.Shape(q, start=0, end=3), [-1], axis=0)), q)


@script(_bilevel, default_opset=op)
def RoutedAttention(q, k, v, routes, past_len, new_len, block_size: int, causal: int, scale: float):
    """Softmax attention over the tokens of the routed blocks: [B, Hq, L, Dv], typed as q."""
    size = op.Reshape(op.Constant(value_int=block_size), [1])
    sees_past = op.Constant(value_int=causal)
    out, _, _ = attend(q, k, v, routes, past_len, new_len, size, sees_past, op.Constant(value_float=scale))
    return heads_together(out, q)


@script(_bilevel, default_opset=op)
def RoutedAttentionSinks(q, k, v, routes, past_len, new_len, sinks, block_size: int, causal: int, scale: float):
    """The same with a logit a query head that takes its share of the softmax."""
    size = op.Reshape(op.Constant(value_int=block_size), [1])
    sees_past = op.Constant(value_int=causal)
    out, peak, total = attend(q, k, v, routes, past_len, new_len, size, sees_past, op.Constant(value_float=scale))
    # What a sink leaves is total / (total + e^(sink - peak)); sinks by virtual head, heads of one side by side.
    by_head = op.Concat(op.Shape(out, start=1, end=2), [1], op.Shape(out, start=3, end=4), [1], axis=0)
    weight = op.Exp(op.Reshape(sinks, by_head) - peak)
    return heads_together(out * (total / (total + weight)), q)
