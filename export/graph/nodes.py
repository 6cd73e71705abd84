"""The routed nodes of an ONNX graph."""

from __future__ import annotations

import onnx

from bilevel.contract import DOMAIN


def routed_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Every node of the ``bilevel`` domain, in graph order."""
    return [node for node in graph.node if node.domain == DOMAIN]
