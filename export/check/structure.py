"""The routed nodes of a graph, and the attributes on them, against those of the model.

ONNX Runtime runs bodies that were folded for the attributes; a TensorRT plugin reads the attributes themselves. Running the
graph can therefore not show a wrong one. Nor can it show a layer that became dense where the text is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bilevel.bundle.cache_rows import CacheRows
from bilevel.config import ModelConfig
from bilevel.contract import BY_NAME
from bilevel.contract import ROUTED_ATTENTION_QUANTIZED as PACKED_ATTENTION
from bilevel.contract import ROUTED_EXPERTS as EXPERTS
from bilevel.contract import ROUTED_EXPERTS_QUANTIZED as PACKED_EXPERTS
from bilevel.contract import UNPACK_CACHE as UNPACK
from bilevel.contract import WRITE_CACHE_QUANTIZED as WRITE
from bilevel.export.check.graph_parts import RoutedNode
from bilevel.export.graph.blocks import BITS, BLOCK
from bilevel.export.graph.nodes import ATTENTION
from bilevel.export.report.judgements import StructureDifference


def expected_nodes(config: ModelConfig, weights: str = "fp32", caches: str = "fp32") -> list[tuple[str, str, int | None]]:
    """(name in a report, operator, layer) of every routed node that the model has, its weights and caches in these formats."""
    router = "FineRoute" if config.routing.is_two_level else "CoarseRoute"
    routed = [("level 2", router)]
    attention = [] if config.routing.is_dense else [("attention", "RoutedAttention")]
    written: list[tuple[str, str]] = []
    if caches != "fp32":
        written = [("keys", WRITE.name), ("values", WRITE.name)]
        routed, attention = [("level 2 block keys", UNPACK.name), *routed], [("attention", PACKED_ATTENTION.name)]
    expert = [("experts", "ExpertRoute"), ("expert output", EXPERTS.name if weights == "fp32" else PACKED_EXPERTS.name)]
    nodes: list[tuple[str, str, int | None]] = [("level 1", "CoarseRoute", None)] if config.routing.is_two_level else []
    for layer in range(config.num_hidden_layers):
        has_experts = config.experts is not None and layer in config.experts.layers
        here = [*written, *(routed if layer in config.routed_layers else []), *attention, *(expert if has_experts else [])]
        nodes += [(f"layer {layer} {name}", op, layer) for name, op in here]
    return nodes


def expected_attributes(
    config: ModelConfig, op_type: str, layer: int | None, weights: str = "fp32", caches: str = "fp32"
) -> dict[str, Any]:
    """What a node of this operator must say in this layer; None: level 1 of the blocks."""
    packed: dict[str, int] = {} if caches == "fp32" else CacheRows.of(caches, config.head_dim).attributes
    if op_type in ("CoarseRoute", "FineRoute"):
        return dict(config.route_attributes(1 if layer is None else 2))
    if op_type in ATTENTION:
        attention = {"block_size": config.routing.block_size, "causal": 1, "scale": config.attention_scale}
        return attention if op_type == "RoutedAttention" else {**attention, **packed}
    if op_type in (WRITE.name, UNPACK.name):
        return packed if op_type == WRITE.name else {**packed, "width": config.head_dim}
    if op_type == "ExpertRoute" and config.experts is not None:
        return dict(config.experts.route_attributes(layer in config.experts.hash_layers))
    if op_type == PACKED_EXPERTS.name and weights in BITS:
        return {"bits": BITS[weights], "block_size": BLOCK}
    return {}


def structure_differences(
    config: ModelConfig, nodes: Sequence[RoutedNode], weights: str = "fp32", caches: str = "fp32"
) -> list[StructureDifference]:
    """One for every node too few or too many and every differing attribute. Floats are compared in fp32, as stored."""
    expected = expected_nodes(config, weights, caches)
    counts = Counter((op_type, layer) for _, op_type, layer in expected)
    differences: list[StructureDifference] = []
    for name, op_type, layer in expected:
        here = [node for node in nodes if (node.op_type, node.layer) == (op_type, layer)]
        if len(here) != counts[op_type, layer]:
            differences.append(StructureDifference(name, op_type, None, len(here), counts[op_type, layer]))
        meant = BY_NAME[op_type].with_defaults(expected_attributes(config, op_type, layer, weights, caches))
        differences += [
            StructureDifference(name, op_type, key, given.get(key), meant.get(key))
            for given in (BY_NAME[op_type].with_defaults(node.attributes) for node in here)
            for key in sorted(meant.keys() | given.keys())
            if _stored(given.get(key)) != _stored(meant.get(key))
        ]
    known = {(op_type, layer) for _, op_type, layer in expected}
    for op_type, layer in sorted({(node.op_type, node.layer) for node in nodes} - known, key=str):
        count = sum((node.op_type, node.layer) == (op_type, layer) for node in nodes)
        name = "level 1" if layer is None else f"layer {layer}"
        differences.append(StructureDifference(name, op_type, None, count, 0))
    return differences


def _stored(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value
