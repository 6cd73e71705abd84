"""How an engine writes its caches: a bundle's graph with every ``ScatterND`` on a cache replaced by what writes in place.

A bundle writes a cache by ScatterND, which every ONNX Runtime and every TensorRT knows. ONNX Runtime does it in place where
input and output are bound to one buffer; TensorRT promises nothing of the kind, and whoever copies a cache for each token pays
for the capacity and not for what is kept. So in an engine

- a cache of floats is written by ``TensorScatter`` (opset 24), TensorRT's KV cache layer, or, in versions that lack it, by the
  plugin ``WriteCache``: both at one address for input and output;
- keys of blocks are written by that plugin in TensorRT-RTX too, whose builder dies where the layer writes them beside keys of
  tokens. In an engine without plugins they keep their ScatterND: a copy of these small caches for each call, onto itself.
  Longer updates are no way out: TensorRT ignores an update that goes beyond the end of a cache, the whole of it;
- a cache of whole numbers (level 1's token ids), which neither takes, is only read: the runtime writes the new tokens into it
  before a call;
- capacity is a number: TensorScatter asks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import onnx
from onnx import TensorProto, helper

from bilevel.bundle.tensors import PRECISIONS, TensorSpec
from bilevel.contract import DOMAIN, WRITE_CACHE
from bilevel.errors import EngineError, ExportError
from bilevel.export.engine.versions import Flavour, crashes_on_keys_of_blocks, has_cache_layer

_BLOCKS = "num_blocks"  # the size that a cache of blocks has in place of the capacity
_OPSET = 24  # the first with TensorScatter


class Writer(Enum):
    """What writes a cache of floats."""

    LAYER = "TensorScatter"
    PLUGIN = "WriteCache"
    COPY = "ScatterND"


@dataclass(frozen=True)
class CacheWrite:
    """One cache and its node. past, present: the graph's input and output; update: what is written; start: int64 [B], where.

    counts_blocks: it holds a vector for each block, not for each token.
    """

    past: str
    present: str
    update: str
    start: str
    is_float: bool
    counts_blocks: bool


def choose_writer(flavour: Flavour, write: CacheWrite, with_plugins: bool) -> Writer:
    """What writes a cache of floats; PLUGIN without plugins is for ``check_caches`` to refuse."""
    if not has_cache_layer(flavour):
        return Writer.PLUGIN
    if write.counts_blocks and crashes_on_keys_of_blocks(flavour):
        return Writer.PLUGIN if with_plugins else Writer.COPY
    return Writer.LAYER


def find_writes(graph: onnx.GraphProto, state: Sequence[tuple[TensorSpec, str]]) -> list[CacheWrite]:
    """The node that writes each cache of ``state`` (``Graph.state``'s). Raises ExportError for a graph that is not ours."""
    made = {name: node for node in graph.node for name in node.output}
    writes = []
    for past, present in state:
        node = made.get(present)
        if node is None or node.op_type != "ScatterND" or node.input[0] != past.name:
            raise ExportError(f"the graph does not write {present} by ScatterND; export the bundle anew with this bilevel")
        start = _find_start(node.input[1], made)
        writes.append(CacheWrite(past.name, present, node.input[2], start, past.dtype in PRECISIONS, _BLOCKS in past.shape))
    return writes


def _find_start(index: str, made: Mapping[str, onnx.NodeProto]) -> str:
    """``start`` of ``schemas._write_cache``: in the last column of the indices, what the positions 0, 1, ... are added to."""
    node = made.get(index)
    while node is not None and node.op_type in ("Concat", "Unsqueeze", "Expand"):
        # Concat: the last column; the others have one input of data.
        node = made.get(node.input[-1] if node.op_type == "Concat" else node.input[0])
    if node is not None and node.op_type == "Add":
        for name in node.input:
            first = made.get(name)
            if first is not None and first.op_type == "Unsqueeze":
                return first.input[0]
    raise ExportError(f"the graph computes the indices {index} in an unknown way; export the bundle anew with this bilevel")


def check_caches(flavour: Flavour, state: Sequence[tuple[TensorSpec, str]]) -> None:
    """Raises EngineError where this TensorRT needs the plugin for a bundle's caches, for an engine without plugins."""
    if state and not has_cache_layer(flavour):
        raise EngineError(
            f"{flavour.backend} {flavour.version_text} has no layer that writes caches in place (10.15 has), so that an engine "
            "needs the plugin WriteCache: build the kernel library (bilevel kernels build) and leave --plugins none out"
        )


def write_in_place(
    model: onnx.ModelProto,
    state: Sequence[tuple[TensorSpec, str]],
    sizes: Mapping[str, int],
    writer: Callable[[CacheWrite], Writer],
) -> None:
    """Change ``model`` as the module's docstring says. sizes: free sizes that become numbers ("capacity", "num_blocks").

    writer: what writes a cache of floats. Raises ExportError for a graph that is not ours.
    """
    graph = model.graph
    for write in find_writes(graph, state):
        if not write.is_float:
            _read_only(graph, write)
        elif (chosen := writer(write)) is not Writer.COPY:
            _replace(graph, write, chosen)
    _drop_unused(graph)
    _fix_sizes(graph, sizes)
    if any(node.op_type == Writer.LAYER.value for node in graph.node):
        for opset in model.opset_import:
            opset.version = opset.version if opset.domain else max(opset.version, _OPSET)


def _replace(graph: onnx.GraphProto, write: CacheWrite, writer: Writer) -> None:
    """The write of a cache of floats, by the layer or the plugin."""
    at = next(i for i, node in enumerate(graph.node) if list(node.output) == [write.present])
    name = f"write.{write.past}"
    if writer is Writer.LAYER:
        inputs = [write.past, write.update, write.start]
        node = helper.make_node("TensorScatter", inputs, [write.present], name, axis=-2, mode="linear")
        graph.node[at].CopyFrom(node)
        return
    start = f"{name}.start"
    inputs = [write.past, write.update, start]
    node = helper.make_node(WRITE_CACHE.name, inputs, [write.present], name, domain=DOMAIN, plugin_namespace=DOMAIN)
    graph.node[at].CopyFrom(node)
    graph.node.insert(at, helper.make_node("Cast", [write.start], [start], f"{name}.cast", to=TensorProto.INT32))


def _read_only(graph: onnx.GraphProto, write: CacheWrite) -> None:
    """Whoever read the written cache reads the input, in which the runtime has put the new tokens."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == write.present:
                node.input[i] = write.past
    kept = [node for node in graph.node if write.present not in node.output]
    del graph.node[:]
    graph.node.extend(kept)
    outputs = [value for value in graph.output if value.name != write.present]
    del graph.output[:]
    graph.output.extend(outputs)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Leave out nodes whose outputs nobody reads: the indices."""
    wanted = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _dims(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from value.type.tensor_type.shape.dim


def _fix_sizes(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> None:
    for dim in _dims(graph):
        if dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]
