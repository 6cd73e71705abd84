"""The routed nodes of a graph, and the attributes on them, against those of the model.

ONNX Runtime runs bodies that were folded for the attributes; a TensorRT plugin reads the attributes themselves. Running the
graph can therefore not show a wrong one. Nor can it show a layer that became dense where the text is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bilevel.config import ModelConfig
from bilevel.export.check.graph_parts import RoutedNode
from bilevel.export.report.judgements import StructureDifference


def expected_nodes(config: ModelConfig) -> list[tuple[str, str, int | None]]:
    """(name in a report, operator, layer) of every routed node that the model has."""
    if config.routing.is_dense:
        attention = []
    else:
        router = "FineRoute" if config.routing.is_two_level else "CoarseRoute"
        attention = [("level 2", router), ("attention", "RoutedAttention")]
    expert = [("experts", "ExpertRoute"), ("expert output", "RoutedExperts")]
    nodes: list[tuple[str, str, int | None]] = [("level 1", "CoarseRoute", None)] if config.routing.is_two_level else []
    for layer in range(config.num_hidden_layers):
        has_experts = config.experts is not None and layer in config.experts.layers
        nodes += [(f"layer {layer} {name}", op, layer) for name, op in [*attention, *(expert if has_experts else [])]]
    return nodes


def expected_attributes(config: ModelConfig, op_type: str, level: int) -> dict[str, Any]:
    """What a node of this operator must say; level: 1 or 2, for the block routers."""
    if op_type in ("CoarseRoute", "FineRoute"):
        return dict(config.route_attributes(level))
    if op_type == "RoutedAttention":
        return {"block_size": config.routing.block_size, "causal": 1, "scale": config.attention_scale}
    if op_type == "ExpertRoute" and config.experts is not None:
        return dict(config.experts.route_attributes())
    return {}


def structure_differences(config: ModelConfig, nodes: Sequence[RoutedNode]) -> list[StructureDifference]:
    """One for every node too few or too many and every differing attribute. Floats are compared in fp32, as stored."""
    expected = expected_nodes(config)
    differences: list[StructureDifference] = []
    for name, op_type, layer in expected:
        here = [node for node in nodes if (node.op_type, node.layer) == (op_type, layer)]
        if len(here) != 1:
            differences.append(StructureDifference(name, op_type, None, len(here), 1))
        meant = expected_attributes(config, op_type, 1 if layer is None else 2)
        differences += [
            StructureDifference(name, op_type, key, node.attributes.get(key), meant.get(key))
            for node in here
            for key in sorted(meant.keys() | node.attributes.keys())
            if _stored(node.attributes.get(key)) != _stored(meant.get(key))
        ]
    known = {(op_type, layer) for _, op_type, layer in expected}
    for op_type, layer in sorted({(node.op_type, node.layer) for node in nodes} - known, key=str):
        count = sum((node.op_type, node.layer) == (op_type, layer) for node in nodes)
        name = "level 1" if layer is None else f"layer {layer}"
        differences.append(StructureDifference(name, op_type, None, count, 0))
    return differences


def _stored(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value
