"""ONNX Runtime's profile of a graph: the time of every call, by part.

What the profile shows (geometry "small", 2 cores, fp32): a decoded token of the routed graph is spent in its matrix products,
which read every weight once; the routing operators come second, and some 400 small nodes around the caches third.

Parts and how a node is recognised. ONNX Runtime names the nodes of an inlined portable body ``_inlfunc_<operator>_...``, and
the nodes of the CPU library have the operator's own type:
    level 1        CoarseRoute of a two-level model, and what is computed before it besides the parts below: embedding,
                   descriptors, and the indices that all layers share
    level 2        FineRoute (CoarseRoute where it is the only level) and the pooling of finished blocks
    attention      RoutedAttention, over packed caches too; GroupQueryAttention, which also rotates and writes the caches
    experts        ExpertRoute, RoutedExperts
    matmuls        projections, MLP and head
    other          norms, rotation, cache writes, sums and activations
    engine         ONNX Runtime between the nodes
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = ("level 1", "level 2", "attention", "experts", "matmuls", "other", "engine")
_OPERATORS = {
    "FineRoute": "level 2",
    "RoutedAttention": "attention",
    "RoutedAttentionSinks": "attention",
    "RoutedAttentionQuantized": "attention",
    "UnpackCache": "level 2",
    "GroupQueryAttention": "attention",
    "ExpertRoute": "experts",
    "RoutedExperts": "experts",
    "RoutedExpertsQuantized": "experts",
}
_MATMULS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits")
_POOLING = ("GatherND", "ReduceMean")
_EVERY_LAYER = ("RMSNormalization", "SimplifiedLayerNormalization", "RotaryEmbedding", "ScatterND", "WriteCacheQuantized")
_INLINED = re.compile(r"_inlfunc_([A-Za-z]+)_")
Event = dict[str, Any]


def read_profile(path: Path) -> list[dict[str, float]]:
    """Seconds by part of every call recorded in a profile."""
    events: list[Event] = json.loads(path.read_text(encoding="utf-8"))
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])
    nodes = sorted((e for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})), key=lambda e: e["ts"])
    has_fine = any(_operator(node) == "FineRoute" for node in nodes)
    results, position = [], 0
    for run in runs:
        end, inside = run["ts"] + run["dur"], []
        while position < len(nodes) and nodes[position]["ts"] < end:
            inside.append(nodes[position])
            position += 1
        results.append(split_call(_outermost(inside), run["dur"], has_fine))
    return results


def split_call(nodes: Sequence[Event], duration: float, has_fine: bool) -> dict[str, float]:
    """Seconds by part of one call's nodes, in order of execution; duration: the whole call in microseconds."""
    coarse = [i for i, node in enumerate(nodes) if _operator(node) == "CoarseRoute"] if has_fine else []
    last_coarse = coarse[-1] if coarse else -1
    parts = dict.fromkeys(PARTS, 0.0)
    for index, node in enumerate(nodes):
        parts[_part(node, index <= last_coarse, has_fine)] += node["dur"] / 1e6
    parts["engine"] = max(0.0, duration / 1e6 - sum(parts.values()))
    return parts


def _outermost(nodes: Sequence[Event]) -> list[Event]:
    """Without the nodes inside others: an If is recorded with its branch's nodes, whose time it includes."""
    outermost: list[Event] = []
    end = -1
    for node in sorted(nodes, key=lambda e: (e["ts"], -e["dur"])):
        if node["ts"] + node["dur"] > end or not outermost:
            outermost.append(node)
            end = node["ts"] + node["dur"]
    return outermost


def _operator(node: Event) -> str:
    """The routed operator that a node is or belongs to, else the node's own type."""
    inlined = _INLINED.match(node["name"])
    return inlined.group(1) if inlined else str(node["args"]["op_name"])


def _part(node: Event, before_level_2: bool, has_fine: bool) -> str:
    operator = _operator(node)
    if operator == "CoarseRoute":
        return "level 1" if has_fine else "level 2"
    if operator in _OPERATORS:
        return _OPERATORS[operator]
    if operator in _MATMULS:
        return "matmuls"
    if operator in _EVERY_LAYER:
        return "other"
    if before_level_2:
        return "level 1"
    return "level 2" if operator in _POOLING else "other"
