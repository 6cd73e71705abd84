"""The routed nodes of a graph, and the attributes on them, against those of the model.

ONNX Runtime runs bodies that were folded for the attributes; a TensorRT plugin reads the attributes themselves. Running the graph
can therefore not show a wrong one. Nor can it show a layer that became dense where the text is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from bilevel.config import ModelConfig


class Node(Protocol):
    """What is asked of a routed node; layer is None for level 1."""

    @property
    def op_type(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def attributes(self) -> dict[str, Any]: ...


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


def structure_differences(config: ModelConfig, nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """One entry (name, operator, attribute, graph, model) for every node too few or too many and every differing attribute.

    For a count, attribute is None and graph and model are how many nodes there are. Floats are compared in fp32, as stored.
    """
    expected = expected_nodes(config)
    found: list[dict[str, Any]] = []
    for name, op_type, layer in expected:
        here = [node for node in nodes if node.op_type == op_type and node.layer == layer]
        if len(here) != 1:
            found.append({"name": name, "operator": op_type, "attribute": None, "graph": len(here), "model": 1})
        for node in here:
            wanted = expected_attributes(config, op_type, 1 if layer is None else 2)
            found += [
                {
                    "name": name,
                    "operator": op_type,
                    "attribute": key,
                    "graph": node.attributes.get(key),
                    "model": wanted.get(key),
                }
                for key in sorted(wanted.keys() | node.attributes.keys())
                if _stored(node.attributes.get(key)) != _stored(wanted.get(key))
            ]
    known = {(op_type, layer) for _, op_type, layer in expected}
    for op_type, layer in sorted({(node.op_type, node.layer) for node in nodes} - known, key=str):
        count = sum((node.op_type, node.layer) == (op_type, layer) for node in nodes)
        name = "level 1" if layer is None else f"layer {layer}"
        found.append({"name": name, "operator": op_type, "attribute": None, "graph": count, "model": 0})
    return found


def _stored(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value
