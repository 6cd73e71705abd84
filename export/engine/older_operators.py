"""Operators of opset 23 said in older ones, for versions of TensorRT that do not import them.

What they mean is ONNX's definition of them; types are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto

from bilevel.errors import EngineError
from bilevel.export.engine.replacement import Nodes, Replacement
from bilevel.export.engine.versions import Flavour, has_attention, has_opset_23


def _rms_normalization(make: Replacement) -> None:
    """x / sqrt(mean(x * x) + epsilon) * scale over the last axis, in fp32 up to the scale."""
    x, scale = make.node.input
    if make.attributes.get("axis", -1) != -1 or make.attributes.get("stash_type", 1) != TensorProto.FLOAT:
        raise EngineError(f"{make.node.name} normalises in a way that this bilevel does not export; export the bundle anew")
    wide = make.add("Cast", x, to=TensorProto.FLOAT)
    mean = make.add("ReduceMean", make.add("Mul", wide, wide), make.constant("axes", [-1], np.int64), keepdims=1)
    epsilon = make.constant(f"epsilon.{make.attributes.get('epsilon', 1e-5)}", make.attributes.get("epsilon", 1e-5), np.float32)
    normal = make.add("Div", wide, make.add("Sqrt", make.add("Add", mean, epsilon)))
    make.add("Mul", make.add("CastLike", normal, x), scale, outputs=make.node.output)


def _rotary_embedding(make: Replacement) -> None:
    """Heads of two halves, [B, H, L, D], rotated by cos and sin [B, L, D/2]."""
    x, cos, sin, *positions = make.node.input
    if any(positions) or make.attributes.get("interleaved", 0) or make.attributes.get("rotary_embedding_dim", 0):
        raise EngineError(f"{make.node.name} rotates in a way that this bilevel does not export; export the bundle anew")
    first, second = f"{x}.{make.node.name}.first", f"{x}.{make.node.name}.second"
    make.add("Split", x, outputs=[first, second], axis=-1, num_outputs=2)
    axis = make.constant("axes", [1], np.int64)
    cos, sin = make.add("Unsqueeze", cos, axis), make.add("Unsqueeze", sin, axis)
    real = make.add("Sub", make.add("Mul", cos, first), make.add("Mul", sin, second))
    imaginary = make.add("Add", make.add("Mul", sin, first), make.add("Mul", cos, second))
    make.add("Concat", real, imaginary, outputs=make.node.output, axis=-1)


_FORMS: dict[str, Callable[[Replacement], None]] = {
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
}


def lower_operators(model: onnx.ModelProto, flavour: Flavour) -> None:
    """Replace, in ``model``, what ``flavour`` cannot read. Raises EngineError for what it cannot be given otherwise."""
    graph = model.graph
    if not has_attention(flavour) and any(node.op_type == "Attention" for node in graph.node):
        raise EngineError(
            f"{flavour.backend} {flavour.version_text} has no attention, which this dense model needs; install TensorRT 10.14 "
            "or newer"
        )
    if has_opset_23(flavour):
        return
    nodes = Nodes()
    for node in graph.node:
        if node.domain or node.op_type not in _FORMS:
            nodes.append(node)
            continue
        make = Replacement(graph, node)
        _FORMS[node.op_type](make)
        nodes += make.nodes
    del graph.node[:]
    graph.node.extend(nodes)
