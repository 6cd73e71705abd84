"""Portable bodies of ``SelectBlocks``, ``CoarseRoute`` and ``FineRoute`` in standard ONNX operators.

Semantics: ``bilevel.operators.reference``. Written as onnxscript functions; the names in capitals of the docstrings are
the contract's letters. ``FineRoute`` reads the candidates' keys only, so its work does not grow with the number of blocks.
"""

from __future__ import annotations

from onnxscript import script
from onnxscript.values import Opset

from bilevel.contract import DOMAIN
from bilevel.export.graph.schemas import ONNX_OPSET

op = Opset("", ONNX_OPSET)
_bilevel = Opset(DOMAIN, 1)
_private = Opset("bilevel.private", 1)  # helpers: inlined before the model is written

FLOAT, INT32, INT64 = 1, 6, 7
SCORED, ALWAYS_KEPT = 1, 2  # what becomes of a partial block: values of partial_block
FLOAT_MAX = 3.4028234663852886e38
NO_BLOCK = 33554432.0  # sorts behind every block index; fp32 holds indices up to 2**24 exactly


@script(_private, default_opset=op)
def joint_heads(num_selection_heads, num_key_heads, num_route_heads):
    """[1]: heads that can be scored apart: each lies in one selection head and reads one key head."""
    by_key = op.Where(op.Equal(op.Mod(num_key_heads, num_selection_heads), 0), num_key_heads, num_route_heads)
    return op.Where(op.Equal(op.Mod(num_selection_heads, num_key_heads), 0), num_selection_heads, by_key)


@script(_private, default_opset=op)
def sum_heads(x, heads):
    """[B, H, L, D] -> [B, heads, L, D]: neighbouring heads summed (of queries, too: q1.k + q2.k = (q1 + q2).k)."""
    apart = op.Reshape(
        x,
        op.Concat(
            op.Shape(x, start=0, end=1),
            heads,
            op.Div(op.Shape(x, start=1, end=2), heads),
            op.Shape(x, start=2, end=4),
            axis=0,
        ),
    )
    return op.ReduceSum(apart, [2], keepdims=0)


@script(_private, default_opset=op)
def positions(past_len, length):
    """int64 [B, 1, L, 1]: absolute positions of this call's tokens; length: int64 [1]."""
    offset = op.Range(0, op.Squeeze(length), 1)
    return op.Unsqueeze(op.Unsqueeze(op.Cast(past_len, to=INT64), [1]) + op.Unsqueeze(offset, [0]), [1, 3])


@script(_private, default_opset=op)
def horizons(position, past_len, new_len, causal):
    """int64 [B, 1, L, 1]: how many tokens each position may see; 0 for rows at or beyond new_len."""
    valid = op.Unsqueeze(op.Cast(past_len, to=INT64) + op.Cast(new_len, to=INT64), [1, 2, 3])
    end = op.Where(op.Equal(causal, 1), position + 1, valid)
    return op.Where(position < valid, end, 0)


@script(_private, default_opset=op)
def selectable(scores):
    """Scores as the selection sees them: NaN is -inf, +inf the largest finite number (it ties by index)."""
    lowest = op.Constant(value_float=float("-inf"))
    return op.Where(op.IsNaN(scores), lowest, op.Min(scores, op.Constant(value_float=FLOAT_MAX)))


@script(_private, default_opset=op)
def ascending(blocks, chosen, topk):
    """int32: the chosen block indices in ascending order, -1 in the unused tail."""
    none = op.Constant(value_float=NO_BLOCK)
    keyed = op.Where(chosen, op.Cast(blocks, to=FLOAT), none)
    ordered, _ = op.TopK(keyed, topk, axis=-1, largest=0, sorted=1)
    return op.Cast(op.Where(ordered < none, ordered, op.Constant(value_float=-1.0)), to=INT32)


@script(_private, default_opset=op)
def forced_init(blocks, own, topk, local, init_blocks, horizon, block_size):
    """bool: init blocks that are kept; own and local blocks come first when K is too small for all."""
    room = op.Where(blocks < own, topk - local, topk)
    wanted = op.And(blocks < init_blocks, blocks < room)
    return op.And(wanted, op.And(blocks * block_size < horizon, op.Or(blocks > own, blocks <= own - local)))


@script(_private, default_opset=op)
def keep_best(given, forced, scored, topk, scored_topk):
    """int32 [.., K]: the forced blocks and the best of those that may be scored, bool [.., U]; given: fp32 [B, Hs, L, U]."""
    lowest = op.Constant(value_float=float("-inf"))
    masked = op.Where(scored, selectable(given), lowest)
    keyed = op.Where(forced, op.Constant(value_float=float("inf")), masked)
    # K empty slots behind the blocks: the width of the result never depends on how many blocks there are.
    padded = op.Pad(keyed, op.Concat([0, 0, 0, 0, 0, 0, 0], topk, axis=0), lowest)
    best, index = op.TopK(padded, topk, axis=-1, largest=1, sorted=1)
    most = op.ReduceSum(op.Cast(forced, to=INT64), [-1], keepdims=1) + scored_topk
    return ascending(index, op.And(best > lowest, op.Range(0, op.Squeeze(topk), 1) < most), topk)


@script(_bilevel, default_opset=op)
def SelectBlocks(
    scores,
    past_len,
    new_len,
    block_size: int,
    topk: int,
    scored_topk: int,
    init_blocks: int,
    local_blocks: int,
    partial_block: int,
    causal: int,
):
    """Keep K blocks by given scores: fp32 [B, Hs, L, U], [B], [B] -> int32 [B, Hs, L, K]."""
    num_kept = op.Reshape(op.Constant(value_int=topk), [1])
    size = op.Reshape(op.Constant(value_int=block_size), [1])
    partial_kind = op.Reshape(op.Constant(value_int=partial_block), [1])
    num_local = op.Reshape(op.Constant(value_int=local_blocks), [1])
    position = positions(past_len, op.Shape(scores, start=2, end=3))
    horizon = horizons(position, past_len, new_len, op.Constant(value_int=causal))
    own = op.Div(position, size)
    block = op.Range(0, op.Squeeze(op.Shape(scores, start=3, end=4)), 1)

    partial = op.Div(horizon, size)
    is_cut = op.And(op.Mod(horizon, size) > 0, op.Equal(partial_kind, ALWAYS_KEPT))
    # Where the partial block is not the own one that local_blocks forces anyway, it takes one slot of the budget for itself.
    apart = op.And(is_cut, op.Or(partial > own, op.Equal(num_local, 0)))
    room = num_kept - op.Cast(apart, to=INT64)
    local = op.Min(num_local, room)
    is_local = op.And(op.And(block > own - local, block <= own), horizon > 0)
    is_init = forced_init(block, own, room, local, op.Constant(value_int=init_blocks), horizon, size)
    forced = op.Or(op.And(is_cut, op.Equal(block, partial)), op.Or(is_local, is_init))
    needed = op.Where(op.Equal(partial_kind, SCORED), 1, size)
    scored = block * size + needed <= horizon
    return keep_best(scores, forced, scored, num_kept, op.Constant(value_int=scored_topk))


@script(_bilevel, default_opset=op)
def CoarseRoute(
    query,
    unit_key,
    past_len,
    new_len,
    block_size: int,
    topk: int,
    num_selection_heads: int,
    init_blocks: int,
    local_blocks: int,
    causal: int,
):
    """Score every visible block, keep K: [B, Hr, L, Dr], [B, Hk, U, Dr], [B], [B] -> int32 [B, Hs, L, K]."""
    num_kept = op.Reshape(op.Constant(value_int=topk), [1])
    num_selected = op.Reshape(op.Constant(value_int=num_selection_heads), [1])
    size = op.Reshape(op.Constant(value_int=block_size), [1])
    batch = op.Shape(query, start=0, end=1)
    length = op.Shape(query, start=2, end=3)
    num_key_heads = op.Shape(unit_key, start=1, end=2)
    num_units = op.Shape(unit_key, start=2, end=3)

    # Queries that read one key head become rows of one matrix product, so no key is copied.
    joint = joint_heads(num_selected, num_key_heads, op.Shape(query, start=1, end=2))
    rows = op.Reshape(
        sum_heads(op.Cast(query, to=FLOAT), joint),
        op.Concat(batch, num_key_heads, op.Div(joint, num_key_heads) * length, op.Shape(query, start=3, end=4), axis=0),
    )
    product = op.MatMul(rows, op.Transpose(op.Cast(unit_key, to=FLOAT), perm=[0, 1, 3, 2]))
    scores = sum_heads(op.Reshape(product, op.Concat(batch, joint, length, num_units, axis=0)), num_selected)

    position = positions(past_len, length)
    horizon = horizons(position, past_len, new_len, op.Constant(value_int=causal))
    own = op.Div(position, size)
    local = op.Min(op.Reshape(op.Constant(value_int=local_blocks), [1]), num_kept)
    block = op.Range(0, op.Squeeze(num_units), 1)
    is_local = op.And(op.And(block <= own, block > own - local), horizon > 0)
    is_init = forced_init(block, own, num_kept, local, op.Constant(value_int=init_blocks), horizon, size)
    lowest = op.Constant(value_float=float("-inf"))
    masked = op.Where((block + 1) * size <= horizon, selectable(scores), lowest)
    keyed = op.Where(op.Or(is_local, is_init), op.Constant(value_float=float("inf")), masked)
    # K empty slots behind the blocks: the width of the result never depends on how many blocks there are.
    padded = op.Pad(keyed, op.Concat([0, 0, 0, 0, 0, 0, 0], num_kept, axis=0), lowest)
    best, index = op.TopK(padded, num_kept, axis=-1, largest=1, sorted=1)
    return ascending(index, best > lowest, num_kept)


@script(_private, default_opset=op)
def candidate_scores(query, unit_key, blocks, joint, num_selected):
    """fp32 [B, Hs, L, K1] scores of the candidates only. blocks: int64 [B, Hc, L, K1], all in range."""
    batch = op.Shape(query, start=0, end=1)
    length = op.Shape(query, start=2, end=3)
    width = op.Shape(query, start=3, end=4)
    num_key_heads = op.Shape(unit_key, start=1, end=2)
    num_units = op.Shape(unit_key, start=2, end=3)
    num_lists = op.Shape(blocks, start=1, end=2)
    num_candidates = op.Shape(blocks, start=3, end=4)
    repeat = op.Div(joint, num_lists)
    shape = op.Concat(batch, num_lists, repeat, length, num_candidates, axis=0)
    spread = op.Expand(op.Unsqueeze(blocks, [2]), shape)
    spread = op.Reshape(spread, op.Concat(batch, joint, length, num_candidates, axis=0))
    key_head = op.Div(op.Range(0, op.Squeeze(joint), 1) * num_key_heads, joint)
    first_head = op.Unsqueeze(op.Range(0, op.Squeeze(batch), 1) * num_key_heads, [1])
    row = op.Unsqueeze(op.Unsqueeze(key_head, [0]) + first_head, [2, 3]) * num_units
    flat = op.Reshape(unit_key, op.Concat([-1], width, axis=0))
    keys = op.Cast(op.Gather(flat, spread + row, axis=0), to=FLOAT)
    scores = op.Squeeze(op.MatMul(keys, op.Unsqueeze(sum_heads(op.Cast(query, to=FLOAT), joint), [4])), [4])
    return sum_heads(scores, num_selected)


@script(_bilevel, default_opset=op)
def FineRoute(
    query,
    unit_key,
    candidates,
    past_len,
    new_len,
    block_size: int,
    topk: int,
    num_selection_heads: int,
    init_blocks: int,
    local_blocks: int,
    causal: int,
):
    """The same among candidates int32 [B, Hc, L, K1] and the forced blocks -> int32 [B, Hs, L, K]."""
    num_kept = op.Reshape(op.Constant(value_int=topk), [1])
    num_selected = op.Reshape(op.Constant(value_int=num_selection_heads), [1])
    size = op.Reshape(op.Constant(value_int=block_size), [1])
    num_init = op.Reshape(op.Constant(value_int=init_blocks), [1])
    # From the candidates, which all layers share: so is then everything below that depends on them and the lengths only.
    length = op.Shape(candidates, start=2, end=3)
    num_units = op.Shape(unit_key, start=2, end=3)
    position = positions(past_len, length)
    horizon = horizons(position, past_len, new_len, op.Constant(value_int=causal))
    own = op.Div(position, size)
    local = op.Min(op.Reshape(op.Constant(value_int=local_blocks), [1]), num_kept)

    # Candidates in ascending order: ties then go to the lower index, and repetitions stand side by side.
    none = op.Constant(value_float=NO_BLOCK)
    given = op.Cast(candidates, to=INT64)
    keyed = op.Where(op.And(given >= 0, given < num_units), op.Cast(given, to=FLOAT), none)
    num_candidates = op.Shape(candidates, start=3, end=4)
    ordered, _ = op.TopK(keyed, num_candidates, axis=-1, largest=0, sorted=1)
    before = op.Pad(op.Slice(ordered, [0], [-1], [3]), [0, 0, 0, 1, 0, 0, 0, 0], op.Constant(value_float=-1.0))
    blocks = op.Cast(op.Where(ordered < none, ordered, op.Constant(value_float=0.0)), to=INT64)
    is_local = op.And(blocks <= own, blocks > own - local)
    is_init = forced_init(blocks, own, num_kept, local, num_init, horizon, size)
    unique = op.And(op.And(ordered < none, ordered > before), op.Not(op.Or(is_local, is_init)))
    scored = op.And(unique, (blocks + 1) * size <= horizon)

    joint = joint_heads(num_selected, op.Shape(unit_key, start=1, end=2), op.Shape(query, start=1, end=2))
    scores = selectable(candidate_scores(query, unit_key, blocks, joint, num_selected))
    lists = op.Shape(candidates, start=1, end=2)
    repeat = op.Concat([1, 1], op.Div(num_selected, lists), [1, 1], axis=0)
    wide = op.Concat(op.Shape(query, start=0, end=1), num_selected, length, num_candidates, axis=0)
    lowest = op.Constant(value_float=float("-inf"))
    allowed = op.Reshape(op.Tile(op.Cast(op.Unsqueeze(scored, [2]), to=INT32), repeat), wide) > 0
    choices = op.Reshape(op.Tile(op.Unsqueeze(blocks, [2]), repeat), wide)
    masked = op.Where(allowed, scores, lowest)

    # Forced blocks take slots of their own in front, the same for every selection head.
    local_block = own - op.Range(0, op.Squeeze(local), 1)
    init_slots = op.Range(0, op.Squeeze(op.Min(num_init, num_kept)), 1)
    init_block = op.Expand(init_slots, op.Concat(op.Shape(own, start=0, end=3), op.Shape(init_slots), axis=0))
    keep_init = forced_init(init_block, own, num_kept, local, num_init, horizon, size)
    keep_local = op.And(op.And(local_block >= 0, local_block < num_units), horizon > 0)
    keep_forced = op.Concat(keep_local, op.And(keep_init, init_block < num_units), axis=3)
    forced = op.Concat(local_block, init_block, axis=3)
    heads = op.Concat([1], num_selected, [1, 1], axis=0)
    forced_score = op.Where(keep_forced, op.Constant(value_float=float("inf")), lowest)

    values = op.Concat(op.Tile(forced_score, heads), masked, axis=3)
    ids = op.Concat(op.Tile(forced, heads), choices, axis=3)
    padding = op.Concat([0, 0, 0, 0, 0, 0, 0], num_kept, axis=0)
    best, slot = op.TopK(op.Pad(values, padding, lowest), num_kept, axis=-1, largest=1, sorted=1)
    kept = op.GatherElements(op.Pad(ids, padding), slot, axis=3)
    return ascending(kept, best > lowest, num_kept)
