"""The dense layers of a routed model, as TensorRT has them: ordinary attention.

A bundle's graph says them as RoutedAttention to every block, which ONNX Runtime's CPU library reads as far as the cache is
filled. Their routes are as wide as the cache has blocks; the GPU kernels are compiled for a fixed, small number.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from bilevel.export.engine.replacement import Nodes, Replacement
from bilevel.export.graph.nodes import dense_nodes

_MASK, _IDLE = "every_block.mask", "every_block.idle"


def say_as_attention(model: onnx.ModelProto) -> None:
    """Replace, in ``model``, every RoutedAttention that reads all there is by ONNX's Attention with a mask."""
    graph = model.graph
    dense = {node.name for node in dense_nodes(graph)}
    nodes, has_mask = Nodes(), False
    for node in graph.node:
        if node.name not in dense:
            nodes.append(node)
            continue
        make = Replacement(graph, node)
        if not has_mask:
            _add_mask(make)
        has_mask = True
        _add_attention(make)
        nodes += make.nodes
    del graph.node[:]
    graph.node.extend(nodes)


def _add_mask(make: Replacement) -> None:
    """What each word sees, bool [B, 1, L, M], and which words are padding, [B, 1, L, 1]; padding sees all, and gives 0."""
    q, k, _, _, past, new = make.node.input
    zero, one = make.constant("zero", 0, np.int32), make.constant("one", 1, np.int32)
    last, axes = make.constant("last", [-1], np.int64), make.constant("to_column", [1, 2, 3], np.int64)

    def count(x: str) -> str:
        size = make.add("Squeeze", make.add("Shape", x, start=2, end=3))
        return make.add("Range", zero, make.add("Cast", size, to=TensorProto.INT32), one)

    offset = make.add("Unsqueeze", count(q), last)
    past, new = (make.add("Unsqueeze", x, axes) for x in (past, new))
    idle = make.add("GreaterOrEqual", offset, new, outputs=[_IDLE])
    seen = make.add("LessOrEqual", count(k), make.add("Add", past, offset))
    make.add("Or", seen, idle, outputs=[_MASK])


def _add_attention(make: Replacement) -> None:
    """Attention in fp32; ONNX groups the query heads that share a key head as we do."""
    q, k, v, *_ = make.node.input
    wide = [make.add("Cast", x, to=TensorProto.FLOAT) for x in (q, k, v)]
    out = make.add("Attention", *wide, _MASK, scale=make.attributes["scale"])
    nothing = make.constant("nothing", 0.0, np.float32)
    make.add("CastLike", make.add("Where", _IDLE, nothing, out), q, outputs=make.node.output)
