"""Operators that no tiny model of these tests has, through TensorRT-RTX's parser and builder, with plugins and without."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("there is no TensorRT-RTX for this machine", allow_module_level=True)

from bilevel import contract
from bilevel.export.engine.network import parse_graph
from bilevel.export.engine.versions import compute_capabilities, load_flavour
from bilevel.export.graph.functions import attach_functions
from bilevel.export.graph.schemas import ONNX_OPSET, register_schemas
from bilevel.plugins.tensorrt import python as tensorrt_python
from tests.export.engine.rtx_engines import layer_kinds
from tests.support.operator_calls import BOUNDED, EXPERT, SELECT, node_of

_KINDS = {"int32": TensorProto.INT32, "float32": TensorProto.FLOAT, "T": TensorProto.FLOAT}
SIZES = {"B": 2, "Hs": 2, "L": 5, "U": 6, "T": 7, "E": 8, "Gp": 8, "d": 16, "f": 8}
# DeepSeek-V4's table: every expert a group of its own; ERNIE's floor; dropped groups filled with 0.
GATE = {**EXPERT, "topk_group": 2, "score_func": "sqrtsoftplus", "norm_floor": 0.5, "zero_fill": 1}
CALLS = {"SelectBlocks": SELECT, "ExpertRoute": GATE, "RoutedExperts": BOUNDED}


def model() -> onnx.ModelProto:
    """Blocks chosen from scores, and experts: the chosen ones' work. All sizes are fixed."""
    register_schemas()
    nodes = [node_of(name, attributes, f".{name}") for name, attributes in CALLS.items()]
    experts = dict(zip(("ids", "weights"), nodes[1].output, strict=True))
    for index, name in enumerate(nodes[2].input):
        nodes[2].input[index] = experts.get(name, name)
    inputs = {}
    for node in nodes:
        for port, name in zip(contract.BY_NAME[node.op_type].inputs, node.input, strict=True):
            if name not in experts.values():
                shape: Sequence[int] = [dim.size(SIZES) for dim in port.shape]
                inputs[name] = helper.make_tensor_value_info(name, _KINDS[port.dtype], shape)
    outputs = [
        helper.make_tensor_value_info(node.output[0], kind, None)
        for node, kind in ((nodes[0], TensorProto.INT32), (nodes[2], TensorProto.FLOAT))
    ]
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    graph = helper.make_graph(nodes, "operators", list(inputs.values()), outputs)
    return attach_functions(helper.make_model(graph, opset_imports=opsets, ir_version=11))


@pytest.mark.parametrize("plugins", [3, 0], ids=["plugins", "bodies"])
def test_an_engine_of_selected_blocks_and_clamped_experts_is_built(plugins: int, tmp_path: Path) -> None:
    flavour = load_flavour("tensorrt-rtx")
    parsed_model = model()
    if plugins:
        tensorrt_python.register_plugins(flavour.trt)
    else:  # what is registered once stays so: a node of another namespace has no plugin
        for node in parsed_model.graph.node:
            next(a for a in node.attribute if a.name == "plugin_namespace").s = b"none"
    parsed = parse_graph(flavour, parsed_model.SerializeToString(), tmp_path / "operators.onnx", plugins)
    assert layer_kinds(parsed)["PLUGIN_V3"] == plugins
    config = parsed.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(compute_capabilities(flavour)[89], 0)
    assert parsed.builder.build_serialized_network(parsed.network, config) is not None, parsed.logger.messages
