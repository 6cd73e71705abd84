"""Which geometries of the operators a graph uses: what a kernel library has to be built for."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from bilevel.bundle.tensors import ONNX_DTYPES, PRECISIONS
from bilevel.contract import BY_NAME, GPU_OPS, WRITE_CACHE, Op
from bilevel.errors import ExportError
from bilevel.export.graph.nodes import dense_nodes, routed_nodes
from bilevel.plugins.launch.plans import RUNTIME_SIZES
from bilevel.plugins.library.build import KernelRequest

Known = dict[str, tuple[int, list[int | str]]]  # value -> (element type, sizes; a name where the size is free)


def _known_values(graph: onnx.GraphProto) -> Known:
    """Type and shape of every value that the graph tells them of."""
    known: Known = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        known[value.name] = tensor.elem_type, [dim.dim_value or dim.dim_param for dim in tensor.shape.dim]
    for weight in graph.initializer:
        known[weight.name] = weight.data_type, list(weight.dims)
    return known


def _request(op: Op, node: onnx.NodeProto, known: Known) -> KernelRequest:
    geometry: dict[str, int | float | str] = {}
    dtype = "float32"
    for port, name in zip(op.inputs, node.input, strict=True):
        if not name:
            continue
        if name not in known or len(known[name][1]) != len(port.shape):
            raise ExportError(
                f"the graph does not tell the shape of {name}, an input of {node.name}; "
                "export the bundle anew with this bilevel"
            )
        kind, shape = known[name]
        if port.dtype == "T":
            dtype = ONNX_DTYPES.get(kind, f"element type {kind}")
        for dim, size in zip(port.shape, shape, strict=True):
            if dim.symbol in RUNTIME_SIZES:
                continue
            if not isinstance(size, int) or not size:
                raise ExportError(
                    f"{node.name}: {port.name} has a free size {dim}={size!r}; kernels are compiled for fixed ones, export "
                    "the model with a fixed size"
                )
            geometry[dim.symbol] = size // dim.factor
    attributes = op.with_defaults({attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute})
    for attribute in op.attributes:
        value = attributes[attribute.name]
        geometry[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return op, geometry, dtype


def _as_write(node: onnx.NodeProto) -> onnx.NodeProto:
    """WriteCache in a ScatterND's place. Its update and start have no fixed size that the cache has not."""
    return helper.make_node(WRITE_CACHE.name, [node.input[0], "", ""], node.output, node.name)


def read_requests(graph_file: Path) -> list[KernelRequest]:
    """(operator, geometry, data type) of every routed node that GPU kernels are for and of every cache of an ONNX file, equal
    ones once, in their order.

    A cache of floats is written by ScatterND, by a plugin in an engine (``export/engine/cache_writes.py``).

    Raises ExportError where the file leaves a size open that kernels are compiled for.
    """
    graph = onnx.load(str(graph_file), load_external_data=False).graph
    known = _known_values(graph)
    found: dict[str, KernelRequest] = {}
    inputs, outputs = {value.name for value in graph.input}, {value.name for value in graph.output}
    writes = [
        node for node in graph.node if node.op_type == "ScatterND" and node.input[0] in inputs and node.output[0] in outputs
    ]
    dense = {node.name for node in dense_nodes(graph)}  # ordinary attention in an engine (``export/engine/dense_layers.py``)
    routed = [node for node in routed_nodes(graph) if node.name not in dense]
    pairs = [(op, node) for node in routed if (op := BY_NAME[node.op_type]) in GPU_OPS]
    pairs += [(WRITE_CACHE, _as_write(node)) for node in writes if ONNX_DTYPES.get(known[node.input[0]][0]) in PRECISIONS]
    for op, node in pairs:
        request = _request(op, node, known)
        found.setdefault(repr((request[0].name, sorted(request[1].items()), request[2])), request)
    return list(found.values())
