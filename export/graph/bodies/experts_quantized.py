"""Portable bodies of ``RoutedExpertsQuantized`` in standard ONNX operators: the chosen experts' weights are unpacked, no
others.

Codes are unpacked by float arithmetic, exact for whole numbers up to 255: TensorRT has no shifts, and casts uint8 to floats
only.
"""

from __future__ import annotations

from typing import Any

from onnxscript import OnnxFunction, script
from onnxscript.values import Opset

from bilevel.contract import DOMAIN
from bilevel.export.graph.bodies.experts import dispatched_sum, gathered_rows, gathered_sum, swiglu, tiles_of
from bilevel.export.graph.bodies.routes import FLOAT, INT64
from bilevel.export.graph.schemas import ONNX_OPSET

op = Opset("", ONNX_OPSET)
_bilevel = Opset(DOMAIN, 1)
_private = Opset("bilevel.private", 1)


@script(_private, default_opset=op)
def codes_of_bytes(packed):
    """[..., bytes] as [..., codes]: a byte is a code."""
    return packed


@script(_private, default_opset=op)
def codes_of_halves(packed):
    """A block's bytes as its codes: the lower halves, then the upper ones."""
    upper = op.Floor(packed * op.Constant(value_float=0.0625))
    return op.Concat(packed - upper * op.Constant(value_float=16.0), upper, axis=-1)


_CODES = {4: codes_of_halves, 8: codes_of_bytes}


@script(_private, default_opset=op)
def packed_blocks(codes, scales, expert):
    """The bytes of the experts ``expert`` [n] as floats, by blocks: [n, rows, blocks, bytes of a block]."""
    packed = op.Cast(op.Gather(codes, expert, axis=0), to=FLOAT)
    return op.Reshape(packed, op.Concat(op.Shape(expert), op.Shape(scales, start=1, end=3), [-1], axis=0))


@script(_private, default_opset=op)
def scaled_rows(blocks, scales, zeros, expert, width):
    """Codes [n, rows, blocks, block size] as the numbers that they stand for: [n, rows, width]. width: int64 [1]."""
    zero = op.Unsqueeze(op.Cast(op.Gather(zeros, expert, axis=0), to=FLOAT), [3])
    numbers = (blocks - zero) * op.Unsqueeze(op.Gather(scales, expert, axis=0), [3])
    rows = op.Reshape(numbers, op.Concat(op.Shape(numbers, start=0, end=2), [-1], axis=0))
    return op.Slice(rows, [0], width, [2])


def routed_experts_quantized_body(bits: int) -> OnnxFunction[..., Any]:
    """The body for codes of ``bits`` bits: how a byte is read is chosen when the body is written."""
    codes_of = _CODES[bits]

    @script(_bilevel, default_opset=op)
    def RoutedExpertsQuantized(
        x,
        ids,
        weights,
        gate_up_codes,
        gate_up_scales,
        gate_up_zeros,
        down_codes,
        down_scales,
        down_zeros,
        bits: int,
        block_size: int,
    ):
        """The chosen experts' SwiGLU, weighted: [T, d] like x; ids out of range are ignored."""
        given = op.Cast(ids, to=INT64)
        num_experts = op.Shape(down_codes, start=0, end=1)
        used = op.And(given >= 0, given < num_experts)
        expert = op.Where(used, given, 0)
        width = op.Shape(x, start=1, end=2)
        hidden = op.Div(op.Shape(gate_up_codes, start=1, end=2), [2])
        if op.Squeeze(op.Shape(x, start=0, end=1)) <= 4:
            flat = op.Reshape(expert, [-1])
            gate_up = codes_of(packed_blocks(gate_up_codes, gate_up_scales, flat))
            gate_up = op.CastLike(scaled_rows(gate_up, gate_up_scales, gate_up_zeros, flat, width), x)
            down = codes_of(packed_blocks(down_codes, down_scales, flat))
            down = op.CastLike(scaled_rows(down, down_scales, down_zeros, flat, hidden), x)
            out = gathered_sum(swiglu(gathered_rows(x, expert), gate_up, down), x, used, weights)
        else:
            rows, tile_expert, slot = tiles_of(x, expert, used, num_experts)
            gate_up = codes_of(packed_blocks(gate_up_codes, gate_up_scales, tile_expert))
            gate_up = op.CastLike(scaled_rows(gate_up, gate_up_scales, gate_up_zeros, tile_expert, width), x)
            down = codes_of(packed_blocks(down_codes, down_scales, tile_expert))
            down = op.CastLike(scaled_rows(down, down_scales, down_zeros, tile_expert, hidden), x)
            out = dispatched_sum(swiglu(rows, gate_up, down), slot, x, used, weights)
        return op.CastLike(out, x)

    return RoutedExpertsQuantized
