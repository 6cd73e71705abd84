"""What surgery puts into graphs: as onnxscript functions, first wrong ones, then those that are right in another way."""

from __future__ import annotations

from typing import Any

from tests.export.check.surgery import op, planted

# Faults


def take(order: list[int], along: int) -> Any:
    """The tensor with the entries of one axis in another order."""

    @planted
    def taken(x):
        return op.Gather(x, order, axis=along)

    return taken


def times(factor: float) -> Any:
    @planted
    def scaled(x):
        return op.Mul(x, op.CastLike(factor, x))

    return scaled


@planted
def next_block(blocks):
    return op.Where(blocks >= 0, blocks + 1, blocks)


@planted
def key_of_block_before(keys):
    return op.Pad(keys, [0, 0, 1, 0, 0, 0, -1, 0])


@planted
def longer_with_number(keys):
    """The key of block j times 1 + (j + 1) / 1000."""
    number = op.CumSum(keys * 0.0 + 1.0, 2)
    return keys * (1.0 + number * 0.001)


@planted
def without_third(blocks):
    column = op.Range(0, op.Squeeze(op.Shape(blocks, start=3, end=4)), 1)
    return op.Where(column == 2, -1, blocks)


@planted
def every_block(blocks, keys):
    every = op.Range(0, op.Div(op.Squeeze(op.Shape(keys, start=2, end=3)), 4), 1)
    return op.Expand(op.Cast(every, to=6), op.Concat(op.Shape(blocks, start=0, end=3), op.Shape(every), axis=0))


@planted
def ordinary_attention(q, k, v, past_len):
    offset = op.Range(0, op.Squeeze(op.Shape(q, start=2, end=3)), 1)
    position = op.Unsqueeze(op.Cast(past_len, to=7), [1]) + op.Unsqueeze(offset, [0])
    token = op.Range(0, op.Squeeze(op.Shape(k, start=2, end=3)), 1)
    return op.Attention(q, k, v, token <= op.Unsqueeze(position, [1, 3]))


@planted
def keys_not_rotated(cache, past, index, key):
    return op.ScatterND(past, index, key)


@planted
def not_pooled_again(pooled, past, index, past_len):
    """The block that the call before began keeps the mean that it had then."""
    is_begun = op.Unsqueeze(op.Mod(past_len, 4) > 0, [1, 2, 3])
    number = op.Range(0, op.Squeeze(op.Shape(pooled, start=2, end=3)), 1)
    return op.Where(op.And(is_begun, op.Unsqueeze(number, [1]) == 0), op.GatherND(past, index), pooled)


@planted
def one_position_late(index):
    return index + op.Constant(value_ints=[0, 0, 1])


@planted
def without_tail(cache, past, index):
    """A call's tokens behind its fourth are not written."""
    tail = op.Slice(index, [4], [1000], [2])
    return op.ScatterND(cache, tail, op.GatherND(past, tail))


@planted
def without_last(cache, past, index):
    last = op.Slice(index, [-1], [1000], [2])
    return op.ScatterND(cache, last, op.GatherND(past, last))


@planted
def one_token_late(tokens):
    return op.Pad(tokens, [0, 1, 0, -1])


@planted
def one_key_late(keys):
    return op.Pad(keys, [0, 0, -1, 0, 0, 0, 1, 0])


@planted
def one_less_later(position, past_len):
    """Positions are off by one, but only where the cache holds something."""
    return op.Where(op.Unsqueeze(past_len > 0, [1, 2]), position - 1.0, position)


@planted
def previous(index):
    return op.Max(index - 1, op.CastLike(0, index))


@planted
def next_expert(ids):
    return op.Mod(ids + 1, op.CastLike(6, ids))


@planted
def of_first_row(lengths):
    return op.Expand(op.Slice(lengths, [0], [1], [0]), op.Shape(lengths))


@planted
def of_next_row(rows):
    first = op.Slice(rows, [0], [1], [0])
    return op.Concat(op.Slice(rows, [1], [100000], [0]), first, axis=0)


# Written otherwise


@planted
def identity(x):
    return op.Identity(x)


@planted
def once(x):
    return op.Mul(x, 1.0)


@planted
def turned_twice(x):
    return op.Transpose(op.Transpose(x, perm=[1, 0, 3, 2]), perm=[1, 0, 3, 2])


@planted
def transposed(x):
    return op.Transpose(x, perm=[1, 0])


@planted
def split_product(x, w):
    first = op.MatMul(op.Slice(x, [0], [7], [2]), op.Slice(w, [0], [7], [0]))
    return first + op.MatMul(op.Slice(x, [7], [1000], [2]), op.Slice(w, [7], [1000], [0]))


@planted
def three_products(x, w):
    q = op.MatMul(x, op.Slice(w, [0], [32], [1]))
    k = op.MatMul(x, op.Slice(w, [32], [48], [1]))
    return op.Concat(q, k, op.MatMul(x, op.Slice(w, [48], [64], [1])), axis=2)


@planted
def product_of_columns(x, w):
    """Gemm with a transposed weight as MatMul."""
    return op.MatMul(x, op.Transpose(w, perm=[1, 0]))


@planted
def mean_as_sum(blocks):
    return op.ReduceSum(blocks, [3], keepdims=0) * 0.25


@planted
def rms_norm(x, weight):
    square = op.ReduceSum(x * x, [-1]) / 24.0
    return weight * (x / op.Sqrt(square + 1e-6))


@planted
def rotation(x, cos, sin):
    first, second = op.Split(x, axis=-1, num_outputs=2)
    c, s = op.Unsqueeze(cos, [1]), op.Unsqueeze(sin, [1])
    return op.Concat(first * c - second * s, first * s + second * c, axis=-1)


@planted
def sigmoid(x):
    return 1.0 / (1.0 + op.Exp(op.Neg(x)))


@planted
def few_ulp(x):
    """Between -3 and 3 units in the last place, another number for every entry."""
    return x * (1.0 + op.Round(op.Sin(x * 1.0e5) * 3.0) * 1.1920929e-07)


@planted
def half_ulp_of_fp16(x):
    """A number of fp16 computed otherwise: moved by up to half a unit in the last place, and rounded again."""
    wide = op.Cast(x, to=1)
    return op.CastLike(wide * (1.0 + op.Sin(wide * 1.0e5) * 4.8828125e-4), x)


@planted
def later_a_little_longer(keys):
    """The key of block j times 1 + (j + 1) * 2^-23: exact ties go to later blocks."""
    return keys * (1.0 + op.CumSum(keys * 0.0 + 1.0, 2) * 1.1920929e-07)
