"""The attributes on a graph's routed nodes against those of the model.

ONNX Runtime runs bodies that were folded for the attributes; a TensorRT plugin reads the attributes themselves. Running the graph
can therefore not show a wrong one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bilevel.config import ModelConfig


def expected_attributes(config: ModelConfig, op_type: str, label: str) -> dict[str, Any]:
    """What the node that a report calls ``label`` must say."""
    if op_type in ("CoarseRoute", "FineRoute"):
        return dict(config.route_attributes(1 if label == "level 1" else 2))
    if op_type == "RoutedAttention":
        return {"block_size": config.routing.block_size, "causal": 1, "scale": config.attention_scale}
    if op_type == "ExpertRoute" and config.experts is not None:
        return dict(config.experts.route_attributes())
    return {}


def differing_attributes(config: ModelConfig, op_type: str, label: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry (name, attribute, graph, model) for every attribute that differs; floats are compared in fp32, as stored."""
    expected = expected_attributes(config, op_type, label)

    def stored(value: Any) -> Any:
        return np.float32(value) if isinstance(value, float) else value

    return [
        {"name": label, "attribute": name, "graph": found.get(name), "model": expected.get(name)}
        for name in sorted(expected.keys() | found.keys())
        if name not in found or name not in expected or stored(found[name]) != stored(expected[name])
    ]
