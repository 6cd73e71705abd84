"""The dense twin with its keys and values cached in 8 bits, for measurements against quantised bundles.

ONNX Runtime's GroupQueryAttention takes an int8 cache on the CPU from version 1.27 on: past and present of type int8, a scale
per cache (inputs k_scale and v_scale), the attributes k_quant_type, v_quant_type and kv_cache_bit_width. It rounds what it
writes, computes on the int8 values, and still writes in place where past and present share a buffer; what exceeds the scale's
range is cut. One scale per tensor, because that is the faster form (5 to 10 % at 32,768 cached tokens) and a twin shall not be
handicapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bilevel.errors import ExportError
from bilevel.export.graph.sessions import Arrays, load_graph, open_session, run_session

_OPERATOR = "GroupQueryAttention"
_CACHES = {"k": (3, 1), "v": (4, 2)}  # kind -> (input of the past, output of the present)
_SCALE_INPUTS = {"k": 12, "v": 13}  # where its scale goes


def cache_ranges(path: Path, token_ids: np.ndarray[Any, Any]) -> dict[str, float]:
    """{past cache: largest magnitude} after the fp32 twin at ``path`` has read ``token_ids`` [L] in one call."""
    graph = load_graph(path).graph
    length = len(token_ids)
    feeds: Arrays = {
        "input_ids": token_ids[None].astype(np.int64),
        "past_len": np.zeros(1, np.int32),
        "new_len": np.array([length], np.int32),
    }
    for port in graph.input:
        if port.name not in feeds:
            _, heads, _, width = port.type.tensor_type.shape.dim
            feeds[port.name] = np.zeros((1, heads.dim_value, length, width.dim_value), np.float32)
    caches = [name for name in feeds if name.startswith("past.")]
    outputs = [name.replace("past.", "present.", 1) for name in caches]
    present = run_session(open_session(path), outputs, feeds)
    return {name: float(np.abs(cache).max()) for name, cache in zip(caches, present, strict=True)}


def save_int8_cache(source: Path, target: Path, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """Write the twin at ``source`` with int8 caches to ``target`` in the same folder (the weights are shared); returns its
    graph.

    ranges: what the caches hold at most, by the past's name (:func:`cache_ranges`). Raises ExportError.
    """
    if Path(source).parent != Path(target).parent:
        raise ExportError(f"{target} must lie beside {source}, whose weights it reads")
    model = load_graph(source)
    nodes = [node for node in model.graph.node if node.op_type == _OPERATOR]
    if not nodes:
        raise ExportError(f"{source} has no {_OPERATOR} node, so no cache to store in 8 bits; give a dense twin")
    int8: set[str] = set()
    for node in nodes:
        node.input.extend([""] * (max(_SCALE_INPUTS.values()) + 1 - len(node.input)))
        for kind, (past, present) in _CACHES.items():
            name = node.input[past]
            if name not in ranges:
                raise ExportError(f"the range of {name} is not known; measure it with cache_ranges")
            scale = np.array([ranges[name] / 127 or 1.0], np.float32)  # an empty cache: any scale will do
            model.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}.scale"))
            node.input[_SCALE_INPUTS[kind]] = f"{name}.scale"
            node.attribute.append(onnx.helper.make_attribute(f"{kind}_quant_type", "PER_TENSOR"))
            int8 |= {name, node.output[present]}
        node.attribute.append(onnx.helper.make_attribute("kv_cache_bit_width", 8))
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.name in int8:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    onnx.save(model, target)
    return model
