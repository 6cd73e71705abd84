"""A lower-precision graph as every ONNX Runtime can execute it on a CPU, meaning the same; and bf16 arrays in and out of it.

ONNX Runtime's CPU provider has next to no bf16 kernels, and fp16 it runs by casts of its own. In the emulated copy every
operator that touches the lower type reads fp32 copies of its operands, computes in fp32 and has its results rounded back: one
rounding per operator, which is what a device with fp32 accumulators does. Routed operators too are one operator each: their
bodies, and the fp32 CPU kernels that may run in their place, see fp32 only and round nothing inside. Operators that only move
numbers stay in the lower type, so that a large weight that is gathered from or a cache that is written to is not copied.
Integer and fp32 parts, graph inputs and outputs, weights and their external data stay as they are.

    session = ort.InferenceSession(emulate(model).SerializeToString(), options)
    logits, key = run(session, ["logits", "present.key.0"], {"past.key.0": to_numpy(cache), ...})
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import torch
from onnx import TensorProto
from torch import Tensor

from bilevel.bundle.tensors import DTYPES
from bilevel.contract import BY_NAME, DOMAIN
from bilevel.errors import ExportError

Array = np.ndarray[Any, Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOWER = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# They move numbers, and ONNX Runtime's CPU provider has kernels for them in both lower types (or, Cast, rounds as asked for).
_MOVES = frozenset(
    ("Cast", "Concat", "Constant", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "ScatterElements")
    + ("ScatterND", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision")
_STANDARD = ("", "ai.onnx")


def emulate(model: onnx.ModelProto | onnx_ir.Model) -> onnx.ModelProto:
    """A copy of ``model`` that computes in fp32 and rounds every result to the lower type it has in ``model`` (fp16, bf16).

    The model may be a part of a graph, its weights may be external (they are not read; the copy names the same files). A graph
    without a lower type comes back as it is. Raises ExportError where the type of a value cannot be told.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model if isinstance(model, onnx.ModelProto) else onnx_ir.to_proto(model))
    types = _types(copy)
    _Emulation(copy.graph, types).rewrite(copy.graph, {})
    for function in copy.functions:
        _widen_values(function.value_info)
        _widen_all(function.node)
    return copy


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value of the graph and of the graphs inside its nodes."""
    types = _declared(model.graph)
    if any(name not in types for name in _produced(model.graph)):
        routed = _routed(model.graph)
        for name, kind in routed.items():
            if name not in types:
                model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, None))
        types = _declared(onnx.shape_inference.infer_shapes(model).graph) | routed | types
    unknown = next((name for name in _produced(model.graph) if name not in types), None)
    if unknown is not None:
        raise ExportError(f"the type of the value {unknown} is not known; give a graph whose value_info tells it")
    return types


def _routed(graph: onnx.GraphProto) -> dict[str, int]:
    """Types of what routed nodes give: shape inference does not know their domain. Their float type is that of the caches."""
    floats = [port.type.tensor_type.elem_type for port in graph.input if port.type.tensor_type.elem_type in LOWER]
    float_type = floats[0] if floats else TensorProto.FLOAT
    return {
        name: float_type if port.dtype == "T" else DTYPES[port.dtype].onnx_type
        for node in graph.node
        if node.domain == DOMAIN and node.op_type in BY_NAME
        for port, name in zip(BY_NAME[node.op_type].outputs, node.output, strict=False)
    }


def _graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node: branches and loop bodies."""
    return [graph for attribute in node.attribute for graph in ([attribute.g] if attribute.HasField("g") else attribute.graphs)]


def _produced(graph: onnx.GraphProto) -> Iterable[str]:
    for node in graph.node:
        yield from (name for name in node.output if name)
        for inner in _graphs(node):
            yield from _produced(inner)


def _declared(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values if value.type.tensor_type.elem_type}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for inner in _graphs(node):
            types |= _declared(inner)
    return types


class _Emulation:
    """Rewrites one graph and those inside it in place. types: element type by name of a value."""

    def __init__(self, graph: onnx.GraphProto, types: dict[str, int]) -> None:
        self.types, self.taken = types, {*types, *_produced(graph)}

    def rewrite(self, graph: onnx.GraphProto, casts: Mapping[str, str]) -> None:
        """casts: the fp32 copies (by the name of their original) that the graph around this one has made so far."""
        known, nodes = dict(casts), []
        for node in graph.node:
            if inner := _graphs(node):  # control flow hands values on in whatever type they have
                for each in inner:
                    self.rewrite(each, known)
                nodes.append(node)
            elif not any(self.is_lower(name) for name in (*node.input, *node.output)) or _only_moves(node):
                nodes.append(node)
            elif node.op_type == "CastLike" and node.domain in _STANDARD:
                kind = self.types[node.output[0]]
                nodes.append(onnx.helper.make_node("Cast", node.input[:1], node.output, node.name, to=kind))
            else:
                nodes += self.widened(node, known)
        del graph.node[:]
        graph.node.extend(nodes)

    def is_lower(self, name: str) -> bool:
        return self.types.get(name) in LOWER

    def widened(self, node: onnx.NodeProto, known: dict[str, str]) -> list[onnx.NodeProto]:
        """The node in fp32: casts of operands that nobody has cast yet, the node, casts of its results."""
        before, after = [], []
        for index, name in enumerate(node.input):
            if self.is_lower(name):
                if name not in known:
                    known[name] = self.fresh(f"{name}/fp32")
                    before.append(_cast(name, known[name], TensorProto.FLOAT))
                node.input[index] = known[name]
        for index, name in enumerate(node.output):
            if self.is_lower(name):
                node.output[index] = self.fresh(f"{name}/unrounded")
                after.append(_cast(node.output[index], name, self.types[name]))
        _widen_attributes(node)
        return [*before, node, *after]

    def fresh(self, name: str) -> str:
        """``name``, or the first of name.1, name.2, ... that no value has."""
        candidate, count = name, 0
        while candidate in self.taken:
            count += 1
            candidate = f"{name}.{count}"
        self.taken.add(candidate)
        return candidate


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], target, to=kind)


def _only_moves(node: onnx.NodeProto) -> bool:
    is_sum = any(attribute.name == "reduction" and attribute.s not in (b"", b"none") for attribute in node.attribute)
    return node.op_type in _MOVES and node.domain in _STANDARD and not is_sum


def _widen_all(nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace the lower types by fp32 in everything that ``nodes`` and the graphs inside them say of types."""
    for node in nodes:
        _widen_attributes(node)
        for graph in _graphs(node):
            _widen_values((*graph.input, *graph.output, *graph.value_info))
            for tensor in graph.initializer:
                _widen_tensor(tensor)
            _widen_all(graph.node)


def _widen_values(values: Iterable[onnx.ValueInfoProto]) -> None:
    for value in values:
        if value.type.tensor_type.elem_type in LOWER:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in LOWER:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in LOWER:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def to_numpy(tensor: Tensor) -> Array:
    """A tensor's values as an array of the same type, which for bf16 is ``ml_dtypes.bfloat16``."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else np.asarray(tensor.numpy())


def from_numpy(array: Array) -> Tensor:
    """The other way round; the values are copied."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def run(session: Any, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
    """``session.run`` of ONNX Runtime that takes and gives ``ml_dtypes.bfloat16`` arrays too, which its own does not."""
    types = {port.type for port in (*session.get_inputs(), *session.get_outputs())}
    if "tensor(bfloat16)" not in types:
        return list(session.run(list(outputs), dict(feeds)))
    kept = {name: np.asarray(array, order="C") for name, array in feeds.items()}  # the values below share this memory
    values = session.run_with_ort_values(list(outputs), {name: _ort_value(array) for name, array in kept.items()})
    return [_array(value) for value in values]


def _ort_value(array: Array) -> Any:
    from onnxruntime import OrtValue

    if array.dtype == BFLOAT16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Array:
    """The contents of an OrtValue, copied."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    shape = value.shape()
    size = int(np.prod(shape))
    if not size:
        return np.zeros(shape, BFLOAT16)
    memory = (ctypes.c_uint16 * size).from_address(value.data_ptr())
    return np.ctypeslib.as_array(memory).reshape(shape).copy().view(BFLOAT16)
