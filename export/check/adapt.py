"""The graph of a bundle as a check runs it: on any CPU, with fp32 arrays in and out."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from bilevel.errors import BundleError
from bilevel.export.graph.quantise import FP32_ACTIVATIONS

TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_LOWER = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def load_adapted(path: Path, precision: str = "float32", *, emulated: bool = True, fp32_activations: bool = True) -> ir.Model:
    """The graph at ``path``, its weights still on disk.

    precision: the bundle's. emulated: a lower precision is computed in fp32 and rounded after every operator, so that kernels
    for fp32 can run it; else it is left to ONNX Runtime. fp32_activations: products with int8 or int4 weights do not round
    their activations. Raises BundleError.
    """
    try:
        model = ir.load(path)
    except Exception as error:
        raise BundleError(f"{path} is no readable ONNX file; export it again") from error
    if fp32_activations:
        keep_activations(model)
    if precision != "float32" and emulated:
        from bilevel.export.graph.emulate import emulate

        model = ir.from_proto(emulate(model))
    return model


def keep_activations(model: ir.Model) -> None:
    """Let every MatMulNBits compute with fp32 activations.

    The same weights from the same file, without the rounding of activations to 8 bits: what is left must agree with PyTorch
    over the dequantised weights as tightly as an fp32 graph.
    """
    for node in model.graph:
        if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FP32_ACTIVATIONS)


def float_ports(graph: ir.Graph) -> None:
    """Give inputs and outputs of a lower precision the type fp32: numbers of that precision go through unchanged."""
    for value in list(graph.inputs):
        if value.dtype in _LOWER:
            cast = ir.node("Cast", [value], attributes={"to": value.dtype}, num_outputs=1)
            inner = cast.outputs[0]
            inner.type, inner.shape = ir.TensorType(value.dtype), value.shape
            ir.convenience.replace_all_uses_with(value, inner, replace_graph_outputs=True)
            cast.replace_input_with(0, value)
            inner.name = f"{value.name}/stored"
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype in _LOWER:
            name = value.name
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, num_outputs=1)
            graph.append(cast)
            value.name = f"{name}/stored"
            cast.outputs[0].name, cast.outputs[0].shape = name, value.shape
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs[index] = cast.outputs[0]
