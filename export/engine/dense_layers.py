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
    """Replace, in ``model``, every RoutedAttention that reads all there is by products and a softmax behind a mask.

    Not by ONNX's Attention: TensorRT-RTX 1.7 has no kernel for a mask in fp32, and TensorRT before 10.14 none at all.
    """
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
    """softmax(q k^T scale) v in fp32, the query heads of a key head side by side; a word that is padding gives 0."""
    q, k, v, *_ = make.node.input
    group, last = make.constant("group", [2], np.int64), make.constant("rest", [-1], np.int64)
    scale = make.constant(f"scale.{make.attributes['scale']}", make.attributes["scale"], np.float32)
    nothing, lowest = (
        make.constant("nothing", 0.0, np.float32),
        make.constant("lowest", float(np.finfo(np.float32).min), np.float32),
    )
    wide = [make.add("Cast", x, to=TensorProto.FLOAT) for x in (q, k, v)]
    parts = [make.add("Shape", x, start=first, end=end) for x, first, end in ((q, 0, 1), (k, 1, 2), (q, 2, 4))]
    grouped = make.add("Reshape", wide[0], make.add("Concat", *parts[:2], last, parts[2], axis=0))  # [B, Hkv, G, L, D]
    keys = make.add("Transpose", make.add("Unsqueeze", wide[1], group), perm=[0, 1, 2, 4, 3])
    scores = make.add("Mul", make.add("MatMul", grouped, keys), scale)
    weights = make.add("Softmax", make.add("Where", make.add("Unsqueeze", _MASK, group), scores, lowest), axis=-1)
    out = make.add("Reshape", make.add("MatMul", weights, make.add("Unsqueeze", wide[2], group)), make.add("Shape", q))
    make.add("CastLike", make.add("Where", _IDLE, nothing, out), q, outputs=make.node.output)
