"""What a plugin carries, out of the parser and through a plan; the largest call; the workspace."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.launch.plans import plans, plans_everywhere
from bilevel.plugins.library import sweep as triton_sweep
from bilevel.plugins.tensorrt import fields as tensorrt_fields
from bilevel.plugins.tensorrt.fields import (
    FORMAT_VERSION,
    Field,
    PluginNode,
    geometry_of,
    largest_sizes,
    read_fields,
    workspace_limit,
    write_fields,
)
from tests.support.operator_calls import make_call

NAMES = [op.name for op in contract.GPU_OPS]


def node_of(name: str, tokens: int = 6) -> PluginNode:
    inputs, attributes = make_call(name, tokens)
    dtype = "float32" if contract.BY_NAME[name].has_float_type else ""
    return PluginNode(contract.BY_NAME[name], attributes, dtype, tuple(tuple(x.shape) for x in inputs.values()))


def changed(fields: list[Field], which: str, /, **changes: Any) -> list[Field]:
    return [replace(field, **changes) if field.name == which else field for field in fields]


@pytest.mark.parametrize("name", NAMES)
def test_a_node_survives_a_plan(name: str) -> None:
    node = node_of(name)
    fields = write_fields(node)
    assert fields[0] == Field("format_version", "INT32", (2,))
    assert read_fields(node.op, fields, from_plan=True) == node


@pytest.mark.parametrize("name", NAMES)
def test_the_parser_gives_attributes_alone(name: str) -> None:
    node = node_of(name)
    fields = [field for field in write_fields(node) if field.name in node.attributes]
    assert read_fields(node.op, fields, from_plan=False) == PluginNode(node.op, node.attributes)


@pytest.mark.parametrize(
    "field, changes, message",
    [
        ("format_version", {"data": (3,)}, "format version 3, this library reads 2; build the engine anew with this bilevel"),
        ("format_version", {"name": "other"}, "no format_version"),
        ("format_version", {"kind": "CHAR"}, "no format_version"),
        ("format_version", {"data": (0,)}, "no format_version"),
        ("dtype", {"data": (9,)}, "dtype is damaged"),
        ("dtype", {"data": ()}, "dtype is damaged"),
        ("dims", {"data": (1, 2)}, "dims is damaged"),
        ("dims", {"data": (-1,) * 8}, "dims is damaged"),
        ("dims", {"name": "other"}, "dims is missing"),
        ("top_k", {"name": "topk"}, "needs the attribute top_k"),
        ("top_k", {"data": (0,)}, "top_k=0 must lie between 1 and"),
        ("top_k", {"data": (1, 2)}, "has 2 values"),
        ("top_k", {"kind": "INT64"}, "of type INT64, not INT32"),
        ("scale", {"data": (float("inf"),)}, "scale=inf must be finite"),
        ("scale", {"kind": "FLOAT64"}, "of type FLOAT64"),
        ("norm_floor", {"data": (-1.0,)}, "norm_floor=-1.0 must be a finite number of at least 0"),
        ("score_func", {"data": tuple(b"cosine\0")}, "must be one of sigmoid, softmax"),
        ("score_func", {"data": ()}, "must be one of sigmoid, softmax"),
        ("score_func", {"name": "colour"}, "needs the attribute score_func"),
    ],
)
def test_damaged_fields(field: str, changes: dict[str, Any], message: str) -> None:
    node = node_of("ExpertRoute")
    with pytest.raises(ContractError, match=message):
        read_fields(node.op, changed(write_fields(node), field, **changes), from_plan=True)


def test_an_attribute_that_came_later_may_be_missing() -> None:
    node = node_of("ExpertRoute")
    older = [field for field in write_fields(node) if field.name not in ("norm_floor", "zero_fill")]
    assert read_fields(node.op, older, from_plan=True) == node


def test_an_unknown_attribute_is_refused() -> None:
    node = node_of("RoutedExperts")
    with pytest.raises(ContractError, match="has no attribute colour"):
        read_fields(node.op, [Field("colour", "INT32", (1,))], from_plan=False)


def test_bounds_that_vary_need_not_agree_but_fixed_sizes_must() -> None:
    node = node_of("RoutedAttention")
    shapes = [list(shape) for shape in node.dims]
    free = [[False] * len(shape) for shape in shapes]
    shapes[0][2] = 30  # L of q
    assert largest_sizes(node.op, shapes, free)["L"] == 30
    fixed = [[True] * len(shape) for shape in shapes]
    with pytest.raises(ContractError, match="routes has L=6, but an earlier input has L=30"):
        largest_sizes(node.op, shapes, fixed)
    with pytest.raises(ContractError, match=r"k must have shape \[B, Hkv, M, D\]"):
        largest_sizes(node.op, [shapes[0], shapes[1][:3], *shapes[2:]], free)
    with pytest.raises(ContractError, match="takes 6 inputs, got 5"):
        largest_sizes(node.op, shapes[:5], free[:5])


def test_a_doubled_size_is_halved() -> None:
    node = node_of("RoutedExperts")
    free = [[False] * len(shape) for shape in node.dims]
    sizes = largest_sizes(node.op, node.dims, free)
    assert sizes["f"] == 5
    assert node.op.input_shapes(sizes) == list(node.dims)
    odd = [*node.dims[:3], (8, 11, 6), node.dims[4]]
    with pytest.raises(ContractError, match="gate_up has 2f=11"):
        largest_sizes(node.op, odd, free)


@pytest.mark.parametrize("name", NAMES)
def test_the_workspace_of_the_largest_call_serves_every_smaller_one(name: str) -> None:
    """And is not that of a plan that would never run at the largest sizes."""
    node = node_of(name, 20)
    most = node.op.bind_shapes(node.dims)
    found = plans(node.op, geometry_of(node, most), "float32", 80)
    limit, size = workspace_limit(found, most), "T" if "T" in most else "L"
    used = []
    for tokens in range(1, most[size] + 1):
        sizes = {**most, size: tokens}
        plan = next(p for p in found if not p.when or tensorrt_fields.evaluate(p.when, sizes))
        used.append(plan.workspace_bytes(sizes))
    assert limit == max(used)


def test_workspaces_belong_to_a_format_version() -> None:
    """An engine's workspace is fixed when it is built: where a plan takes another, FORMAT_VERSION (Python and C++) grows."""
    sizes = {"B": 2, "L": 512, "U": 128, "M": 8192, "T": 1024}
    digest = sha256()
    for op in contract.GPU_OPS:
        most = {name: size for name, size in sizes.items() if name in op.symbols}
        for geometry in triton_sweep.geometries(op.name):
            for dtype in ("float16", "float32"):
                every = plans_everywhere(op, geometry, dtype).values()
                digest.update(f"{op.name} {max(workspace_limit(each, most) for each in every)}\n".encode())
    assert (FORMAT_VERSION, digest.hexdigest()[:16]) == (2, "2ecf73228357dbdf")
