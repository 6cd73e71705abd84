"""Smaller experts: ``RoutedExperts`` over constant weights becomes ``RoutedExpertsQuantized`` over packed ones.

Rounded as the matrix products are (``quantise``): 32 weights along the contraction share a scale and a zero point. Activations
are not rounded: what is left must be the definition over the rounded weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir

from bilevel.contract import DOMAIN, ROUTED_EXPERTS, ROUTED_EXPERTS_QUANTIZED, VERSION
from bilevel.export.graph.blocks import BLOCK, Array, Quantised, quantise_matrix, unpack
from bilevel.export.graph.functions import attach_functions
from bilevel.export.graph.schemas import ONNX_OPSET
from bilevel.export.graph.specialise import specialise_functions

_PARTS = ("codes", "scales", "zeros")


def pack_rows(matrix: Quantised) -> tuple[Array, Array, Array]:
    """(codes uint8 [N, P], scales fp32 [N, S], zeros uint8 [N, S]) in the contract's layout: a block's first half of codes in
    the lower halves of its bytes, and a byte for every zero point.
    """
    count, blocks = matrix.scales.shape
    zeros = np.ascontiguousarray(unpack(matrix.zeros, matrix.bits)[:, :blocks])
    codes = unpack(matrix.codes.reshape(count, -1), matrix.bits).reshape(count, blocks, 2, BLOCK // 2)
    if matrix.bits == 4:
        codes = codes[:, :, 0] | codes[:, :, 1] << 4
    return codes.reshape(count, -1), matrix.scales, zeros


def pack_experts(weight: Array, bits: int) -> tuple[Array, Array, Array]:
    """Pack fp32 [E, rows, depth] expert by expert, so that one of them is in memory: codes [E, rows, P], scales and zeros [E,
    rows, S]."""
    packed = [pack_rows(quantise_matrix(np.array(expert).T, bits)) for expert in weight]
    codes, scales, zeros = (np.stack(parts) for parts in zip(*packed, strict=True))
    return codes, scales, zeros


def _constants(node: onnx_ir.Node) -> list[onnx_ir.Value] | None:
    """gate_up and down of a RoutedExperts over fp32 initializers; None for any other node."""
    if (node.domain, node.op_type) != (DOMAIN, ROUTED_EXPERTS.name):
        return None
    standard = ROUTED_EXPERTS.with_defaults({})
    if any(name in node.attributes and node.attributes[name].value != value for name, value in standard.items()):
        return None  # packed experts know SwiGLU alone: these stay fp32
    weights = [value for value in node.inputs[3:] if value is not None and value.is_initializer()]
    is_float = all(w.const_value is not None and w.const_value.dtype == onnx_ir.DataType.FLOAT for w in weights)
    return weights if len(weights) == 2 and is_float else None


def _register(graph: onnx_ir.Graph, weight: onnx_ir.Value, bits: int) -> list[onnx_ir.Value]:
    """The initializers of the packed ``weight``; nodes with one weight share them."""
    names = [f"{weight.name}.int{bits}.{part}" for part in _PARTS]
    if names[0] not in graph.initializers:
        assert weight.const_value is not None
        for name, array in zip(names, pack_experts(weight.const_value.numpy(), bits), strict=True):
            tensor = onnx_ir.tensor(array, name=name)
            value = onnx_ir.Value(
                name=name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(array.shape), const_value=tensor
            )
            graph.register_initializer(value)
    return [graph.initializers[name] for name in names]


def quantise_experts(model: onnx_ir.Model, nodes: Iterable[onnx_ir.Node], bits: int) -> int:
    """Pack the experts of those of ``nodes`` that have constant ones, and give the graph their body; how many there are."""
    packed = []
    for node in nodes:
        if (weights := _constants(node)) is None:
            continue
        inputs = [*node.inputs[:3], *(part for weight in weights for part in _register(model.graph, weight, bits))]
        node.op_type = ROUTED_EXPERTS_QUANTIZED.name
        for attribute in ROUTED_EXPERTS.attributes:
            node.attributes.pop(attribute.name, None)
        for name, value in (("bits", bits), ("block_size", BLOCK)):
            node.attributes[name] = onnx_ir.AttrInt64(name, value)
        node.resize_inputs(len(inputs))
        for index, operand in enumerate(inputs):
            node.replace_input_with(index, operand)
        packed.append(node)
    if packed:
        _exchange_bodies(model, packed)
    return len(packed)


def _type(value: onnx_ir.Value) -> tuple[int, list[int | str | None] | None]:
    """Element type and sizes of an operand; a free size is its name."""
    shape = None if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
    return int(value.dtype or onnx_ir.DataType.FLOAT), shape


def _exchange_bodies(model: onnx_ir.Model, nodes: list[onnx_ir.Node]) -> None:
    """Attach the body of the packed ``nodes``; drop RoutedExperts' own where no node is left that runs it."""
    values = {value.name: value for node in nodes for value in node.inputs if value is not None}
    inputs = [onnx.helper.make_tensor_value_info(str(name), *_type(value)) for name, value in values.items()]
    outputs = [
        onnx.helper.make_tensor_value_info(str(node.outputs[0].name), onnx.TensorProto.FLOAT, [None, None]) for node in nodes
    ]
    graph = onnx.helper.make_graph([onnx_ir.to_proto(node) for node in nodes], "experts", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", ONNX_OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    bodies = specialise_functions(attach_functions(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)))
    for proto in bodies.functions:
        function = onnx_ir.from_proto(proto)
        model.functions[function.identifier()] = function
    if not any((node.domain, node.op_type) == (DOMAIN, ROUTED_EXPERTS.name) for node in model.graph):
        for identifier in [key for key in model.functions if key[:2] == (DOMAIN, ROUTED_EXPERTS.name)]:
            del model.functions[identifier]
