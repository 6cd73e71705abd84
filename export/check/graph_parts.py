"""A bundle's graph, cut at its hidden states into parts that run alone, with every selection shown and replaced by a given one.

The parts are those of ``bilevel.export.check.layered``: "words" (embedding and level 1), one per layer, "head". Each takes the
hidden state that PyTorch computed, so that a fault shows where it is and nowhere else, and memory holds one part's weights.
With PyTorch's selections forced into a part, what is computed from them can be compared tightly while the router's own choice
is judged on equal operands. All of it is surgery on a copy in memory; the shipped file stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

from bilevel.config import ModelConfig
from bilevel.contract import BY_NAME, DOMAIN
from bilevel.errors import BundleError
from bilevel.export.check.adapt import TYPES, float_ports, load_adapted
from bilevel.export.graph.schemas import ONNX_OPSET, PLUGIN_NAMESPACE
from bilevel.export.graph.sessions import Arrays, open_session
from bilevel.model import hidden_name

SELECTIONS = ("CoarseRoute", "FineRoute", "SelectBlocks", "ExpertRoute")
ROUNDING = "WriteCacheQuantized"  # which code a number gets is a choice too, near the middle between two of them
_FLOAT = ir.TensorType(ir.DataType.FLOAT)
_TYPES = {"int32": ir.TensorType(ir.DataType.INT32), "uint8": ir.TensorType(ir.DataType.UINT8)}


@dataclass(frozen=True)
class RoutedNode:
    """One routed node. operands: names of its inputs. outputs: what the graph goes on with (forced, for a selection).

    selected: for a selection or a packed cache, the names under which the node's own choice is shown. layer: None for level 1.
    """

    name: str
    op_type: str
    layer: int | None
    operands: tuple[str, ...]
    outputs: tuple[str, ...]
    selected: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass
class Part:
    """One part of the graph: its bytes, its inputs and outputs by name and the routed nodes in it."""

    name: str
    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: list[RoutedNode]
    graph: ir.Graph = field(repr=False)


class GraphParts:
    """The parts of the graph at ``path``. Raises BundleError for a graph without named hidden states.

    precision: of the bundle; what is not fp32 is emulated, and enters and leaves in fp32. executions: name -> the library with
    CPU kernels that runs the routed nodes, or None for their portable bodies.
    """

    def __init__(
        self, path: Path, config: ModelConfig, executions: Mapping[str, Path | None], precision: str = "float32"
    ) -> None:
        self.path, self.config, self.executions = path, config, dict(executions)
        self._model = load_adapted(path, precision)
        self._values = ir.convenience.create_value_mapping(self._model.graph)
        missing = [name for name in map(hidden_name, range(config.num_hidden_layers + 1)) if name not in self._values]
        if missing:
            raise BundleError(
                f"{path} names no value {missing[0]}: an older bilevel exported it, or it is of another model; export it again"
            )
        for index in range(config.num_hidden_layers + 1):
            self._values[hidden_name(index)].type = ir.TensorType(TYPES[precision])
        owners = _owners(self._model.graph, config.num_hidden_layers)
        self._functions = [ir.to_proto(function) for function in self._model.functions.values()]
        self._parts: dict[str, Part] = {}
        self._sessions: dict[tuple[str, str], Any] | None = None
        self.nodes = [self._force(node, owners[node]) for node in self._model.graph if node.domain == DOMAIN]

    def only(self, execution: str) -> GraphParts:
        """The same parts under one execution; what is opened stays open, for many runs of one part."""
        other = copy.copy(self)
        other.executions, other._sessions = {execution: self.executions[execution]}, {}
        return other

    def _force(self, node: ir.Node, layer: int | None) -> RoutedNode:
        """Turn what a selection chose, or a packed cache, into graph inputs and show the node's own under another name."""
        op = BY_NAME.get(node.op_type)
        if op is None:
            raise BundleError(
                f"{self.path} holds {DOMAIN}.{node.op_type}, which is no operator of the contract; export it again"
            )
        outputs = tuple(value.name or "" for value in node.outputs)
        selected: tuple[str, ...] = ()
        for port, value in zip(op.inputs, node.inputs, strict=True):
            if value is not None and value.type is None:
                value.type = _TYPES.get(port.dtype, _FLOAT)
        for port, value in zip(op.outputs, node.outputs, strict=True):
            value.type = _TYPES.get(port.dtype, _FLOAT)
            value.shape = None
        if node.op_type in (*SELECTIONS, ROUNDING):
            for value, name in zip(node.outputs, outputs, strict=True):
                given = ir.Value(name=name, type=value.type, shape=ir.Shape([None] * len(op.outputs[0].shape)))
                ir.convenience.replace_all_uses_with(value, given, replace_graph_outputs=True)
                value.name = f"{name}/selected"
                self._model.graph.inputs.append(given)
                self._values[name], self._values[value.name] = given, value
            selected = tuple(value.name or "" for value in node.outputs)
        attributes = {a.name: node.attributes[a.name].value for a in op.attributes if a.name in node.attributes}
        operands = tuple(value.name or "" if value is not None else "" for value in node.inputs)
        return RoutedNode(node.name or "", node.op_type, layer, operands, outputs, selected, attributes)

    def words(self) -> Part:
        """The embedding and level 1: token ids in, hidden.0 and level 1's state out."""
        state = ["token_ids", "word_block_key"] if self.config.routing.is_two_level else []
        return self._cut("words", [], [hidden_name(0), *(f"present.{name}" for name in state)], None)

    def layer(self, index: int) -> Part:
        """Layer ``index``: its hidden state and caches in and out."""
        kinds = ["key", "value", *(["block_key"] if index in self.config.routed_layers else [])]
        outputs = [hidden_name(index + 1), *(f"present.{kind}.{index}" for kind in kinds)]
        return self._cut(f"layer {index}", [hidden_name(index)], outputs, index)

    def head(self) -> Part:
        """The last norm and the output head."""
        return self._cut("head", [hidden_name(self.config.num_hidden_layers)], ["logits"], -1)

    def _cut(self, name: str, inputs: Sequence[str], outputs: Sequence[str], owner: int | None) -> Part:
        if name not in self._parts:
            self._parts[name] = self._extracted(name, inputs, outputs, owner)
        return self._parts[name]

    def _extracted(self, name: str, inputs: Sequence[str], outputs: Sequence[str], owner: int | None) -> Part:
        nodes = [node for node in self.nodes if node.layer == owner]
        graph_inputs = {value.name or "" for value in self._model.graph.inputs}
        shown = [
            operand
            for node in nodes
            for operand in (*node.operands, *(node.selected or node.outputs))
            if operand and operand not in graph_inputs and operand not in inputs
        ]
        wanted = list(dict.fromkeys([*(name for name in outputs if name not in graph_inputs), *shown]))
        missing = [value for value in wanted if value not in self._values]
        if missing:
            raise BundleError(f"{self.path} has no value {missing[0]}; export it again")
        # Shown weights (an expert's, say) are initializers: there is nothing to compute.
        wanted = [value for value in wanted if not self._values[value].is_initializer()]
        try:
            graph = ir.convenience.extract(self._model.graph, [*inputs, *graph_inputs], wanted)
        except ValueError as error:
            raise BundleError(f"{self.path} cannot be cut at {name} ({error}); export it again") from error
        for value in list(graph.inputs):
            if not value.uses() and not value.is_graph_output():
                graph.inputs.remove(value)
        float_ports(graph)
        model = ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version))
        called = {node.op_type for node in nodes}
        model.functions.extend(function for function in self._functions if function.name in called)
        return Part(
            name,
            model.SerializeToString(),
            tuple(value.name or "" for value in graph.inputs),
            tuple(value.name or "" for value in graph.outputs),
            nodes,
            graph,
        )

    def alone(self, node: RoutedNode) -> bytes:
        """A model of this node only, fp32, with the body that it has in the graph: every operand is an input, every result an
        output, by the contract's names."""
        op = BY_NAME[node.op_type]
        inputs, outputs = (
            [ir.Value(name=p.name, type=_TYPES.get(p.dtype, _FLOAT), shape=ir.Shape([None] * len(p.shape))) for p in ports]
            for ports in (op.inputs, op.outputs)
        )
        attributes = {**node.attributes, PLUGIN_NAMESPACE: DOMAIN}
        called = ir.Node(DOMAIN, op.name, inputs, ir.convenience.convert_attributes(attributes), outputs=outputs)
        imports = {"": ONNX_OPSET, DOMAIN: op.version}
        graph = ir.Graph(inputs, outputs, nodes=[called], opset_imports=imports, name=op.name)
        model = ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version))
        model.functions.extend(function for function in self._functions if function.name == op.name)
        return bytes(model.SerializeToString())

    @contextmanager
    def runner(self, part: Part, execution: str) -> Iterator[BaseRunner]:
        """A part, ready to run under one execution."""
        key = part.name, execution
        session = (self._sessions or {}).get(key) or open_session(self.path, part.model, self.executions[execution])
        if self._sessions is not None:
            self._sessions[key] = session
        with OnnxrtRunner(session, name=execution) as runner:
            yield runner


def infer(runner: BaseRunner, part: Part, feeds: Mapping[str, Any]) -> Arrays:
    """Run a part once; a graph that fails while it runs is a BundleError."""
    try:
        arrays = runner.infer({name: feeds[name] for name in part.inputs}, check_inputs=False)
    except KeyError as error:
        raise BundleError(
            f"the graph's {part.name} reads {error}, which that part of the model does not have; export it again"
        ) from None
    except Exception as error:  # ONNX Runtime raises many types
        summary = str(error).splitlines()[0][:200]
        raise BundleError(
            f"ONNX Runtime cannot run the graph's {part.name} on the check's tokens ({summary}); export it again"
        ) from error
    return Shown({name: np.asarray(value) for name, value in arrays.items()})


class Shown(dict[str, Any]):
    """Arrays by name; one that a part does not give is a BundleError."""

    def __missing__(self, name: str) -> Any:
        raise BundleError(f"the graph computes no value {name} where the model does; export it again")


def _owners(graph: ir.Graph, layers: int) -> dict[ir.Node, int | None]:
    """The layer that each routed node belongs to: that of the last hidden state it depends on, None without one."""
    last: dict[ir.Value, int] = {}
    names = {hidden_name(index): index for index in range(layers + 1)}
    owners: dict[ir.Node, int | None] = {}
    for node in graph:
        latest = max((last.get(value, -1) for value in node.inputs if value is not None), default=-1)
        if node.domain == DOMAIN:
            owners[node] = latest if latest >= 0 else None
        for value in node.outputs:
            last[value] = names.get(value.name or "", latest)
    return owners
