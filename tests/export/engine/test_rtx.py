"""The exported graphs through TensorRT-RTX's parser and builder, with plugins and without, for GPUs that are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("there is no TensorRT-RTX for this machine", allow_module_level=True)

from bilevel.errors import EngineError
from bilevel.export.engine.network import Limits, Network, parse_graph
from bilevel.export.engine.sampling import add_best_logits
from bilevel.export.engine.versions import Flavour, load_flavour
from bilevel.export.graph.nodes import routed_nodes
from bilevel.export.graph.operator_geometry import read_requests
from bilevel.plugins.tensorrt import python as tensorrt_python
from bilevel.plugins.tensorrt.fields import PluginNode
from tests.export.engine.rtx_engines import in_process, layer_kinds
from tests.plugins.tensorrt.plugin_library import build_plugins
from tests.support.tiny_models import BLOCK_SIZE, PREFILL_CHUNK

TINY = Limits(batch=2, capacity=48, chunk=PREFILL_CHUNK, block_size=BLOCK_SIZE)
Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    """TensorRT-RTX with the Python plugins."""
    flavour = load_flavour("tensorrt-rtx")
    tensorrt_python.register_plugins(flavour.trt)
    tensorrt_python.register_plugins(flavour.trt)  # a second time changes nothing
    return flavour


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[PluginNode]:
    """What create_plugin made of the fields that the parser gave, call by call."""
    nodes: list[PluginNode] = []
    read = tensorrt_python.read_fields

    def recorded(*args: Any, **options: Any) -> PluginNode:
        nodes.append(read(*args, **options))
        return nodes[-1]

    monkeypatch.setattr(tensorrt_python, "read_fields", recorded)
    return nodes


def parse(rtx: Flavour, graph: Path) -> Network:
    return parse_graph(rtx, graph.read_bytes(), graph, len(declared(graph)))


def declared(graph: Path) -> list[tuple[str, dict[str, Any]]]:
    """Operator and attributes of every routed node, in order."""
    nodes = []
    for node in routed_nodes(onnx.load(str(graph), load_external_data=False).graph):
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != "plugin_namespace"}
        nodes.append((node.op_type, {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}))
    return nodes


@pytest.mark.parametrize(
    "precision, kind", [("fp32", "FLOAT"), pytest.param("fp16", "HALF", marks=pytest.mark.thorough), ("bf16", "BF16")]
)
def test_every_precision_is_parsed_with_plugins(
    precision: str, kind: str, rtx: Flavour, exported: Exported, created: list[PluginNode]
) -> None:
    graph = exported("two_level", "fp32", precision)[1] / "model.onnx"
    parsed = parse(rtx, graph)
    assert layer_kinds(parsed)["PLUGIN_V3"] == len(declared(graph))
    # The parser keeps the graph's order, and hands attributes over as they are declared.
    assert [(node.op.name, dict(node.attributes)) for node in created] == declared(graph)
    inputs = {(x := parsed.network.get_input(i)).name: x for i in range(parsed.network.num_inputs)}
    assert inputs["past.key.0"].dtype.name == kind
    routes = [
        layer.get_output(0)
        for i in range(parsed.network.num_layers)
        if (layer := parsed.network.get_layer(i)).type.name == "PLUGIN_V3"
    ]
    assert {tensor.dtype.name for tensor in routes} == {kind, "INT32"}


def test_logits_are_ranked_where_the_vocabulary_is_large(rtx: Flavour, exported: Exported) -> None:
    parsed = parse(rtx, exported("two_level")[1] / "model.onnx")
    before = parsed.network.num_outputs
    assert not add_best_logits(parsed) and parsed.network.num_outputs == before
    assert add_best_logits(parsed, least=100)
    added = [parsed.network.get_output(index) for index in range(before, parsed.network.num_outputs)]
    ranked = [(tensor.name, tuple(tensor.shape), tensor.dtype.name) for tensor in added]
    assert ranked == [("top_logits", (-1, 64), "FLOAT"), ("top_ids", (-1, 64), "INT32"), ("log_sum", (-1,), "FLOAT")]


def test_the_same_file_builds_and_runs_without_plugins(exported: Exported) -> None:
    """Unregistered: the nodes run their portable bodies, in TensorRT-RTX and in ONNX Runtime. The logits are ranked."""
    graph = exported("two_level")[1] / "model.onnx"
    built = in_process(graph, 0, "none", TINY, (89,))
    assert "PLUGIN_V3" not in built["layers"] and built["layers"]["TOPK"] > 0 and built["bytes"] > 10_000
    assert ort.InferenceSession(graph).get_outputs()[0].name == "logits"


def test_a_node_that_misses_its_plugin_is_noticed(tmp_path: Path, rtx: Flavour, exported: Exported) -> None:
    """TensorRT falls back to the body without a word."""
    model = onnx.load(str(exported("two_level")[1] / "model.onnx"))
    (name,) = (a for a in routed_nodes(model.graph)[0].attribute if a.name == "plugin_namespace")
    name.s = b"elsewhere"
    onnx.save(model, str(tmp_path / "model.onnx"))
    nodes = len(declared(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match=f"has {nodes} nodes for plugins, but tensorrt-rtx .* made {nodes - 1} plugin layers"):
        parse(rtx, tmp_path / "model.onnx")


def test_a_file_that_is_no_graph(tmp_path: Path, rtx: Flavour, exported: Exported) -> None:
    model = onnx.load(str(exported("two_level")[1] / "model.onnx"))
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match=r"tensorrt-rtx .* cannot read .*Unheard.*; export the bundle anew"):
        parse(rtx, tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def plugin_library(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ plugins over a kernel library for the tiny model."""
    requests = read_requests(exported("two_level")[1] / "model.onnx")
    return build_plugins(requests, tmp_path_factory.mktemp("library") / "library.so", (86, 89))


def test_the_cpp_library_builds_the_same_graph(plugin_library: Path, exported: Exported) -> None:
    graph = exported("two_level")[1] / "model.onnx"
    built = in_process(graph, len(declared(graph)), str(plugin_library), TINY, (86, 89))
    assert built["layers"]["PLUGIN_V3"] == len(declared(graph))
