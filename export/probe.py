"""The probe: the bundle's graph with every selection shown, and replaced by one that is given.

Made by graph surgery on a copy in memory; the shipped file stays as it is. With PyTorch's selections forced into the graph,
one differing choice cannot spread into later layers: each layer's own choice is judged on (nearly) equal operands, and what is
computed from a selection can be compared tightly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bilevel.export.functions import routed_nodes
from bilevel.export.quantise import ROUTERS, compute_in_fp32
from bilevel.plugins.contract import BY_NAME
from bilevel.plugins.errors import BundleError

_DTYPES = {"int32": onnx.TensorProto.INT32, "float32": onnx.TensorProto.FLOAT}
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class ProbedNode:
    """One routed node. operands: names of its inputs. outputs: what the graph goes on with (forced, for a selection).

    selected: for a selection, the names under which the node's own choice is shown.
    """

    op_type: str
    operands: tuple[str, ...]
    outputs: tuple[str, ...]
    selected: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass
class Probe:
    """A session over the probed graph. ``run`` takes the graph's inputs and one array per forced output."""

    session: Any
    nodes: list[ProbedNode]
    output_names: list[str] = field(default_factory=list)

    def of_type(self, *op_types: str) -> list[ProbedNode]:
        """The probed nodes of the given operators, in graph order."""
        return [node for node in self.nodes if node.op_type in op_types]

    def run(self, feeds: Arrays) -> Arrays:
        """Every graph output and every shown tensor, by name."""
        return dict(zip(self.output_names, run_session(self.session, self.output_names, feeds), strict=True))


def run_session(session: Any, outputs: list[str] | None, feeds: Arrays) -> list[np.ndarray[Any, Any]]:
    """``session.run``; a graph that fails while it runs is a BundleError."""
    try:
        return list(session.run(outputs, feeds))
    except Exception as error:  # ONNX Runtime raises many types
        summary = str(error).splitlines()[0][:200]
        raise BundleError(f"ONNX Runtime cannot run the graph on the check's tokens ({summary}); export it again") from error


def open_session(path: Path, model: bytes | None = None, library: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU over ``path``, or over ``model`` with the weights that lie beside ``path``.

    library: the fast CPU kernels, which then run in place of the routed nodes' portable bodies.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, in one sentence
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if library is not None:
        options.register_custom_ops_library(str(library))
    try:
        return ort.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many types, all of them for a file it cannot run
        summary = str(error).splitlines()[0][:200]
        raise BundleError(f"ONNX Runtime cannot open {path} ({summary}); export it again") from error


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    names = {attribute.name for attribute in BY_NAME[node.op_type].attributes}
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in names}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def add_probes(model: onnx.ModelProto) -> list[ProbedNode]:
    """Show every routed node's operands and outputs, and turn selections into inputs; changes ``model``."""
    graph = model.graph
    shown = {value.name for value in [*graph.input, *graph.output]} | {tensor.name for tensor in graph.initializer}
    probed = []

    def show(name: str, kind: int) -> None:
        if name not in shown:
            shown.add(name)
            graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))

    for node in routed_nodes(graph):
        op = BY_NAME[node.op_type]
        is_selection = node.op_type in ROUTERS
        outputs = tuple(node.output)
        selected = tuple(f"{name}/selected" for name in outputs) if is_selection else ()
        if is_selection:
            del node.output[:]
            node.output.extend(selected)
            for port, name in zip(op.outputs, outputs, strict=True):
                shown.add(name)
                kind = _DTYPES[port.dtype]
                graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * len(port.shape)))
        for port, name in zip(op.outputs, selected or outputs, strict=True):
            show(name, _DTYPES.get(port.dtype, onnx.TensorProto.FLOAT))
        for port, name in zip(op.inputs, node.input, strict=True):
            if port.dtype != "int32":
                show(name, onnx.TensorProto.FLOAT)
        probed.append(ProbedNode(node.op_type, tuple(node.input), outputs, selected, _attributes(node)))
    # What is shown twice or is an old annotation of a renamed value would confuse type inference.
    del graph.value_info[:]
    return probed


def load_graph(path: Path) -> onnx.ModelProto:
    """``model.onnx`` without its weights."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise BundleError(f"{path} is no readable ONNX file; export it again") from error


def open_probe(path: Path, library: Path | None = None) -> Probe:
    """Probe the graph at ``path`` and open it with the weights beside it; quantised products compute with fp32 activations.

    library: see :func:`open_session`.
    """
    model = compute_in_fp32(load_graph(path))
    nodes = add_probes(model)
    session = open_session(path, model.SerializeToString(), library)
    return Probe(session, nodes, [output.name for output in session.get_outputs()])


def open_shown(path: Path) -> Probe:
    """Open the graph at ``path`` as it is, with every router's own choices as further outputs; nothing is forced."""
    model = load_graph(path)
    shown = {value.name for value in model.graph.output}
    nodes = []
    for node in routed_nodes(model.graph):
        selected = tuple(node.output) if node.op_type in ROUTERS else ()
        for port, name in zip(BY_NAME[node.op_type].outputs, selected, strict=bool(selected)):
            if name not in shown:
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, _DTYPES[port.dtype], None))
        nodes.append(ProbedNode(node.op_type, tuple(node.input), tuple(node.output), selected, _attributes(node)))
    session = open_session(path, model.SerializeToString())
    return Probe(session, nodes, [output.name for output in session.get_outputs()])


def open_judged(path: Path, weights: str, library: Path | None = None) -> Any:
    """A session over the shipped file; with int8 or int4 ``weights`` over a copy that computes with fp32 activations.

    library: see :func:`open_session`.
    """
    if weights == "fp32":
        return open_session(path, None, library)
    return open_session(path, compute_in_fp32(load_graph(path)).SerializeToString(), library)
