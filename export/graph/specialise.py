"""Bodies for one geometry: what a model's shapes and attributes decide is computed once, at export.

The bodies are written for every geometry, so about half of their nodes only work out sizes. Where all nodes of an operator have
the same static sizes and attributes, which is the rule, the body is folded for them; free sizes (batch, new_tokens, ...) stay
free. An operator that a model uses with several geometries keeps the general body.
"""

from __future__ import annotations

from functools import lru_cache

import onnx
import onnx.inliner
import onnx_ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript import optimizer

from bilevel.bundle.tensors import DTYPES
from bilevel.contract import BY_NAME, DOMAIN, VERSION
from bilevel.export.graph.exact_rules import exact_rules
from bilevel.export.graph.schemas import ONNX_OPSET

Shape = tuple[int | str, ...]


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, Shape]]:
    """Element type and shape of every value whose shape is known; a free size is its name."""
    known = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            dims = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim)
            known[value.name] = (tensor.elem_type, dims)
    for weight in graph.initializer:
        known[weight.name] = (weight.data_type, tuple(weight.dims))
    return known


def _geometry(node: onnx.NodeProto, known: dict[str, tuple[int, Shape]]) -> tuple[object, ...] | None:
    """What the body may be folded for: input types, static sizes and attributes; None where a shape is unknown."""
    if any(name not in known for name in node.input):
        return None
    # Equal free sizes must stay recognisable as equal, whatever a module calls them.
    inputs = tuple(known[name] for name in node.input)
    return inputs, tuple(sorted((a.name, a.SerializeToString()) for a in node.attribute))


@lru_cache(maxsize=32)
def _fold(function_bytes: bytes, node_bytes: bytes, inputs: tuple[tuple[int, Shape], ...]) -> onnx.FunctionProto:
    """The function's body with this node's attributes and static input sizes worked in, a quarter of the time of an export.

    By bytes, which can be remembered: models of one geometry, and the graphs of one model, share their bodies.
    """
    function, node = onnx.FunctionProto.FromString(function_bytes), onnx.NodeProto.FromString(node_bytes)
    op = BY_NAME[node.op_type]
    values = [
        onnx.helper.make_tensor_value_info(port.name, kind, [size if size != "" else None for size in shape])
        for port, (kind, shape) in zip(op.inputs, inputs, strict=True)
    ]
    outputs = [
        onnx.helper.make_tensor_value_info(
            name, inputs[0][0] if port.dtype == "T" else DTYPES[port.dtype].onnx_type, [None] * len(port.shape)
        )
        for port, name in zip(op.outputs, function.output, strict=True)
    ]
    call = onnx.NodeProto()
    call.CopyFrom(node)
    del call.input[:], call.output[:]
    call.input.extend(port.name for port in op.inputs)
    call.output.extend(function.output)
    imports = [onnx.helper.make_opsetid("", ONNX_OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    graph = onnx.helper.make_graph([call], op.name, values, outputs)
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10, functions=[function])
    folded = onnx_ir.from_proto(onnx.inliner.inline_local_functions(model))
    with exact_rules():
        for _ in range(2):
            optimizer.optimize(folded, num_iterations=3)
            CommonSubexpressionEliminationPass()(folded)
    body = onnx_ir.to_proto(folded).graph
    constants = [onnx.helper.make_node("Constant", [], [weight.name], value=weight) for weight in body.initializer]
    result = onnx.FunctionProto()
    result.CopyFrom(function)
    del result.node[:], result.input[:], result.value_info[:]
    result.input.extend(port.name for port in op.inputs)
    result.node.extend([*constants, *body.node])
    return result


def specialise_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold the body of every operator that the model uses with one geometry; changes and returns ``model``."""
    known = _shapes(model.graph)
    for index, function in enumerate(model.functions):
        nodes = [n for n in model.graph.node if n.domain == DOMAIN and n.op_type == function.name]
        geometries = {_geometry(node, known) for node in nodes}
        if function.domain != DOMAIN or len(geometries) != 1 or None in geometries:
            continue
        inputs = tuple(known[name] for name in nodes[0].input)
        model.functions[index].CopyFrom(_fold(function.SerializeToString(), nodes[0].SerializeToString(), inputs))
    return model
