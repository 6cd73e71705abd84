"""Model-local functions for the routed nodes of a graph: what ONNX Runtime, and TensorRT without our library, execute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import onnx.inliner
from onnxscript import OnnxFunction

from bilevel.contract import BY_NAME, DOMAIN, ROUTED_ATTENTION_QUANTIZED, ROUTED_EXPERTS, VERSION
from bilevel.errors import ExportError
from bilevel.export.graph.bodies.attention import RoutedAttention, RoutedAttentionSinks
from bilevel.export.graph.bodies.experts import RoutedExperts, bounded_experts_body, expert_route_body
from bilevel.export.graph.bodies.experts_quantized import routed_experts_quantized_body
from bilevel.export.graph.bodies.packed_caches import BODIES as PACKED_CACHES
from bilevel.export.graph.bodies.packed_caches import EXCHANGED
from bilevel.export.graph.bodies.routes import CoarseRoute, FineRoute, SelectBlocks
from bilevel.export.graph.nodes import routed_nodes
from bilevel.export.graph.schemas import ONNX_OPSET

_BODIES: dict[str, OnnxFunction[..., Any]] = {
    body.name: body for body in (CoarseRoute, FineRoute, SelectBlocks, RoutedAttention, RoutedAttentionSinks, RoutedExperts)
}
_BY_BITS = {"RoutedExpertsQuantized": routed_experts_quantized_body, **PACKED_CACHES}


def _body(name: str, nodes: list[onnx.NodeProto]) -> OnnxFunction[..., Any]:
    """The body that serves all nodes of one operator; numbers are read from each node, what a body cannot read is fixed per
    model."""
    if name in _BY_BITS:
        widths = {next(attribute.i for attribute in node.attribute if attribute.name == "bits") for node in nodes}
        if len(widths) > 1:
            raise ExportError(
                f"the model's {name} nodes work in {sorted(widths)} bits, but one ONNX function serves all of them; "
                "use one width"
            )
        return _BY_BITS[name](widths.pop())
    if name == "RoutedExperts" and any(_changes_swiglu(node) for node in nodes):
        return bounded_experts_body()
    if name != "ExpertRoute":
        return _BODIES[name]
    ways = {(_string(node, "score_func"), _string(node, "group_score")) for node in nodes}
    if len(ways) > 1:
        raise ExportError(
            f"the model's expert gates score in {len(ways)} ways {sorted(ways)}, but one ONNX function serves all of them; "
            "use one score_func and one group_score in every expert layer"
        )
    return expert_route_body(*ways.pop())


def _changes_swiglu(node: onnx.NodeProto) -> bool:
    """Whether a RoutedExperts node says anything but SwiGLU."""
    standard = ROUTED_EXPERTS.with_defaults({})
    return any(attribute.f != standard.get(attribute.name, attribute.f) for attribute in node.attribute)


def _string(node: onnx.NodeProto, name: str) -> str:
    return next(attribute.s.decode() for attribute in node.attribute if attribute.name == name)


def _with_called(function: OnnxFunction[..., Any], nodes: list[onnx.NodeProto]) -> Iterable[onnx.FunctionProto]:
    """The function and the private helpers that it calls, directly or not. nodes: that it is for."""
    pending, seen = [function.to_function_proto()], set()
    helpers = {(f.domain, f.name): f for f in _helper_protos()}
    if function.name == ROUTED_ATTENTION_QUANTIZED.name:
        helpers = _exchanged(helpers, next(a.i for a in nodes[0].attribute if a.name == "bits"))
        _rename_calls(pending[0])
    while pending:
        proto = pending.pop()
        yield proto
        for node in _all_nodes(proto.node):
            key = (node.domain, node.op_type)
            if key in helpers and key not in seen:
                seen.add(key)
                pending.append(helpers[key])


_PACKED = ".packed"  # behind the names of helpers that read packed caches


def _exchanged(helpers: dict[tuple[str, str], onnx.FunctionProto], bits: int) -> dict[tuple[str, str], onnx.FunctionProto]:
    """The helpers under other names, with those exchanged that read caches: packed ones have codes of ``bits`` bits."""
    renamed = {}
    for domain, name in helpers:
        copy = onnx.FunctionProto()
        copy.CopyFrom(helpers[domain, EXCHANGED[bits].get(name, name)])
        copy.name = name + _PACKED
        # Both have two inputs of one meaning, whatever they are called.
        _rename_calls(copy)
        renamed[domain, copy.name] = copy
    return renamed


def _rename_calls(function: onnx.FunctionProto) -> None:
    for node in _all_nodes(function.node):
        if node.domain not in ("", DOMAIN):
            node.op_type += _PACKED


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g.node)


def _helper_protos() -> list[onnx.FunctionProto]:
    from bilevel.export.graph.bodies import attention as bodies_attention
    from bilevel.export.graph.bodies import experts as bodies_experts
    from bilevel.export.graph.bodies import experts_quantized as bodies_quantized
    from bilevel.export.graph.bodies import packed_caches as bodies_packed
    from bilevel.export.graph.bodies import routes as bodies_routes

    return [
        value.to_function_proto()
        for module in (bodies_routes, bodies_attention, bodies_experts, bodies_quantized, bodies_packed)
        for value in vars(module).values()
        if isinstance(value, OnnxFunction) and value.opset.domain != DOMAIN
    ]


def attach_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every routed node of ``model`` its portable body. Returns a new model; raises ExportError.

    Helpers are inlined into the bodies, because TensorRT's parser reads an attribute that passes through two function
    levels as 0 without a word.
    """
    by_name: dict[str, list[onnx.NodeProto]] = {}
    for node in routed_nodes(model.graph):
        if node.op_type not in BY_NAME:
            raise ExportError(f"the graph holds {DOMAIN}.{node.op_type}, which is no operator of the contract")
        by_name.setdefault(node.op_type, []).append(node)
    protos = {(p.domain, p.name): p for name, nodes in by_name.items() for p in _with_called(_body(name, nodes), nodes)}
    del model.functions[:]
    model.functions.extend(protos.values())
    known = {opset.domain for opset in model.opset_import}
    for domain, version in ((DOMAIN, VERSION), ("bilevel.private", 1)):
        if domain not in known:
            model.opset_import.append(onnx.helper.make_opsetid(domain, version))
    keep = [(DOMAIN, name) for name in by_name]
    model = onnx.inliner.inline_selected_functions(model, keep, exclude=True)
    for function in model.functions:
        del function.opset_import[:]
        function.opset_import.append(onnx.helper.make_opsetid("", ONNX_OPSET))
    used = {"", *(node.domain for node in _all_nodes(model.graph.node))}
    imports = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    return model
