"""A smaller embedding table: Gather over constant rows becomes ONNX Runtime's GatherBlockQuantized over packed ones.

Rounded as the matrix products are (``quantise``): 32 channels of a row share a scale and a zero point. Only the rows that are
asked for are unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir

from bilevel.export.graph.blocks import BLOCK, Quantised, quantise_matrix

_MICROSOFT = "com.microsoft"


def _table(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The fp32 [V, d] initializer whose rows ``node`` gathers; None for any other node."""
    if node.domain not in ("", "ai.onnx") or node.op_type != "Gather" or node.inputs[0] is None:
        return None
    axis, table = node.attributes.get("axis"), node.inputs[0]
    constant = table.const_value if table.is_initializer() else None
    is_table = constant is not None and constant.dtype == onnx_ir.DataType.FLOAT and len(constant.shape) == 2
    return table if is_table and (axis is None or axis.as_int() == 0) else None


def quantise_tables(graph: onnx_ir.Graph, bits: int, done: Mapping[str | None, Quantised]) -> int:
    """Rewrite every gathering of constant rows; returns how many tables there were.

    done: matrices [d, V] that are rounded already, by the name of their [V, d] initializer.
    """
    rounded: dict[str | None, Quantised] = {name: matrix for name, matrix in done.items() if matrix.bits == bits}
    tables = set()
    for node in list(graph):
        if (table := _table(node)) is None:
            continue
        if table.name not in rounded:
            assert table.const_value is not None
            rounded[table.name] = quantise_matrix(np.array(table.const_value.numpy()).T, bits)
        tables.add(table.name)
        _replace(graph, node, table, rounded[table.name])
    return len(tables)


def _replace(graph: onnx_ir.Graph, node: onnx_ir.Node, table: onnx_ir.Value, matrix: Quantised) -> None:
    """Turn ``node`` into a GatherBlockQuantized; gatherings of one table share its initializers."""
    operands = []
    rows = {"codes": matrix.codes.reshape(len(matrix.codes), -1), "scales": matrix.scales, "zeros": matrix.zeros}
    for part, array in rows.items():
        name = f"{table.name}.rows.int{matrix.bits}.{part}"
        if name not in graph.initializers:
            graph.register_initializer(onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name)))
        operands.append(graph.initializers[name])
    attributes = {"bits": matrix.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    node.domain, node.op_type, node.version = _MICROSOFT, "GatherBlockQuantized", None
    node.attributes.clear()
    for name, value in attributes.items():
        node.attributes[name] = onnx_ir.AttrInt64(name, value)
    node.resize_inputs(4)
    codes, scales, zeros = operands
    for index, operand in enumerate((codes, node.inputs[1], scales, zeros)):
        node.replace_input_with(index, operand)
    if matrix.depth % BLOCK:
        _cut(graph, node, matrix.depth)


def _cut(graph: onnx_ir.Graph, node: onnx_ir.Node, width: int) -> None:
    """Cut the padding of the last block off what ``node`` gives."""
    (out,) = node.outputs
    bounds = []
    for part, number in (("first", 0), ("width", width), ("axis", -1)):
        name = f"{out.name}.{part}"
        constant = onnx_ir.tensor(np.array([number], np.int64), name=name)
        graph.register_initializer(onnx_ir.Value(name=name, const_value=constant))
        bounds.append(graph.initializers[name])
    cut = onnx_ir.Node("", "Slice", [out, *bounds], name=f"{node.name}.cut")
    given, taken = out.name, cut.outputs[0]
    taken.type, taken.shape, out.shape = out.type, out.shape, None
    onnx_ir.convenience.replace_all_uses_with(out, taken, replace_graph_outputs=True)
    cut.replace_input_with(0, out)  # its own use was replaced too
    out.name, taken.name = f"{given}.padded", given
    graph.insert_after(node, cut)
