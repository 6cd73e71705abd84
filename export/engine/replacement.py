"""Other nodes in the place of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Nodes = list[onnx.NodeProto]


class Replacement:
    """Makes the nodes and constants that replace one node."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        self.graph, self.node, self.nodes = graph, node, Nodes()
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def constant(self, name: str, values: float | Sequence[float], dtype: type[np.generic]) -> str:
        """A constant, one for all nodes that replace their like."""
        name = f"{self.node.op_type}.{name}"
        if not any(each.name == name for each in self.graph.initializer):
            self.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def add(self, op: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """A node; the name of its first output."""
        names = list(outputs) or [f"{self.node.output[0]}.{len(self.nodes)}.{op}"]
        self.nodes.append(helper.make_node(op, inputs, names, f"{self.node.name}.{len(self.nodes)}", **attributes))
        return names[0]
