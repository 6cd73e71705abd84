"""A graph of a few layers -> the graph of all: what one layer became is repeated for its equals, with weights of their own.

Tracing and translating a layer costs half a second, and layers of one structure become the same nodes. So one layer of each
structure is traced, in a module whose weights are inputs (nothing can be folded into a weight, or be merged with another of
equal content), and :func:`repeat_layers` copies its nodes. What depends on no layer (positions, indices, candidates) stays as
it is and is shared, as it would be in a trace of everything.

A layer's own are its weights, its caches and the hidden state that enters it; whatever is computed from these is its own too.
A node that mixes the own of two layers cannot be told apart, and :class:`NotRepeatable` says so: trace everything then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import onnx_ir
import torch
from onnx_ir.passes.common import DeduplicateInitializersPass, LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer
from torch import Tensor

from bilevel.export.graph.schemas import PRIVATE_DOMAIN

_SIZES = ("Shape", "Size")


class NotRepeatable(Exception):
    """The traced layers are not apart from each other; a full trace is needed. Never reaches a user."""


@dataclass(frozen=True)
class Layers:
    """Which traced layer stands for which, and what belongs to whom.

    template: for every layer, in order, the traced layer of its structure; a traced layer stands for itself. hidden(i): the
    name of the value that enters layer i (and, for the number of layers, that leaves the last). own(name): the layer that the
    input, weight or output ``name`` belongs to, None for what all share. renamed(name, i): what layer i calls its counterpart.
    """

    template: Sequence[int]
    hidden: Callable[[int], str]
    own: Callable[[str], int | None]
    renamed: Callable[[str, int], str]


def repeat_layers(
    model: onnx_ir.Model, layers: Layers, inputs: Sequence[str], outputs: Sequence[str], weights: Mapping[str, Tensor]
) -> None:
    """Complete the traced ``model`` in place; inputs and outputs have their public names, ``ops.name_value`` its nodes.

    inputs, outputs: the names of the whole graph's, in order. weights: every tensor by the name that the graph shall have it
    under; those that the traced layers read are inputs of ``model``. Raises NotRepeatable; the model may be changed then.
    """
    graph = model.graph
    named = {str(node.attributes["name"].value): node for node in graph if node.domain == PRIVATE_DOMAIN}
    repeated = _Repeated(graph, layers, named, weights)
    known = {str(value.name): value for value in graph.inputs}
    for index, template in enumerate(layers.template):
        if index != template:
            known |= repeated.copy_layer(template, index, known)
    given = {str(value.name): value for value in graph.outputs}
    values = [given[name] if name in given else repeated.output(name, given) for name in outputs]
    _replace_all(graph.inputs, [known[name] for name in inputs])
    _replace_all(graph.outputs, values)
    for name, value in known.items():
        if name in weights:
            value.const_value = TorchTensor(weights[name].detach(), name=name)
            graph.register_initializer(value)
    _fold_weights(model)


def _replace_all(kept: MutableSequence[onnx_ir.Value], values: Iterable[onnx_ir.Value]) -> None:
    kept.clear()
    kept.extend(values)


class _Repeated:
    """The copies made so far: for each layer, {a template's value: its counterpart}."""

    def __init__(
        self,
        graph: onnx_ir.Graph,
        layers: Layers,
        named: Mapping[str, onnx_ir.Node],
        weights: Mapping[str, Tensor],
    ) -> None:
        self.graph, self.layers, self.named, self.weights = graph, layers, named, weights
        self.owner = self._owners()
        # In the order of the graph, before its hidden state leaves and behind (what is made of a layer's outputs at the end).
        self.nodes: dict[int, list[onnx_ir.Node]] = {}
        self.behind: dict[int, list[onnx_ir.Node]] = {}
        leaving: set[onnx_ir.Node] = set()
        for node in graph:
            if node.domain == PRIVATE_DOMAIN:
                leaving.add(node)
            elif (layer := self.owner.get(node.outputs[0])) is not None:
                place = self.behind if named[layers.hidden(layer + 1)] in leaving else self.nodes
                place.setdefault(layer, []).append(node)
        self.maps: dict[int, dict[onnx_ir.Value, onnx_ir.Value]] = {}

    def _owners(self) -> dict[onnx_ir.Value, int]:
        """The layer that each value belongs to; what all share is left out."""
        names = {self.layers.hidden(index): index for index in range(len(self.layers.template))}
        owner = {value: layer for value in self.graph.inputs if (layer := self.layers.own(str(value.name))) is not None}
        given = set(self.graph.inputs)
        for node in self.graph:
            if node.domain == PRIVATE_DOMAIN:
                found = {names[name]} if (name := str(node.attributes["name"].value)) in names else set()
            elif node.op_type in _SIZES and node.inputs[0] in given:
                found = set()  # the sizes of all layers' caches are the same
            else:
                found = {owner[value] for value in node.inputs if value in owner}
            if len(found) > 1 or any(isinstance(a.value, onnx_ir.Graph) for a in node.attributes.values()):
                raise NotRepeatable(f"{node.name} ({node.op_type}) belongs to the layers {sorted(found)}")
            owner |= {value: layer for value in node.outputs for layer in found}
        return owner

    def copy_layer(self, template: int, index: int, known: Mapping[str, onnx_ir.Value]) -> dict[str, onnx_ir.Value]:
        """Copy the nodes of ``template`` for layer ``index``; returns the graph inputs and weights that this adds, by name."""
        hidden, graph = self.layers.hidden, self.graph
        entered, left = self.named[hidden(template)], self.named[hidden(template + 1)]
        values = self.maps[index] = {entered.outputs[0]: self.named[hidden(index)].outputs[0]}
        added = {}
        for value in graph.inputs:
            if self.owner.get(value) == template:
                name = self.layers.renamed(str(value.name), index)
                values[value] = added[name] = onnx_ir.Value(name=name, type=value.type, shape=value.shape)
        goal = self.named[hidden(index + 1)]
        for node in self.nodes[template]:
            graph.insert_before(goal, self._copied(node, index, values))
        leaving = left.inputs[0]
        assert leaving is not None
        if leaving not in values:
            raise NotRepeatable(f"{leaving.name}, which leaves layer {template}, does not depend on what enters it")
        goal.replace_input_with(0, values[leaving])
        if template in self.behind:
            copies = [self._copied(node, index, values) for node in self.behind[template]]
            graph.insert_after(self.behind[max(layer for layer in self.behind if layer < index)][-1], copies)
            self.behind[index] = copies
        return added

    def _copied(self, node: onnx_ir.Node, index: int, values: dict[onnx_ir.Value, onnx_ir.Value]) -> onnx_ir.Node:
        """The node over the counterparts of its inputs, which are recorded for its outputs."""
        outputs = [onnx_ir.Value(name=f"{v.name}.{index}", type=v.type, shape=v.shape) for v in node.outputs]
        inputs = [value if value is None else values.get(value, value) for value in node.inputs]
        values |= dict(zip(node.outputs, outputs, strict=True))
        return onnx_ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            overload=node.overload,
            outputs=outputs,
            version=node.version,
            name=f"{node.name}.{index}",
        )

    def output(self, name: str, given: Mapping[str, onnx_ir.Value]) -> onnx_ir.Value:
        """The counterpart of a traced layer's output, under the name of a layer that was not traced."""
        index = self.layers.own(name)
        if index is None:
            raise NotRepeatable(f"no traced layer has an output like {name}")
        value = given.get(self.layers.renamed(name, self.layers.template[index]))
        if value is None or value not in self.maps[index]:
            raise NotRepeatable(f"no traced layer computes an output like {name}")
        counterpart = self.maps[index][value]
        counterpart.name = name
        return counterpart


def _fold_weights(model: onnx_ir.Model) -> None:
    """Compute what depends on weights alone (their transposes, mostly), by the rules of onnxscript's optimizer."""
    constant = set(model.graph.initializers.values())
    nodes = set()
    for node in model.graph:
        if node.inputs and all(value is None or value in constant for value in node.inputs):
            nodes.add(node)
            constant.update(node.outputs)
    with torch.no_grad():
        optimizer.fold_constants(model, should_fold=lambda node: None if node in nodes else False)
    for step in (RemoveUnusedNodesPass(), LiftConstantsToInitializersPass(size_limit=0), DeduplicateInitializersPass()):
        step(model)
