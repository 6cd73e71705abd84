"""What a TensorRT plugin of the contract carries, and how it travels (standard library only).

While an engine is built, a plugin gets a node's attributes as the ONNX parser gives them: INT as one INT32, FLOAT as one
FLOAT32, STRING as CHARs with a closing zero. Into the plan goes the same, in the contract's order, behind ``format_version``
(INT32) and before ``dtype`` (INT32: the model's float type as bilevel_kernels.h numbers it, 0 where the operator has none) and
``dims`` (INT64: the largest size of every axis of every input, in order; empty where no profile was seen).
``csrc/tensorrt/fields.cpp`` does the same in C++.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.launch.launches import LaunchPlan, evaluate
from bilevel.plugins.launch.plans import RUNTIME_SIZES

# Also grows with the workspace that any plan takes: an engine keeps the workspace that it was built with.
FORMAT_VERSION = 2
_FLOAT_CODES = {"": 0, **{name: contract.DTYPE_CODES[name] for name in contract.FLOAT_TYPES}}
_KINDS = {"int": "INT32", "float": "FLOAT32", "string": "CHAR"}
_EXTRA = {"format_version": "INT32", "dtype": "INT32", "dims": "INT64"}
_REMEDY = "build the engine anew: bilevel build BUNDLE"

Value = int | float | str


@dataclass(frozen=True)
class Field:
    """A TensorRT PluginField. kind: the name of its PluginFieldType; data: numbers, or the bytes of a CHAR field."""

    name: str
    kind: str
    data: Sequence[int | float]


@dataclass(frozen=True)
class PluginNode:
    """One plugin: its operator, its attributes, and what an optimisation profile said of its inputs, if it was asked.

    dtype: the model's float type, "" where unknown or not used. dims: the largest shape of every input.
    """

    op: contract.Op
    attributes: Mapping[str, Value]
    dtype: str = ""
    dims: tuple[tuple[int, ...], ...] = ()


def _value(op: contract.Op, attribute: contract.Attribute, field: Field) -> Value:
    if field.kind != _KINDS[attribute.kind]:
        raise ContractError(f"{op.name}: attribute {attribute.name} is of type {field.kind}, not {_KINDS[attribute.kind]}")
    if field.kind == "CHAR":
        return bytes(int(code) for code in field.data).partition(b"\0")[0].decode(errors="replace")
    if len(field.data) != 1:
        raise ContractError(f"{op.name}: attribute {attribute.name} has {len(field.data)} values, not 1")
    value = field.data[0]
    if field.kind == "FLOAT32" and not math.isfinite(value):
        raise ContractError(f"{op.name}: attribute {attribute.name}={value} must be finite")
    return int(value) if field.kind == "INT32" else float(value)


def _split_dims(op: contract.Op, flat: Sequence[int | float]) -> tuple[tuple[int, ...], ...]:
    ranks = [len(port.shape) for port in op.inputs]
    if len(flat) not in (0, sum(ranks)) or any(size < 0 for size in flat):
        raise ContractError(f"{op.name}: the plan's field dims is damaged; {_REMEDY}")
    sizes = iter(int(size) for size in flat)
    return tuple(tuple(next(sizes) for _ in range(rank)) for rank in ranks) if len(flat) else ()


def _extra(op: contract.Op, fields: dict[str, Field]) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """(dtype, dims) of a plan's fields, which are taken out of ``fields``."""
    version = fields.pop("format_version", None)
    if version is None or version.kind != "INT32" or len(version.data) != 1 or version.data[0] < 1:
        raise ContractError(f"{op.name}: the plan's fields have no format_version; {_REMEDY}")
    if version.data[0] != FORMAT_VERSION:
        raise ContractError(
            f"{op.name}: the plan's fields have format version {int(version.data[0])}, this library reads {FORMAT_VERSION}; "
            "build the engine anew with this bilevel: bilevel build BUNDLE"
        )
    for name in ("dtype", "dims"):
        if name not in fields or fields[name].kind != _EXTRA[name]:
            raise ContractError(f"{op.name}: the plan's field {name} is missing or damaged; {_REMEDY}")
    dtype, names = fields.pop("dtype").data, {code: name for name, code in _FLOAT_CODES.items()}
    if len(dtype) != 1 or int(dtype[0]) not in names:
        raise ContractError(f"{op.name}: the plan's field dtype is damaged; {_REMEDY}")
    return names[int(dtype[0])], _split_dims(op, fields.pop("dims").data)


def read_fields(op: contract.Op, fields: Iterable[Field], *, from_plan: bool) -> PluginNode:
    """A node from what the parser gave, or from what ``write_fields`` put into a plan. Raises ContractError."""
    left = {field.name: field for field in fields}
    dtype, dims = _extra(op, left) if from_plan else ("", ())
    known = {attribute.name: attribute for attribute in op.attributes}
    attributes = {name: _value(op, known[name], field) if name in known else 0 for name, field in left.items()}
    op.check_attributes(attributes)
    return PluginNode(op, op.with_defaults(attributes), dtype, dims)


def write_fields(node: PluginNode) -> list[Field]:
    """The fields that go into a plan."""
    fields = [Field("format_version", "INT32", (FORMAT_VERSION,))]
    for attribute in node.op.attributes:
        value = node.attributes[attribute.name]
        data = (*value.encode(), 0) if isinstance(value, str) else (value,)
        fields.append(Field(attribute.name, _KINDS[attribute.kind], data))
    fields.append(Field("dtype", "INT32", (_FLOAT_CODES[node.dtype],)))
    return [*fields, Field("dims", "INT64", tuple(size for shape in node.dims for size in shape))]


def largest_sizes(op: contract.Op, shapes: Sequence[Sequence[int]], fixed: Sequence[Sequence[bool]]) -> dict[str, int]:
    """Symbol -> its largest size. shapes: the largest of every input; fixed: which axes have that size in every call.

    Bounds of axes that vary are computed one by one and need not agree. Raises ContractError where fixed ones do not.
    """
    op.check_ranks(shapes)
    bounds: dict[str, tuple[int, bool]] = {}
    for port, shape, is_fixed in zip(op.inputs, shapes, fixed, strict=True):
        for dim, size, same in zip(port.shape, shape, is_fixed, strict=True):
            bound, was_fixed = bounds.get(dim.symbol, (size // dim.factor, same))
            if size % dim.factor or (same and was_fixed and bound * dim.factor != size):
                raise ContractError(f"{op.name}: {port.name} has {dim}={size}, but an earlier input has {dim.symbol}={bound}")
            bounds[dim.symbol] = (max(bound, size // dim.factor), same and was_fixed)
    return {symbol: bound for symbol, (bound, _) in bounds.items()}


def workspace_limit(plans: Sequence[LaunchPlan], most: Mapping[str, int]) -> int:
    """Bytes of workspace that suffice for every call whose sizes are not larger than ``most``."""
    limit = 0
    for plan in plans:
        sizes = dict(most)
        # Conditions say that L, or T, is at most so much, and buffers grow with every size: the largest size counts.
        name = "T" if "T" in most else "L"
        low, high = 0, sizes[name]
        while plan.when and low < high:
            sizes[name] = (low + high + 1) // 2
            low, high = (sizes[name], high) if evaluate(plan.when, sizes) else (low, sizes[name] - 1)
        sizes[name] = high
        limit = max(limit, plan.workspace_bytes(sizes))
    return limit


def geometry_of(node: PluginNode, sizes: Mapping[str, int]) -> dict[str, Value]:
    """What ``plans.plans`` asks for: sizes that no call changes, and the attributes."""
    return {**{name: size for name, size in sizes.items() if name not in RUNTIME_SIZES}, **node.attributes}
