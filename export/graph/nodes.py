"""The routed nodes of an ONNX graph."""

from __future__ import annotations

import onnx

from bilevel.contract import DOMAIN

ATTENTION = ("RoutedAttention", "RoutedAttentionSinks", "RoutedAttentionQuantized")


def routed_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Every node of the ``bilevel`` domain, in graph order."""
    return [node for node in graph.node if node.domain == DOMAIN]


def dense_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The attention nodes whose routes no router chose: the dense layers of a routed model."""
    makers = {output: node for node in graph.node for output in node.output}
    attention = [node for node in routed_nodes(graph) if node.op_type in ATTENTION]
    return [node for node in attention if _is_made(node.input[3], makers)]


def _is_made(routes: str, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether routes are computed without a router; an input of the graph may be a router's choice."""
    pending, seen = [routes], set[str]()
    while pending:
        name = pending.pop()
        node = makers.get(name)
        if node is None or name in seen:
            continue
        if node.domain == DOMAIN:
            return False
        seen.add(name)
        pending += [] if node.op_type == "Shape" else node.input
    return routes in makers
