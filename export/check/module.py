"""Parity of a module of one's own with the graph that ``save_onnx`` made of it, down to its routes.

    verdict = check_module(module, inputs, path)

The module runs once in PyTorch, and every call of an operator is recorded. The graph then runs in ONNX Runtime under every
execution that there is here (the portable bodies, the CPU kernels), with PyTorch's choices forced into it: each router is
judged on its own choice (``judge_selection``), each operator's operands and outputs and the graph's outputs by their error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.contract import BY_NAME, DOMAIN
from bilevel.errors import ExportError
from bilevel.export.check.adapt import load_adapted
from bilevel.export.check.choices import block_choice, expert_choices, given_choice, is_proper
from bilevel.export.check.graph_parts import SELECTIONS
from bilevel.export.check.judge import Array, Computation, ScoredChoices, Selection, judge_selection, loosen
from bilevel.export.graph.module import Inputs, flat_names
from bilevel.export.graph.sessions import Arrays, open_session, run_session
from bilevel.plugins.library.cpu import find_cpu_library

_TYPES = {"int32": ir.DataType.INT32, "uint8": ir.DataType.UINT8}


@dataclass
class ModuleVerdict:
    """What agreed: every router's choices, every tensor's error; attributes that differ, one sentence each."""

    attributes: list[str] = field(default_factory=list)
    selections: dict[str, Selection] = field(default_factory=dict)
    computations: dict[str, Computation] = field(default_factory=dict)
    executions: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        computed = all(judged.passed for judged in self.computations.values())
        return not self.attributes and computed and all(judged.passed for judged in self.selections.values())

    def lines(self) -> list[str]:
        """One sentence for every attribute that differs and every router, and one for all tensors."""
        lines = self.attributes + [
            f"{name}: {judged.rows} choices, {judged.exact} equal, {judged.excused} blocks excused at a near-tie, "
            f"{judged.unexcused} wrong{f' ({judged.example})' if judged.example else ''}"
            for name, judged in self.selections.items()
        ]
        worst = max(self.computations.values(), key=lambda judged: judged.error)
        lines.append(
            f"{len(self.computations)} tensors: largest relative error {worst.error:.1e} ({worst.name}, {worst.worst})"
        )
        return lines


@dataclass(frozen=True)
class _Node:
    """A routed node of the graph. inputs: their names. shown: names under which its own outputs are given."""

    name: str
    op_type: str
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shown: tuple[str, ...]


def check_module(module: nn.Module, inputs: Inputs, path: Path) -> ModuleVerdict:
    """Compare ``module`` on ``inputs`` (as for ``save_onnx``) with the fp32 graph at ``path``.

    Errors: ExportError where the graph holds other routed nodes than the module calls, BundleError where it cannot be run.
    """
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), ops.recorded() as calls:
            outputs = module(**{name: _copy(value) for name, value in inputs.items()})
    finally:
        module.train(was_training)
    model = load_adapted(path)
    results = list(model.graph.outputs)
    nodes = _force_selections(model, path)
    verdict = ModuleVerdict()
    if [node.op_type for node in nodes] != [call.op.name for call in calls]:
        raise ExportError(
            f"{path} holds the routed nodes {[node.op_type for node in nodes]}, but the module calls "
            f"{[call.op.name for call in calls]}; export the module again"
        )
    for number, (node, call) in enumerate(zip(nodes, calls, strict=True)):
        # Not to be seen where a body was folded for the right ones; kernels read them.
        given = call.op.with_defaults(node.attributes)
        verdict.attributes += [
            f"{number} {node.op_type}: {name} is {given.get(name)} in the graph, {value} in the module"
            for name, value in call.attributes.items()
            if _stored(given.get(name)) != _stored(value)
        ]
    library = find_cpu_library()
    executions = {"portable bodies": None, **({"CPU kernels": library} if library is not None else {})}
    verdict.executions = tuple(executions)
    feeds = _feeds(model.graph, inputs, nodes, calls)
    model_bytes = ir.to_proto(model).SerializeToString()
    for execution, chosen in executions.items():
        session = open_session(path, model_bytes, chosen)
        shown = [value.name for value in session.get_outputs()]
        values = {**feeds, **dict(zip(shown, run_session(session, shown, feeds), strict=True))}
        for number, (node, call) in enumerate(zip(nodes, calls, strict=True)):
            _judge_node(verdict, execution, f"{number} {node.op_type}", node, call, values)
        for value, tensor in zip(results, _flat(outputs), strict=True):
            maker = value.producer()
            if maker is None or maker.op_type not in SELECTIONS:  # a choice is judged as one
                _computed(verdict, execution, f"output {value.name}", values[value.name], _array(tensor))
    return verdict


def _copy(value: Any) -> Any:
    """Caches are written in place: the caller keeps theirs."""
    return value.clone() if isinstance(value, Tensor) else [tensor.clone() for tensor in value]


def _flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [tensor for value in outputs for tensor in _flat(value)]


def _stored(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().numpy())


def _force_selections(model: ir.Model, path: Path) -> list[_Node]:
    """Show every routed node's inputs and outputs; what a router chose becomes an input that the graph goes on with."""
    graph, nodes, results = model.graph, [], list(model.graph.outputs)
    graph.outputs.clear()  # a router's choice may be one of them
    for node in [node for node in graph if node.domain == DOMAIN]:
        op, outputs = BY_NAME[node.op_type], tuple(value.name or "" for value in node.outputs)
        for port, value in zip((*op.inputs, *op.outputs), (*node.inputs, *node.outputs), strict=True):
            kind = _TYPES.get(port.dtype, ir.DataType.FLOAT)
            assert value is not None  # the contract has no optional inputs
            if value.dtype not in (None, kind):
                raise ExportError(f"{path} computes in {value.dtype} at {node.name}; check the module's export in fp32")
            value.type = ir.TensorType(kind)
        if node.op_type in SELECTIONS:
            for value, name in zip(node.outputs, outputs, strict=True):
                given = ir.Value(name=name, type=value.type, shape=value.shape)
                ir.convenience.replace_all_uses_with(value, given)
                value.name = f"{name}/selected"
                graph.inputs.append(given)
        nodes.append(
            _Node(
                node.name or "",
                node.op_type,
                {each.name: node.attributes[each.name].value for each in op.attributes if each.name in node.attributes},
                tuple(value.name or "" for value in node.inputs if value is not None),
                outputs,
                tuple(value.name or "" for value in node.outputs),
            )
        )
    routed = [value for node in graph if node.domain == DOMAIN for value in (*node.inputs, *node.outputs)]
    given_values = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    shown = {id(value): value for value in (*results, *routed) if value is not None and id(value) not in given_values}
    graph.outputs.extend(shown.values())
    return nodes


def _feeds(graph: ir.Graph, inputs: Inputs, nodes: Sequence[_Node], calls: Sequence[ops.Call]) -> Arrays:
    """The graph's inputs: the module's own, and PyTorch's choices."""
    tensors = [tensor for value in inputs.values() for tensor in ([value] if isinstance(value, Tensor) else value)]
    given = dict(zip(flat_names(inputs), map(_array, tensors), strict=True))
    own = [value.name or "" for value in graph.inputs]
    feeds = {name: given[name] for name in own if name in given}
    for node, call in zip(nodes, calls, strict=True):
        if node.op_type in SELECTIONS:
            feeds |= dict(zip(node.outputs, map(_array, call.outputs), strict=True))
    missing = [name for name in own if name not in feeds]
    if missing:
        raise ExportError(f"the graph asks for {missing[0]!r}, which is none of the inputs {sorted(given)}; give all of them")
    return feeds


def _judge_node(verdict: ModuleVerdict, execution: str, name: str, node: _Node, call: ops.Call, values: Arrays) -> None:
    """One routed node: its operands, then its choice or its outputs."""
    shown = [values.get(value) for value in node.inputs]  # None: a constant of the graph
    if node.op_type in SELECTIONS:
        found = [_array(tensor) if value is None else value for value, tensor in zip(shown, call.tensors, strict=True)]
        _judge_choice(verdict, execution, name, call, found, [values[value] for value in node.shown])
        return
    for port, value, tensor in zip(call.op.inputs, shown, call.tensors, strict=True):
        if value is not None and port.dtype != "int32" and port.name not in ("k", "v"):  # a cache holds what nobody reads
            _computed(verdict, execution, f"{name} {port.name}", value, _array(tensor))
    for port, output, tensor in zip(call.op.outputs, node.shown, call.outputs, strict=True):
        _computed(verdict, execution, f"{name} {port.name}", values[output], _array(tensor))


def _judge_choice(
    verdict: ModuleVerdict, execution: str, name: str, call: ops.Call, found: Sequence[Array], selected: Sequence[Array]
) -> None:
    """One router, on what each side really had. found: its inputs in the graph. selected: its own choice there."""
    stats = verdict.selections.setdefault(name, Selection(name))
    expected, operands = _array(call.outputs[0]), [_array(tensor) for tensor in call.tensors]
    if call.op.name == "ExpertRoute":
        outer, reference = _expert_choice(call, operands, expected)
        device_outer, device = _expert_choice(call, found, selected[0])
        loosen(reference, outer, device_outer)
    else:
        reference, device = (
            _block_choice(call, arrays, routes) for arrays, routes in ((operands, expected), (found, selected[0]))
        )
        proper = is_proper(selected[0])
        if not proper.all():
            stats.unexcused += int((~proper).sum())
            stats.example = stats.example or f"{execution}: the indices are not ascending and unique with -1 behind them"
    judge_selection(stats, reference, device, execution)
    if reference.open.size:  # only what competes is ever read
        pair = [np.where(reference.open, side.score, 0.0) for side in (device, reference)]
        _computed(verdict, execution, f"{name} scores", *pair)


def _expert_choice(call: ops.Call, arrays: Sequence[Array], ids: Array) -> tuple[ScoredChoices, ScoredChoices]:
    logits, group_logits, select_bias = arrays
    return expert_choices(logits, group_logits, select_bias, ids, call.attributes)


def _block_choice(call: ops.Call, arrays: Sequence[Array], routes: Array) -> ScoredChoices:
    past_len, new_len = (array.astype(np.int64) for array in arrays[-2:])
    if call.op.name == "SelectBlocks":
        return given_choice(arrays[0], routes, past_len, new_len, call.attributes)
    candidates = arrays[2] if call.op.name == "FineRoute" else None
    return block_choice(arrays[0], arrays[1], routes, candidates, past_len, new_len, call.attributes)


def _computed(verdict: ModuleVerdict, execution: str, name: str, got: Array, exact: Array) -> None:
    verdict.computations.setdefault(name, Computation(name)).add(execution, got, exact.astype(np.float64))
