"""Portable bodies of ``ExpertRoute`` and ``RoutedExperts`` in standard ONNX operators (see ``bilevel.operators.reference``)."""

from __future__ import annotations

from typing import Any

from onnxscript import OnnxFunction, script
from onnxscript.values import Opset

from bilevel.contract import DOMAIN
from bilevel.export.graph.bodies.attention import pair_slots
from bilevel.export.graph.bodies.routes import FLOAT, INT32, INT64, selectable
from bilevel.export.graph.schemas import ONNX_OPSET

op = Opset("", ONNX_OPSET)
_bilevel = Opset(DOMAIN, 1)
_private = Opset("bilevel.private", 1)

# The sum of weights has an epsilon of 1e-20. Both are scaled by a power of two, which changes no bit of the quotient, because
# optimisers take an addend below 1e-8 for 0 (onnxscript's do).
WEIGHT_UNIT = 2.0**50
SCALED_EPSILON = 1e-20 * WEIGHT_UNIT


@script(_private, default_opset=op)
def sigmoid_scores(logits):
    """By Exp: ONNX Runtime's Sigmoid is off by 5e-8, more than the whole score of a logit of -17; its Exp by less than a
    unit in the last place."""
    return op.Constant(value_float=1.0) / (op.Exp(op.Neg(logits)) + op.Constant(value_float=1.0))


@script(_private, default_opset=op)
def softmax_scores(logits):
    return op.Softmax(logits, axis=-1)


@script(_private, default_opset=op)
def sqrtsoftplus_scores(logits):
    """Far below 0 the softplus is e^x, which underflows where its root e^(x/2) does not."""
    tail = op.Exp(logits * op.Constant(value_float=0.5))
    return op.Where(logits < op.Constant(value_float=-20.0), tail, op.Sqrt(op.Softplus(logits)))


@script(_private, default_opset=op)
def external_groups(grouped, group_logits):
    return selectable(group_logits)


@script(_private, default_opset=op)
def max_groups(grouped, group_logits):
    return op.ReduceMax(grouped, [2], keepdims=0)


@script(_private, default_opset=op)
def top2_groups(grouped, group_logits):
    count = op.Min(op.Shape(grouped, start=2, end=3), op.Constant(value_ints=[2]))
    best, _ = op.TopK(grouped, count, axis=-1, largest=1, sorted=1)
    return selectable(op.ReduceSum(best, [2], keepdims=0))


_SCORES = {"sigmoid": sigmoid_scores, "softmax": softmax_scores, "sqrtsoftplus": sqrtsoftplus_scores}
_GROUPS = {"external": external_groups, "max": max_groups, "top2_sum": top2_groups}


def expert_route_body(score_func: str, group_score: str) -> OnnxFunction[..., Any]:
    """The body for one way of scoring: ONNX cannot branch on a string attribute, so it is chosen when the body is written."""
    score_experts, score_groups = _SCORES[score_func], _GROUPS[group_score]

    @script(_bilevel, default_opset=op)
    def ExpertRoute(
        logits,
        group_logits,
        select_bias,
        top_k: int,
        topk_group: int,
        score_func: str,
        group_score: str,
        normalize: int,
        scale: float,
        norm_floor: float,
        zero_fill: int,
    ):
        num_kept = op.Reshape(op.Constant(value_int=top_k), [1])
        num_groups = op.Shape(group_logits, start=1, end=2)
        lowest = op.Constant(value_float=float("-inf"))
        scores = score_experts(logits)
        choice = selectable(scores + select_bias)
        shape = op.Concat(op.Shape(logits, start=0, end=1), num_groups, [-1], axis=0)
        grouped = op.Reshape(choice, shape)
        group = score_groups(grouped, group_logits)
        best_group, index = op.TopK(group, op.Reshape(op.Constant(value_int=topk_group), [1]), axis=-1, largest=1, sorted=1)
        none = op.Expand(op.Constant(value_float=0.0), op.Shape(group))
        keep = op.ScatterElements(none, index, op.Cast(best_group > lowest, to=FLOAT), axis=1) > 0.0
        joins = op.And(op.Equal(op.Constant(value_int=zero_fill), 1), grouped > lowest)
        dropped = op.Where(joins, op.Constant(value_float=0.0), lowest)
        inside = op.Reshape(op.Where(op.Unsqueeze(keep, [2]), grouped, dropped), op.Shape(logits))
        best, ids = op.TopK(inside, num_kept, axis=-1, largest=1, sorted=1)
        chosen = best > lowest
        raw = op.Where(chosen, op.GatherElements(scores, ids, axis=1), op.Constant(value_float=0.0))
        unit = op.Constant(value_float=WEIGHT_UNIT)
        scaled = raw * unit
        total = op.ReduceSum(scaled, [1], keepdims=1) + op.Constant(value_float=SCALED_EPSILON)
        floor = op.Constant(value_float=norm_floor) * unit
        divisor = op.Where(op.Equal(op.Constant(value_int=normalize), 1), op.Max(total, floor), unit)
        weights = scaled / divisor * op.Constant(value_float=scale)
        return op.Cast(op.Where(chosen, ids, -1), to=INT32), weights

    return ExpertRoute


@script(_private, default_opset=op)
def swiglu(x, gate_up, down):
    """x [n, t, d], gate_up [n, 2f, d], down [n, d, f] -> [n, t, d]."""
    hidden = op.MatMul(x, op.Transpose(gate_up, perm=[0, 2, 1]))
    gate, up = op.Split(hidden, axis=-1, num_outputs=2)
    wide = op.Cast(gate, to=FLOAT)
    silu = op.CastLike(wide / (op.Exp(op.Neg(wide)) + op.Constant(value_float=1.0)), x)
    return op.MatMul(silu * up, op.Transpose(down, perm=[0, 2, 1]))


@script(_private, default_opset=op)
def bounded_swiglu(x, gate_up, down, gate_scale, limit, up_shift):
    """The same with RoutedExperts' attributes, fp32 scalars; limit inf: none."""
    hidden = op.MatMul(x, op.Transpose(gate_up, perm=[0, 2, 1]))
    gate, up = op.Split(op.Cast(hidden, to=FLOAT), axis=-1, num_outputs=2)
    gate = op.Where(gate > limit, limit, gate)  # Min and Max may lose NaN
    up = op.Where(up > limit, limit, op.Where(up < op.Neg(limit), op.Neg(limit), up))
    activated = gate / (op.Exp(op.Neg(gate * gate_scale)) + op.Constant(value_float=1.0)) * (up + up_shift)
    return op.MatMul(op.CastLike(activated, x), op.Transpose(down, perm=[0, 2, 1]))


@script(_private, default_opset=op)
def gathered_rows(x, expert):
    """For a few tokens: the token of every (token, slot) pair, [T * k, 1, d]. expert: int64 [T, k]."""
    shape = op.Concat(op.Shape(expert), op.Shape(x, start=1, end=2), axis=0)
    return op.Reshape(op.Expand(op.Unsqueeze(x, [1]), shape), op.Concat([-1, 1], op.Shape(x, start=1, end=2), axis=0))


@script(_private, default_opset=op)
def gathered_sum(out, x, used, weights):
    """fp32 [T, d]: the pairs' results [T * k, 1, d], weighted. used: bool [T, k]."""
    shape = op.Concat(op.Shape(used), op.Shape(x, start=1, end=2), axis=0)
    nothing = op.Constant(value_float=0.0)
    # Nobody chose what a pair without an expert computed: its result may be NaN, and 0 * NaN is NaN.
    own = op.Where(op.Unsqueeze(used, [2]), op.Reshape(op.Cast(out, to=FLOAT), shape), nothing)
    return op.ReduceSum(own * op.Unsqueeze(op.Where(used, weights, nothing), [2]), [1], keepdims=0)


@script(_private, default_opset=op)
def experts_gathered(x, expert, used, weights, gate_up, down):
    """One expert gathered per (token, slot): for a few tokens. expert int64, used bool, weights [T, k] -> fp32 [T, d]."""
    flat = op.Reshape(expert, [-1])
    out = swiglu(gathered_rows(x, expert), op.Gather(gate_up, flat, axis=0), op.Gather(down, flat, axis=0))
    return gathered_sum(out, x, used, weights)


@script(_private, default_opset=op)
def tiles_of(x, expert, used, num_experts):
    """Tokens sorted by expert and padded to tiles (as in RoutedAttention's body): rows [tiles, 32, d], the expert of every tile
    and the slot of every (token, slot) pair, [T * k]; the slot behind the last one where a pair has no expert.
    """
    tile = op.Constant(value_ints=[32])
    tokens = op.Shape(x, start=0, end=1)
    num_kept = op.Shape(expert, start=1, end=2)
    num_pairs = tokens * num_kept
    num_tiles = op.Div(num_pairs + (tile - 1), tile) + op.Min(num_experts, num_pairs)
    num_slots = num_tiles * tile
    # Every (token, slot) pair is a token of its own here: naming an expert twice counts twice.
    column = op.Reshape(expert, op.Concat([1], num_pairs, [1], axis=0))
    flat_used = op.Reshape(used, op.Shape(column))
    slot, stands = pair_slots(column, flat_used, num_experts, tile)
    slot = op.Reshape(op.Where(stands, slot, num_slots), [-1])
    token = op.Div(op.Range(0, op.Squeeze(num_pairs), 1), num_kept)
    nothing = op.Expand(op.Constant(value_int=0), num_slots + 1)
    slot_token = op.Slice(op.ScatterElements(nothing, slot, token, axis=0), [0], [-1], [0])
    empty = op.Expand(op.Constant(value_int=0), num_tiles + num_pairs)  # TensorRT: no fewer places than indices
    tile_expert = op.ScatterElements(empty, op.Div(slot, tile), op.Reshape(expert, [-1]), axis=0)
    tile_expert = op.Slice(tile_expert, [0], num_tiles, [0])
    shape = op.Concat(num_tiles, tile, op.Shape(x, start=1, end=2), axis=0)
    return op.Reshape(op.Gather(x, slot_token, axis=0), shape), tile_expert, slot


@script(_private, default_opset=op)
def dispatched_sum(out, slot, x, used, weights):
    """fp32 [T, d]: the tiles' results [tiles, 32, d], weighted."""
    flat_out = op.Reshape(op.Cast(out, to=FLOAT), op.Concat([-1], op.Shape(x, start=1, end=2), axis=0))
    per_pair = op.Concat(op.Shape(used), op.Shape(x, start=1, end=2), axis=0)
    pair_out = op.Reshape(op.Gather(op.Pad(flat_out, [0, 0, 1, 0]), slot, axis=0), per_pair)
    weight = op.Where(used, weights, op.Constant(value_float=0.0))
    return op.ReduceSum(pair_out * op.Unsqueeze(weight, [2]), [1], keepdims=0)


@script(_private, default_opset=op)
def experts_dispatched(x, expert, used, weights, gate_up, down):
    """One batched product for all tiles."""
    rows, tile_expert, slot = tiles_of(x, expert, used, op.Shape(down, start=0, end=1))
    out = swiglu(rows, op.Gather(gate_up, tile_expert, axis=0), op.Gather(down, tile_expert, axis=0))
    return dispatched_sum(out, slot, x, used, weights)


@script(_bilevel, default_opset=op)
def RoutedExperts(x, ids, weights, gate_up, down, gate_scale: float, limit: float, up_shift: float):
    """The chosen experts' SwiGLU, weighted: [T, d] like x; ids out of range are ignored. For attributes that change nothing."""
    given = op.Cast(ids, to=INT64)
    used = op.And(given >= 0, given < op.Shape(down, start=0, end=1))
    expert = op.Where(used, given, 0)
    if op.Squeeze(op.Shape(x, start=0, end=1)) <= 4:
        out = experts_gathered(x, expert, used, weights, gate_up, down)
    else:
        out = experts_dispatched(x, expert, used, weights, gate_up, down)
    return op.CastLike(out, x)


def bounded_experts_body() -> OnnxFunction[..., Any]:
    """The body for any attributes."""

    @script(_bilevel, default_opset=op)
    def RoutedExperts(x, ids, weights, gate_up, down, gate_scale: float, limit: float, up_shift: float):
        given = op.Cast(ids, to=INT64)
        used = op.And(given >= 0, given < op.Shape(down, start=0, end=1))
        expert = op.Where(used, given, 0)
        bound = op.Constant(value_float=limit)
        bound = op.Where(bound > op.Constant(value_float=0.0), bound, op.Constant(value_float=float("inf")))
        factor, shift = op.Constant(value_float=gate_scale), op.Constant(value_float=up_shift)
        if op.Squeeze(op.Shape(x, start=0, end=1)) <= 4:
            flat = op.Reshape(expert, [-1])
            chosen_up, chosen_down = op.Gather(gate_up, flat, axis=0), op.Gather(down, flat, axis=0)
            hidden = bounded_swiglu(gathered_rows(x, expert), chosen_up, chosen_down, factor, bound, shift)
            out = gathered_sum(hidden, x, used, weights)
        else:
            rows, tile_expert, slot = tiles_of(x, expert, used, op.Shape(down, start=0, end=1))
            tile_up, tile_down = op.Gather(gate_up, tile_expert, axis=0), op.Gather(down, tile_expert, axis=0)
            out = dispatched_sum(bounded_swiglu(rows, tile_up, tile_down, factor, bound, shift), slot, x, used, weights)
        return op.CastLike(out, x)

    return RoutedExperts
