"""Smaller weights: the constant operands of a graph's matrix products in 8 or 4 bits, through ONNX Runtime's MatMulNBits, its
embedding table, through GatherBlockQuantized (``quantise_table``), and its experts, through our own RoutedExpertsQuantized
(``quantise_experts``).

Weight-only: every 32 weights along the contraction share a scale and a zero point and lie within half a step of the original;
activations stay fp32 in the file, and at run time ONNX Runtime rounds them to 8 bits inside the product (accuracy level 4); the
experts' are not rounded.
Asymmetric, because that costs no time and at 4 bits more than halves what rounding adds to the example model's held-out loss
(0.0034 nats against 0.0089 symmetric; at 8 bits both are below 0.0002).

What a product is for decides, not its name. Quantised: everything that lies on the way to the logits. Kept in fp32: what only a
router reads (its scores choose, and a choice cannot be a little wrong) and the norms. The embedding table has 8 bits in both
formats where level 1 compares its rows, else those of the format: a tied head then has the same codes, which are stored once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

from bilevel.config import ModelConfig
from bilevel.contract import DOMAIN
from bilevel.errors import ExportError
from bilevel.export.graph.blocks import BITS, BLOCK, Quantised, quantise_matrix
from bilevel.export.graph.quantise_experts import quantise_experts
from bilevel.export.graph.quantise_table import quantise_tables

FORMATS = ("fp32", *BITS)
INT8_ACTIVATIONS, FP32_ACTIVATIONS = 4, 1  # values of MatMulNBits' accuracy_level
ROUTERS = ("CoarseRoute", "FineRoute", "SelectBlocks", "ExpertRoute")
_MICROSOFT = "com.microsoft"
_SMALLEST_EXTERNAL = 1024  # bytes; what is smaller stays inside the .onnx file


def check_format(weights: str) -> None:
    """Raise ExportError for a format of weights that there is not."""
    if weights not in FORMATS:
        raise ExportError(f"weights={weights!r} is no format of weights; use one of {', '.join(FORMATS)}")


def _attribute(node: onnx_ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _matrix(node: onnx_ir.Node) -> tuple[onnx_ir.Value, bool] | None:
    """The constant right operand of a matrix product and whether it is transposed ([N, K]); None for any other node."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return None
    weight, transposed = node.inputs[1], False
    if node.op_type == "Gemm":
        if _attribute(node, "transA", 0) or _attribute(node, "alpha", 1.0) != 1 or _attribute(node, "beta", 1.0) != 1:
            return None
        if (
            len(node.inputs) > 2
            and node.inputs[2] is not None
            and (node.inputs[2].shape is None or len(node.inputs[2].shape) != 1)
        ):
            return None  # MatMulNBits adds a vector
        transposed = bool(_attribute(node, "transB", 0))
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        weight, transposed = producer.inputs[0], not transposed
    constant = weight.const_value if weight.is_initializer() else None
    is_matrix = constant is not None and constant.dtype == onnx_ir.DataType.FLOAT and len(constant.shape) == 2
    return (weight, transposed) if is_matrix else None


def _on_the_way_to(output: onnx_ir.Value) -> set[onnx_ir.Node]:
    """Every node that ``output`` is computed from other than by way of a router's choice."""
    found: set[onnx_ir.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop().producer()
        if node is None or node in found or (node.domain == DOMAIN and node.op_type in ROUTERS):
            continue
        found.add(node)
        pending += [value for value in node.inputs if value is not None]
    return found


def _replace(graph: onnx_ir.Graph, node: onnx_ir.Node, weight: onnx_ir.Value, transposed: bool, matrix: Quantised) -> None:
    """Turn ``node`` into a MatMulNBits over ``matrix``; products of one weight share its initializers."""
    operands = []
    for part, array in (("codes", matrix.codes), ("scales", matrix.scales), ("zeros", matrix.zeros)):
        name = f"{weight.name}{'.transposed' if transposed else ''}.int{matrix.bits}.{part}"
        if name not in graph.initializers:
            graph.register_initializer(onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name)))
        operands.append(graph.initializers[name])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    inputs = [node.inputs[0], *operands, *((None, bias) if bias is not None else ())]
    attributes = {"K": matrix.depth, "N": len(matrix.scales), "bits": matrix.bits, "block_size": BLOCK}
    node.domain, node.op_type, node.version = _MICROSOFT, "MatMulNBits", None
    node.attributes.clear()
    for name, value in {**attributes, "accuracy_level": INT8_ACTIVATIONS}.items():
        node.attributes[name] = onnx_ir.AttrInt64(name, value)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _drop_unused(graph: onnx_ir.Graph) -> None:
    """Remove transposes and initializers that nothing reads any more."""
    for node in list(graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _role(value: onnx_ir.Value) -> str:
    """What a weight that stays in fp32 is for."""
    users = {node.op_type for node, _ in value.uses()}
    return "router projections" if users & {"MatMul", "Gemm", "Transpose"} else "norms and tables"


def _kept(graph: onnx_ir.Graph) -> dict[str, int]:
    """Bytes of the float weights that stayed as they were, by what they are for."""
    kept: dict[str, int] = {}
    for value in graph.initializers.values():
        constant = value.const_value
        is_part = value.name is not None and value.name.endswith(".scales")
        if constant is not None and constant.dtype == onnx_ir.DataType.FLOAT and not is_part and constant.size > 1:
            kept[_role(value)] = kept.get(_role(value), 0) + constant.nbytes
    return dict(sorted(kept.items()))


def table_bits(weights: str, config: ModelConfig) -> int:
    """Bits of the embedding table in a format of small weights."""
    return 8 if config.routing.is_two_level else BITS[weights]


def quantise_graph(path: Path, weights: str, output: str = "logits", table: int | None = None) -> dict[str, Any]:
    """Rewrite the ONNX file at ``path`` and its external weights in the format ``weights``; returns its entry in the manifest.

    output: the graph output that the products to be quantised lead to. table: bits of the embedding table (None: those of the
    format). Weights are read one at a time, so that memory holds the
    small ones and a single large one. The result: format, bits, block, activations, quantised (how many products), table (its
    bits), experts (how many layers of them), kept_fp32 {what for: bytes}. Raises ExportError when there is nothing to quantise.
    """
    check_format(weights)
    if weights == "fp32":
        return {"format": weights}
    bits, path = BITS[weights], Path(path)
    model = onnx_ir.load(path)
    graph = model.graph
    wanted = _on_the_way_to(next(value for value in graph.outputs if value.name == output))
    done: dict[tuple[str | None, bool], Quantised] = {}
    count = 0
    for node in [node for node in graph if node in wanted]:
        if (found := _matrix(node)) is None:
            continue
        weight, transposed = found
        assert weight.const_value is not None
        key = (weight.name, transposed)
        if key not in done:
            values = np.array(weight.const_value.numpy())  # a copy: a view would keep the file mapped
            done[key] = quantise_matrix(values.T if transposed else values, bits)
        _replace(graph, node, weight, transposed, done[key])
        count += 1
    if not count:
        raise ExportError(f"the graph has no matrix product with constant weights to store as {weights}; use --weights fp32")
    table = BITS[weights] if table is None else table
    tables = quantise_tables(graph, table, {name: matrix for (name, transposed), matrix in done.items() if transposed})
    experts = quantise_experts(model, [node for node in graph if node in wanted], bits)
    _drop_unused(graph)
    model.opset_imports[_MICROSOFT] = 1
    _save(model, path)
    return {
        "format": weights,
        "bits": bits,
        "block": BLOCK,
        "activations": "int8",
        "quantised": count,
        **({"table": table} if tables else {}),
        "experts": experts,
        "kept_fp32": _kept(graph),
    }


def _save(model: onnx_ir.Model, path: Path) -> None:
    """Write the graph and its weights in a folder of their own first, because what stays is read from the old files."""
    data = _data_file(model, path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantise-") as folder:
        written = Path(folder) / path.name
        onnx_ir.save(model, written, external_data=data, size_threshold_bytes=_SMALLEST_EXTERNAL)
        onnx.checker.check_model(str(written))
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, path.parent / file.name)


def _data_file(model: onnx_ir.Model, path: Path) -> str:
    """The file beside ``path`` that holds its weights; the one it has, if it has one."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            return Path(value.const_value.location).name
    return path.with_suffix(".data").name


def describe(weights: Mapping[str, Any]) -> str:
    """The manifest's entry in a few words, for a terminal."""
    if weights["format"] == "fp32":
        return "fp32"
    kept = ", ".join(f"{name} {size / 1e6:.2g} MB" for name, size in weights["kept_fp32"].items())
    experts = f" and {count} layers of experts" if (count := weights.get("experts")) else ""
    table = f" and the embedding table ({bits} bits)" if (bits := weights.get("table")) else ""
    return f"{weights['format']} in {weights['quantised']} matrix products{table}{experts}; in fp32 stay: {kept}"
