"""Portable bodies for packed caches (``bilevel/bundle/cache_rows.py``) in standard ONNX operators.

Bytes are read and made by float arithmetic, exact for whole numbers up to 255. How many bits a code has is chosen when a body
is written; groups follow from the bytes of a row.
"""

from __future__ import annotations

from typing import Any

from onnxscript import OnnxFunction, script
from onnxscript.values import Opset

from bilevel.contract import DOMAIN
from bilevel.export.graph.bodies.attention import attend, heads_together
from bilevel.export.graph.bodies.routes import FLOAT, INT64
from bilevel.export.graph.schemas import ONNX_OPSET

op = Opset("", ONNX_OPSET)
_bilevel = Opset(DOMAIN, 1)
_private = Opset("bilevel.private", 1)
UINT8 = 2
NAN = float("nan")


@script(_private, default_opset=op)
def numbers_of_groups(codes, scales, half, width):
    """Codes [..., G, D / G] and scales [..., G, 2] (m and e), as floats: the numbers [..., D]. width: int64 [1]."""
    mantissa = op.Slice(scales, [0], [1], [-1])
    exponent = op.Slice(scales, [1], [2], [-1])
    scale = mantissa * op.Pow(op.Constant(value_float=2.0), exponent - op.Constant(value_float=120.0))
    scale = op.Where(op.Equal(exponent, op.Constant(value_float=255.0)), op.Constant(value_float=NAN), scale)
    numbers = (codes - half) * scale
    return op.Reshape(numbers, op.Concat(op.Shape(numbers, start=0, end=-2), width, axis=0))


@script(_private, default_opset=op)
def unpack_8(rows, width):
    """The numbers fp32 [..., D] of rows uint8 [..., C] in 8 bits. width: int64 [1]."""
    numbers = op.Cast(rows, to=FLOAT)
    lead = op.Shape(rows, start=0, end=-1)
    groups = op.Div(op.Shape(rows, start=-1) - width, [2])
    codes = op.Reshape(op.Slice(numbers, [0], width, [-1]), op.Concat(lead, groups, [-1], axis=0))
    end = op.Shape(rows, start=-1)
    scales = op.Reshape(op.Slice(numbers, width, end, [-1]), op.Concat(lead, groups, [2], axis=0))
    return numbers_of_groups(codes, scales, op.Constant(value_float=128.0), width)


@script(_private, default_opset=op)
def unpack_4(rows, width):
    """The same in 4 bits."""
    numbers = op.Cast(rows, to=FLOAT)
    lead = op.Shape(rows, start=0, end=-1)
    half = op.Div(width, [2])
    groups = op.Div(op.Shape(rows, start=-1) - half, [2])
    packed = op.Reshape(op.Slice(numbers, [0], half, [-1]), op.Concat(lead, groups, [-1], axis=0))
    upper = op.Floor(packed * op.Constant(value_float=0.0625))
    codes = op.Concat(packed - upper * op.Constant(value_float=16.0), upper, axis=-1)
    end = op.Shape(rows, start=-1)
    scales = op.Reshape(op.Slice(numbers, half, end, [-1]), op.Concat(lead, groups, [2], axis=0))
    return numbers_of_groups(codes, scales, op.Constant(value_float=8.0), width)


@script(_private, default_opset=op)
def bytes_of_8(codes):
    """Codes [..., G, D / G] as bytes [..., G, D / G]."""
    return codes


@script(_private, default_opset=op)
def bytes_of_4(codes):
    """A group's first half of codes in the lower halves of its bytes, the second in the upper ones."""
    lower, upper = op.Split(codes, axis=-1, num_outputs=2)
    return lower + upper * op.Constant(value_float=16.0)


@script(_private, default_opset=op)
def codes_and_scales(update, groups, most):
    """Numbers [B, H, L, D] as steps [B, H, L, G, D / G] of -most to most, and scales' m and e [B, H, L, G, 2], as floats."""
    x = op.Cast(update, to=FLOAT)
    x = op.Reshape(x, op.Concat(op.Shape(update, start=0, end=3), groups, [-1], axis=0))
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    two = op.Constant(value_float=2.0)
    finite = op.Equal(op.ReduceSum(x * zero, [-1], keepdims=1), zero)  # NaN where a number is not
    x = op.Where(finite, x, zero)
    peak = op.ReduceMax(op.Abs(x), [-1], keepdims=1)
    used = peak >= op.Constant(value_float=7.888609052210118e-31)  # 2^-100
    scale = op.Where(used, peak, one) / most
    # The logarithm may be off by its rounding near a power of two; the comparisons mend it.
    power = op.Floor(op.Log(scale) * op.Constant(value_float=1.4426950408889634)) - op.Constant(value_float=7.0)
    first = scale / op.Pow(two, power)
    power = power + op.Cast(first >= op.Constant(value_float=256.0), to=FLOAT)
    power = power - op.Cast(first < op.Constant(value_float=128.0), to=FLOAT)
    mantissa = op.Ceil(scale / op.Pow(two, power))
    too_large = mantissa > op.Constant(value_float=255.0)
    power = power + op.Cast(too_large, to=FLOAT)
    mantissa = op.Where(too_large, op.Constant(value_float=128.0), mantissa)
    steps = op.Round(op.Where(used, x, zero) / (mantissa * op.Pow(two, power)))
    exponent = op.Where(used, power + op.Constant(value_float=120.0), zero)
    exponent = op.Where(finite, exponent, op.Constant(value_float=255.0))
    return steps, op.Concat(op.Where(used, mantissa, zero), exponent, axis=-1)


@script(_private, default_opset=op)
def written(cache, rows, start):
    """The cache [B, H, M, C] with rows [B, H, L, C] from each row's ``start`` on."""
    batch = op.Shape(rows, start=0, end=1)
    heads = op.Shape(rows, start=1, end=2)
    count = op.Shape(rows, start=2, end=3)
    shape = op.Concat(batch, heads, count, axis=0)
    row = op.Unsqueeze(op.Range(0, op.Squeeze(batch), 1), [1, 2])
    head = op.Unsqueeze(op.Range(0, op.Squeeze(heads), 1), [0, 2])
    place = op.Unsqueeze(op.Cast(start, to=INT64), [1]) + op.Range(0, op.Squeeze(count), 1)
    columns = op.Concat(
        op.Unsqueeze(op.Expand(row, shape), [-1]),
        op.Unsqueeze(op.Expand(head, shape), [-1]),
        op.Unsqueeze(op.Expand(op.Unsqueeze(place, [1]), shape), [-1]),
        axis=-1,
    )
    return op.ScatterND(cache, columns, rows)


_UNPACK = {8: unpack_8, 4: unpack_4}
_BYTES = {8: bytes_of_8, 4: bytes_of_4}


def write_cache_quantized_body(bits: int) -> OnnxFunction[..., Any]:
    """The body of WriteCacheQuantized for codes of ``bits`` bits."""
    bytes_of, half, largest = _BYTES[bits], float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)

    @script(_bilevel, default_opset=op)
    def WriteCacheQuantized(update, cache, start, bits: int, groups: int):
        """The packed cache with the update, rounded, at each row's start."""
        parts = op.Reshape(op.Constant(value_int=groups), [1])
        steps, scales = codes_and_scales(update, parts, op.Constant(value_float=largest))
        flat = op.Concat(op.Shape(update, start=0, end=3), [-1], axis=0)
        codes = op.Reshape(bytes_of(steps + op.Constant(value_float=half)), flat)
        rows = op.Cast(op.Concat(codes, op.Reshape(scales, flat), axis=-1), to=UINT8)
        return written(cache, rows, start)

    return WriteCacheQuantized


def unpack_cache_body(bits: int) -> OnnxFunction[..., Any]:
    """The body of UnpackCache for codes of ``bits`` bits."""
    unpack = _UNPACK[bits]

    @script(_bilevel, default_opset=op)
    def UnpackCache(rows, bits: int, groups: int, width: int):
        """The numbers of some blocks of a packed cache."""
        return unpack(rows, op.Reshape(op.Constant(value_int=width), [1]))

    return UnpackCache


@script(_private, default_opset=op)
def width_of_queries(v, q):
    """int64 [1]: numbers of a packed value, which are those of a key."""
    return op.Shape(q, start=4, end=5)


@script(_bilevel, default_opset=op)
def RoutedAttentionQuantized(
    q, k, v, routes, past_len, new_len, block_size: int, causal: int, scale: float, bits: int, groups: int
):
    """Softmax attention over the tokens of the routed blocks of packed caches: RoutedAttention's body, but for how rows become
    numbers (``functions`` exchanges the helpers that ``EXCHANGED`` names)."""
    size = op.Reshape(op.Constant(value_int=block_size), [1])
    sees_past = op.Constant(value_int=causal)
    out, _, _ = attend(q, k, v, routes, past_len, new_len, size, sees_past, op.Constant(value_float=scale))
    return heads_together(out, q)


def routed_attention_quantized_body(bits: int) -> OnnxFunction[..., Any]:
    """The body of RoutedAttentionQuantized, whatever the bits."""
    return RoutedAttentionQuantized


# Of RoutedAttention's helpers, those that read a cache, and what reads packed rows of so many bits in their place.
EXCHANGED = {bits: {"numbers_of": unpack.name, "value_width_of": "width_of_queries"} for bits, unpack in _UNPACK.items()}
BODIES = {
    "WriteCacheQuantized": write_cache_quantized_body,
    "UnpackCache": unpack_cache_body,
    "RoutedAttentionQuantized": routed_attention_quantized_body,
}
