"""What would make an export silently wrong, refused by name.

1. A parameter that the traced graph does not read: a router that was dropped on the way.
2. A selection that does not depend on any input: routes frozen to a constant by tracing (``.tolist()``, ``.item()``, numpy).
3. A selection that nothing routed consumes: attention or experts that would run densely.
4. A level 2 that keeps more blocks than level 1 proposes.

K over TensorRT's limit is refused earlier, by the operators themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from torch.export import ExportedProgram

from bilevel.errors import ExportError
from bilevel.export.graph.nodes import ATTENTION, routed_nodes

# For each operator that obeys a selection, or scores: which input carries them.
_SELECTION_INPUT = {
    "RoutedAttention": ("routes", 3),
    "RoutedAttentionSinks": ("routes", 3),
    "RoutedAttentionQuantized": ("routes", 3),
    "FineRoute": ("candidates", 2),
    "SelectBlocks": ("scores", 0),
    "RoutedExperts": ("ids", 1),
    "RoutedExpertsQuantized": ("ids", 1),
}
# SelectBlocks where routes become a mask of scores.
_BLOCK_CONSUMERS = (*ATTENTION, "FineRoute", "SelectBlocks")
_CONSUMERS = {
    "CoarseRoute": _BLOCK_CONSUMERS,
    "FineRoute": _BLOCK_CONSUMERS,
    "SelectBlocks": _BLOCK_CONSUMERS,
    "ExpertRoute": ("RoutedExperts", "RoutedExpertsQuantized"),
}


def check_parameters_used(program: ExportedProgram) -> None:
    """Every parameter of the module must be read by the traced graph."""
    names = program.graph_signature.inputs_to_parameters
    used_targets = {
        names[node.name] for node in program.graph.nodes if node.op == "placeholder" and node.name in names and node.users
    }
    used_tensors = {id(program.state_dict[name]) for name in used_targets}
    refuse_unused(n for n in names.values() if n not in used_targets and id(program.state_dict[n]) not in used_tensors)


def refuse_unused(parameters: Iterable[str]) -> None:
    """Raise ExportError where there is any parameter that the traced graph does not read."""
    if unused := sorted(parameters):
        raise ExportError(
            f"the traced graph never reads {len(unused)} parameter(s), the first is {unused[0]!r}: part of the model was "
            "dropped; make forward use it, or delete it from the module"
        )


def _check_room(graph: onnx.GraphProto) -> None:
    """FineRoute may keep at most as many blocks as its candidates hold."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in [*graph.value_info, *graph.input]
    }
    for node in routed_nodes(graph):
        if node.op_type != "FineRoute":
            continue
        topk = next(attribute.i for attribute in node.attribute if attribute.name == "topk")
        room = shapes.get(node.input[2], [0])[-1]
        if room and topk > room:
            raise ExportError(
                f"FineRoute ({node.name}) keeps topk={topk} blocks, but its candidates hold {room}; "
                "raise the level-1 topk or lower this one"
            )


def _ancestors(start: Iterable[str], makers: dict[str, onnx.NodeProto]) -> set[str]:
    """Names of all values that the given ones depend on, themselves included; a tensor's shape says nothing of its values."""
    seen: set[str] = set()
    pending = list(start)
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in makers and makers[name].op_type not in ("Shape", "Size"):
            pending.extend(n for n in makers[name].input if n)
    return seen


def _reads_scores(node: onnx.NodeProto) -> bool:
    """Whether what a node keeps depends on more than the lengths; a SelectBlocks that keeps none by score needs none."""
    return not any(attribute.name == "scored_topk" and attribute.i == 0 for attribute in node.attribute)


def check_selections(graph: onnx.GraphProto) -> None:
    """Selections must depend on the inputs, must be obeyed, and must fit into what the level before proposes."""
    _check_room(graph)
    makers = {output: node for node in graph.node for output in node.output}
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    obeyed: dict[str, set[str]] = {}
    for node in routed_nodes(graph):
        if node.op_type not in _SELECTION_INPUT or not _reads_scores(node):
            continue
        port, index = _SELECTION_INPUT[node.op_type]
        sources = _ancestors([node.input[index]], makers)
        if not sources & inputs:
            raise ExportError(
                f"{node.op_type} ({node.name}) has {port} that depend on no input: tracing froze the selection to a constant; "
                "compute it with tensor operations only (no .item(), .tolist() or numpy)"
            )
        obeyed.setdefault(node.op_type, set()).update(sources)
    for node in routed_nodes(graph):
        consumers = _CONSUMERS.get(node.op_type, ())
        used = any(node.output[0] in obeyed.get(consumer, ()) for consumer in consumers)
        if consumers and not used and node.output[0] not in outputs:
            work = "expert layer" if node.op_type == "ExpertRoute" else "attention"
            raise ExportError(
                f"nothing obeys the selection of {node.op_type} ({node.name}): this {work} would run densely; "
                f"pass its output to {' or '.join(consumers)} (see bilevel.ops)"
            )
