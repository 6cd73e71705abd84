"""Surgery on exported bundles: how faults and harmless changes are planted in a graph, a function body or a CPU kernel.

An edit takes the ONNX model (without weights, unless it asks for them) and changes it, or returns another one. What is put into
a graph is written as an onnxscript function, as the exporter's own bodies are; bodies and kernels are changed by replacing one
snippet of their source, which must occur exactly once.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxscript import OnnxFunction, script
from onnxscript.values import Opset

from bilevel.contract import DOMAIN
from bilevel.export.decoder.bundle import describe_file
from bilevel.export.graph import functions
from bilevel.export.graph.functions import attach_functions
from bilevel.export.graph.schemas import ONNX_OPSET
from tests import ROOT
from tests.doubles.bundle import edit_manifest

Graph = onnx.GraphProto
Edit = Callable[[onnx.ModelProto], Any]
Find = Callable[[Graph], onnx.NodeProto]
Name = str | Callable[[Graph], str]

CSRC = ROOT / "plugins" / "csrc" / "ort"
op = Opset("", ONNX_OPSET)
planted = script(Opset("planted", 1), default_opset=op)


# Bundles


def update_hashes(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: m.update(files={name: describe_file(bundle / name) for name in m["files"]}))


def edit_model(bundle: Path, edit: Edit, weights: bool = False) -> None:
    """Change model.onnx (and with ``weights`` model.data) and the hashes."""
    path = bundle / "model.onnx"
    model = onnx.load(path, load_external_data=weights)
    model = edit(model) or model
    for value in model.graph.value_info:
        value.type.tensor_type.ClearField("shape")  # of what was there before
    for value in model.graph.output:
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT32:
            value.type.tensor_type.shape.dim[-1].Clear()  # what routers chose: of another width where a fault changes it
    if weights:
        (bundle / "model.data").unlink()
        onnx.save_model(model, path, save_as_external_data=True, location="model.data")
    else:
        onnx.save_model(model, path)
    update_hashes(bundle)


# Graphs


def nth(op_type: str, index: int) -> Find:
    """The index-th node of a type, in graph order."""
    return lambda graph: [node for node in graph.node if node.op_type == op_type][index]


def writer(value: str) -> Find:
    """The node that makes ``value``."""
    return lambda graph: next(node for node in graph.node if value in node.output)


def read(find: Find, port: int) -> Callable[[Graph], str]:
    """The name of what a node reads at ``port``."""
    return lambda graph: find(graph).input[port]


def feeding(find: Find, port: int) -> Find:
    """The node that makes what a node reads at ``port``."""
    return lambda graph: writer(find(graph).input[port])(graph)


def using(find: Find) -> Find:
    """The first node that reads what a node makes."""

    def found(graph: Graph) -> onnx.NodeProto:
        value = find(graph).output[0]
        return next(node for node in graph.node if value in node.input)

    return found


def named(graph: Graph, name: Name) -> str:
    return name if isinstance(name, str) else name(graph)


def inlined(function: OnnxFunction[..., Any], inputs: list[str], output: str) -> list[onnx.NodeProto]:
    """The nodes of ``function`` with one output, for these values; names inside begin with that of the output."""
    proto = function.to_function_proto()
    names = {**dict(zip(proto.input, inputs, strict=True)), proto.output[0]: output}
    nodes = []
    for node in proto.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        for values in (copied.input, copied.output):
            values[:] = [names.get(value, f"{output}.{value}" if value else "") for value in values]
        copied.name = copied.output[0]
        nodes.append(copied)
    return nodes


def place_of(graph: Graph, node: onnx.NodeProto) -> int:
    return next(index for index, other in enumerate(graph.node) if other is node or other == node)


def put(graph: Graph, place: int, nodes: list[onnx.NodeProto]) -> None:
    for offset, node in enumerate(nodes):
        graph.node.insert(place + offset, node)


def before(find: Find, port: int, function: OnnxFunction[..., Any], *others: Name) -> Edit:
    """One node reads ``function`` of what it read at ``port`` (and of ``others``) instead."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        node = find(graph)
        place, new = place_of(graph, node), f"planted.{len(graph.node)}"
        nodes = inlined(function, [node.input[port], *(named(graph, other) for other in others)], new)
        node.input[port] = new
        put(graph, place, nodes)

    return edit


def after(find: Find, function: OnnxFunction[..., Any], *others: Name, state_only: bool = False) -> Edit:
    """``function`` of what a node makes (and of ``others``) takes its place.

    state_only: only as an output of the graph, so that this call still reads the right value and later ones do not.
    """

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        node = find(graph)
        place, old = place_of(graph, node), node.output[0]
        right = f"{old}.right"
        nodes = inlined(function, [right, *(named(graph, other) for other in others)], old)  # before the renaming
        node.output[0] = right
        if state_only:
            for other in graph.node:
                other.input[:] = [right if name == old else name for name in other.input]
        put(graph, place + 1, nodes)

    return edit


def swap_outputs(one: str, other: str) -> Edit:
    """Two outputs of the graph change places; inside the call everything stays right."""

    def edit(model: onnx.ModelProto) -> None:
        names = {one: f"{one}.right", other: f"{other}.right"}
        for node in model.graph.node:
            for values in (node.input, node.output):
                values[:] = [names.get(value, value) for value in values]
        for output, source in ((one, names[other]), (other, names[one])):
            model.graph.node.append(helper.make_node("Identity", [source], [output]))

    return edit


def replace_node(find: Find, op_type: str, ports: list[int], **attributes: Any) -> Edit:
    """A node becomes another operator on some of its inputs."""

    def edit(model: onnx.ModelProto) -> None:
        node = find(model.graph)
        inputs = [node.input[port] for port in ports]
        node.CopyFrom(helper.make_node(op_type, inputs, list(node.output)[:1], node.name, **attributes))

    return edit


def replace_by(find: Find, function: OnnxFunction[..., Any], *others: Name) -> Edit:
    """A node becomes ``function`` of ``others``."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        node = find(graph)
        nodes = inlined(function, [named(graph, other) for other in others], node.output[0])
        place = place_of(graph, node)
        del graph.node[place]
        put(graph, place, nodes)

    return edit


def swap_reads(one: Find, one_port: int, other: Find, other_port: int) -> Edit:
    """Two nodes read each other's inputs."""

    def edit(model: onnx.ModelProto) -> None:
        a, b = one(model.graph), other(model.graph)
        a.input[one_port], b.input[other_port] = b.input[other_port], a.input[one_port]

    return edit


def set_attribute(op_type: str, index: int, name: str, value: Any, *, follow: bool = True) -> Edit:
    """Another attribute of a routed node; ``follow``: its body reads it, else it stays folded for the right one."""

    def edit(model: onnx.ModelProto) -> onnx.ModelProto:
        (attribute,) = (a for a in nth(op_type, index)(model.graph).attribute if a.name == name)
        attribute.CopyFrom(helper.make_attribute(name, value))
        return attach_functions(model) if follow else model

    return edit


def change_weight(name: Name, change: Callable[[np.ndarray], Any]) -> Edit:
    """Edit an initializer: ``change`` works in place or returns the new array."""

    def edit(model: onnx.ModelProto) -> None:
        wanted = named(model.graph, name)
        (tensor,) = (t for t in model.graph.initializer if t.name == wanted)
        values = numpy_helper.to_array(tensor).copy()
        result = change(values)
        tensor.CopyFrom(numpy_helper.from_array(values if result is None else np.ascontiguousarray(result), wanted))

    return edit


def all_of(*edits: Edit) -> Edit:
    """One edit after another."""

    def edit(model: onnx.ModelProto) -> onnx.ModelProto:
        for each in edits:
            model = each(model) or model
        return model

    return edit


# Bodies and kernels


def replaced(source: Path, changes: Iterable[tuple[str, str]]) -> str:
    """The text of a source file with every ``old`` in it as ``new``; each must occur exactly once."""
    text = source.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"{source.name} holds {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


@contextmanager
def changed_module(source: Path, changes: Iterable[tuple[str, str]]) -> Iterator[Any]:
    """A module of its own from a changed source, which onnxscript can read while the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.name
        path.write_text(replaced(source, changes), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"changed_{source.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with patch.dict(sys.modules, {spec.name: module}):
            spec.loader.exec_module(module)
            yield module


def body(op_type: str, module: Any, *changes: tuple[str, str]) -> Edit:
    """The body of one operator from a changed source: (old, new) snippets of the exporter's ``module``."""

    def edit(model: onnx.ModelProto) -> None:
        helpers = {f.name: f for f in functions._helper_protos()}
        with changed_module(Path(module.__file__), changes) as changed:
            own = [f for f in vars(changed).values() if isinstance(f, OnnxFunction)]
            helpers |= {f.name: f.to_function_proto() for f in own if f.opset.domain != DOMAIN}
            expert_route = getattr(changed, "expert_route_body", functions.expert_route_body)
            with (
                patch.dict(functions._BY_BITS, getattr(changed, "BODIES", {})),
                patch.dict(functions._BODIES, {f.name: f for f in own if f.opset.domain == DOMAIN}),
                patch.object(functions, "_helper_protos", lambda: list(helpers.values())),
                patch.object(functions, "expert_route_body", expert_route),
            ):
                copied = onnx.ModelProto()
                copied.CopyFrom(model)
                fresh = attach_functions(copied)
        (old,), (new,) = ([f for f in m.functions if f.name == op_type] for m in (model, fresh))
        old.CopyFrom(new)

    return edit


class Kernel(NamedTuple):
    """A change of the CPU library: (old, new) snippets of one file of plugins/csrc."""

    file: str
    changes: tuple[tuple[str, str], ...]


class Compiler:
    """Builds the CPU library from changed sources, baseline instruction set only; what no change touches is compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [*os.environ.get("CXX", "c++").split(), "-std=c++17", "-Og", "-fPIC", "-fvisibility=hidden"]
        self.copy("plain")
        self.plain = [self.compile("plain", source) for source in ("library.cpp", "direct.cpp")]

    def copy(self, name: str) -> Path:
        """The sources in a folder of their own, without the wider instruction sets."""
        target = self.folder / name
        target.mkdir()
        for source in CSRC.iterdir():
            text = source.read_text(encoding="utf-8").replace("defined(__x86_64__)", "0")
            (target / source.name).write_text(text, encoding="utf-8")
        return target

    def compile(self, name: str, source: str) -> Path:
        path = (self.folder / name / source).with_suffix(".o")
        subprocess.run([*self.command, "-c", str(path.with_suffix(".cpp")), "-o", str(path)], check=True)
        return path

    def build(self, kernel: Kernel) -> Path:
        """The library with one change, for BILEVEL_CPU_LIBRARY."""
        name = str(len(list(self.folder.iterdir())))
        path = self.copy(name) / kernel.file
        path.write_text(replaced(path, kernel.changes), encoding="utf-8")
        library = path.with_name("library.so")
        objects = [self.compile(name, "kernels_baseline.cpp"), *self.plain]
        subprocess.run([*self.command, "-shared", *map(str, objects), "-o", str(library)], check=True)
        return library
