"""Faults of function bodies and of CPU kernels: a snippet of the source changed, and where the check must say that it starts.

A body serves every node of its operator, so the fault starts at the first of them. It is wrong in the execution "bodies" only,
a kernel in "CPU kernels" only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bilevel.export.graph.bodies import attention, experts, routes
from tests.export.check.both_sides import biases_below_zero, two_local_blocks
from tests.export.check.faults import Fault
from tests.export.check.surgery import Kernel, body


class KernelFault(NamedTuple):
    """As ``Fault``, for a CPU kernel."""

    kernel: Kernel
    at: str
    operator: str
    model: str = "two_level"


_EXTREME = "experts at extreme logits"
_FINE_SCORES = "candidate_scores(query, unit_key, blocks, joint, num_selected))"


def _coarse(old: str, new: str) -> Fault:
    return Fault(body("CoarseRoute", routes, (old, new)), "level 1", "CoarseRoute")


def _fine(old: str, new: str, **needs: Any) -> Fault:
    return Fault(body("FineRoute", routes, (old, new)), "layer 0 level 2", "FineRoute", **needs)


def _attention(old: str, new: str) -> Fault:
    return Fault(body("RoutedAttention", attention, (old, new)), "layer 0 attention", "RoutedAttention")


def _twice(old: str, new: str) -> Fault:
    """PyTorch's routes repeat nothing, so only the invariant can show it."""
    return Fault(body("RoutedAttention", attention, (old, new)), "order and repetition of routes", "RoutedAttention")


def _expert_route(old: str, new: str, at: str, **needs: Any) -> Fault:
    return Fault(body("ExpertRoute", experts, (old, new)), at, "ExpertRoute", **needs)


def _experts(old: str, new: str) -> Fault:
    return Fault(body("RoutedExperts", experts, (old, new)), "layer 1 expert output", "RoutedExperts")


BODY_FAULTS = {
    "level 1: visible a block too early": _coarse(
        "masked = op.Where((block + 1) * size <= horizon,", "masked = op.Where(block * size <= horizon,"
    ),
    "level 1: an unfinished block scored by its mean": Fault(
        body(
            "CoarseRoute",
            routes,
            ("op.And(op.And(block <= own,", "op.And(op.And(block < own,"),
            ("masked = op.Where((block + 1) * size <= horizon,", "masked = op.Where(block * size < horizon,"),
        ),
        "level 1",
        "CoarseRoute",
    ),
    "level 2: heads share one score": Fault(
        body(
            "CoarseRoute",
            routes,
            ("selectable(scores), lowest)", "selectable(scores * 0.0 + op.ReduceMean(scores, [1])), lowest)"),
        ),
        "layer 0 level 2",
        "CoarseRoute",
        "moba",
    ),
    "level 2: own block missing": _fine("op.And(local_block >= 0, local_block", "op.And(local_block != own, local_block"),
    "level 2: local block missing": _fine(
        "op.And(local_block >= 0, local_block", "op.And(local_block >= own, local_block", prepare=two_local_blocks
    ),
    "level 2: init block missing": _fine("op.And(blocks < init_blocks, blocks", "op.And(blocks + 1 < init_blocks, blocks"),
    "level 2: the lower score wins": _fine(f"selectable({_FINE_SCORES}", f"selectable(op.Neg({_FINE_SCORES})"),
    "level 2: scores rounded to halves": _fine(
        f"selectable({_FINE_SCORES}", f"selectable(op.Round({_FINE_SCORES[:-1]} * 2.0) * 0.5)"
    ),
    "level 2: candidates scored by the block before": _fine(
        "op.Gather(flat, spread + row, axis=0)", "op.Gather(flat, op.Max(spread + row - 1, op.Constant(value_int=0)), axis=0)"
    ),
    "level 2: the length of the cache forgotten": _fine(
        "op.Unsqueeze(op.Cast(past_len, to=INT64), [1]) + op", "op.Unsqueeze(op.Cast(past_len, to=INT64) * 0, [1]) + op"
    ),
    "attention: causal mask off by one in short calls": _attention(
        "token < op.Unsqueeze(horizon", "token <= op.Unsqueeze(horizon"
    ),
    "attention: causal mask off by one in long calls": _attention(
        "op.Unsqueeze(room, [2, 3]) > op.Range", "op.Unsqueeze(room, [2, 3]) >= op.Range"
    ),
    "attention: blocks merged without their peaks": _attention(
        "op.Exp(pair_peak - op.ReduceMax(pair_peak, [1], keepdims=1))", "op.Exp(pair_peak - pair_peak)"
    ),
    "attention: the tail's -1 read as a block": _attention(
        "op.And(op.And(blocks >= 0, blocks < num_blocks), b", "op.And(blocks < num_blocks, b"
    ),
    "attention: a repeated block counted twice in short calls": _twice(
        "used = op.And(visible, op.Not(repeated))", "used = visible"
    ),
    "attention: a repeated block counted twice in long calls": _twice(
        "used = op.And(visible, op.Equal(op.GatherElements(winner, column, axis=2), number))", "used = visible"
    ),
    "experts: groups masked by 0": _expert_route(
        "op.Unsqueeze(keep, [2]), grouped, dropped)",
        "op.Unsqueeze(keep, [2]), grouped, 0.0)",
        "layer 1 experts",
        prepare=biases_below_zero,
    ),
    "experts: weights from biased scores": _expert_route(
        "op.GatherElements(scores, ids", "op.GatherElements(choice, ids", "layer 1 experts weights"
    ),
    "experts: scores rounded absolutely": _expert_route(
        "op.Constant(value_float=1.0) / (op.Exp(op.Neg(logits)) + op.Constant(value_float=1.0))", "op.Sigmoid(logits)", _EXTREME
    ),
    "experts: the epsilon of the sum vanished": _expert_route(
        "op.Constant(value_float=SCALED_EPSILON)", "op.Constant(value_float=0.0)", _EXTREME
    ),
    "experts: the floor of the sum forgotten": _expert_route(
        "op.Max(total, floor)", "total", "layer 0 experts weights", model="hashed"
    ),
    "experts: another expert's product in short calls": _experts(
        "out = swiglu(gathered_rows(x, expert), op.Gather(gate_up, flat, axis=0), op.Gather(down, flat, axis=0))",
        "out = swiglu(gathered_rows(x, expert), op.Gather(gate_up, flat, axis=0), "
        "op.Gather(down, op.Max(flat - 1, op.Constant(value_int=0)), axis=0))",
    ),
}


def _kernel(file: str, old: str, new: str, at: str, operator: str, **needs: str) -> KernelFault:
    return KernelFault(Kernel(file, ((old, new),)), at, operator, **needs)


_LAYER_1 = "layer 1 expert output", "RoutedExperts"

KERNEL_FAULTS = {
    "level 1: own block missing": _kernel(
        "route.h", "for (int64_t j = own; j >= 0", "for (int64_t j = own - 1; j >= 0", "level 1", "CoarseRoute"
    ),
    "level 1: the lower score wins": _kernel(
        "route.h", "ranks.end(), std::greater<uint64_t>", "ranks.end(), std::less<uint64_t>", "level 1", "CoarseRoute"
    ),
    "level 2: key heads interleaved": _kernel(
        "route.h", "key_head = r * a.key_heads / a.route_heads", "key_head = r % a.key_heads", "layer 0 level 2", "FineRoute"
    ),
    "level 1: top-k off by one": _kernel(
        "route.h",
        "std::min(a.topk - forced, a.scored_topk)",
        "std::max<int64_t>(0, a.topk - forced - 1)",
        "level 1",
        "CoarseRoute",
    ),
    "attention: a repeated block counted twice": _kernel(
        "attention.h",
        "return std::unique(out, out + count) - out;",
        "return count;",
        "order and repetition of routes",
        "RoutedAttention",
    ),
    "attention: kv heads interleaved": _kernel(
        "attention.h", "kv = h * a.kv_heads / a.heads", "kv = h % a.kv_heads", "layer 0 attention", "RoutedAttention"
    ),
    "attention: scale missing in short calls": _kernel(
        "attention.h",
        "= dot[r * kDirectKeys + j] * scale;",
        "= dot[r * kDirectKeys + j];",
        "layer 0 attention",
        "RoutedAttention",
    ),
    "attention: blocks merged without their peaks": _kernel(
        "attention_tiles.h",
        "const Vector scale = exp_nonpositive(old - peak);",
        "const Vector scale = splat(1.0f);",
        "layer 0 attention",
        "RoutedAttention",
    ),
    "attention: all rows of a tile see as much": _kernel(
        "attention_tiles.h", "(used ? tile.keys[r] : keys)", "(keys)", "layer 0 attention", "RoutedAttention"
    ),
    "experts: weights from biased scores": _kernel(
        "experts.h", "used ? s.scores[expert] /", "used ? s.best[expert] /", "layer 1 experts weights", "ExpertRoute"
    ),
    "experts: the epsilon of the sum vanished": _kernel(
        "experts.h", "float total = 1e-20f;", "float total = 0.0f;", _EXTREME, "ExpertRoute"
    ),
    "experts: the floor of the sum forgotten": _kernel(
        "experts.h",
        "total = std::max(total, a.norm_floor);",
        "",
        "layer 0 experts weights",
        "ExpertRoute",
        model="hashed",
    ),
    "experts: the last column dropped for few rows": _kernel(
        "packed.h", "dots(one, row, some, width, result);", "dots(one, row, some, width - 1, result);", *_LAYER_1
    ),
}  # fmt: skip
