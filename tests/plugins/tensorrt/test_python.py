"""The Python plugins, called as TensorRT calls them: on addresses of host memory, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.tensorrt import python as tensorrt_python
from bilevel.plugins.tensorrt.fields import Field, PluginNode, read_fields, write_fields
from bilevel.plugins.tensorrt.python import Fields
from tests.doubles.gpu import Memory, call_of
from tests.support.operator_calls import Attributes, Inputs, assert_same, make_call, run_reference

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("there is no TensorRT-RTX for this machine", allow_module_level=True)
import tensorrt_rtx as trt

# Where values are infinite or NaN, NumPy warns of what the kernels mean to compute.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAMES = [op.name for op in contract.GPU_OPS]
TYPES = {
    "float16": trt.DataType.HALF,
    "bfloat16": trt.DataType.BF16,
    "float32": trt.DataType.FLOAT,
    "int32": trt.DataType.INT32,
    "int64": trt.DataType.INT64,
}


def creator_of(name: str) -> Any:
    return next(creator for creator in tensorrt_python.creators(trt) if creator.name == name)


def given(attributes: Attributes) -> Fields:
    """Attributes as the ONNX parser gives them."""
    kinds = {int: "INT32", float: "FLOAT32", str: "CHAR"}
    values = [(name, value, (*value.encode(), 0) if isinstance(value, str) else (value,)) for name, value in attributes.items()]
    return Fields(trt, [Field(name, kinds[type(value)], data) for name, value, data in values])


def plugin_of(name: str, attributes: Attributes) -> Any:
    plugin = creator_of(name).create_plugin(name, given(attributes).collection, trt.TensorRTPhase.BUILD)
    plugin.device = "cpu"
    return plugin


def desc(shape: tuple[int, ...], dtype: str, layout: Any = trt.TensorFormat.LINEAR) -> Any:
    return SimpleNamespace(dims=shape, type=TYPES[dtype], format=layout)


def dynamic(shape: tuple[int, ...], dtype: str, **more: Any) -> Any:
    """What a profile says: every size may vary up to ``shape``."""
    return SimpleNamespace(desc=desc((-1,) * len(shape), dtype, **more), min=(1,) * len(shape), opt=shape, max=shape)


def enqueue(name: str, inputs: Inputs, attributes: Attributes) -> tuple[int, list[torch.Tensor]]:
    """The status and the outputs of a plugin that went through a plan, with as much workspace as it asked for."""
    memory = Memory()
    call = call_of(memory, name, inputs, attributes)
    built = plugin_of(name, attributes)
    tensors = [dynamic(t.shape, t.dtype) for t in (*call.inputs, *call.outputs)]
    count = len(call.inputs)
    built.configure_plugin(tensors[:count], tensors[count:])
    workspace = memory.bytes(128 + built.get_workspace_size(tensors[:count], tensors[count:]))[128:]  # aligned to no more
    plugin = creator_of(name).create_plugin(name, built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    plugin.device = "cpu"
    plugin = plugin.attach_to_context(None)
    descs = [desc(t.shape, t.dtype) for t in (*call.inputs, *call.outputs)]
    assert plugin.on_shape_change(descs[:count], descs[count:]) == 0
    addresses = [t.address for t in (*call.inputs, *call.outputs)]
    status = plugin.enqueue(descs[:count], descs[count:], addresses[:count], addresses[count:], workspace.data_ptr(), 0)
    return status, [memory.read(t) for t in call.outputs]


@pytest.mark.parametrize("tokens", [1, 6, 20])
@pytest.mark.parametrize("name", NAMES)
def test_enqueue_equals_the_reference(name: str, tokens: int) -> None:
    inputs, attributes = make_call(name, tokens)
    status, outputs = enqueue(name, inputs, attributes)
    assert status == 0
    assert_same(outputs, run_reference(name, inputs, attributes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_enqueue_in_16_bits(dtype: torch.dtype) -> None:
    inputs, attributes = make_call("RoutedAttention", 2)
    narrow = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    status, (got,) = enqueue("RoutedAttention", narrow, attributes)
    assert status == 0 and got.dtype == dtype
    wide = {key: x.float() if x.is_floating_point() else x for key, x in narrow.items()}
    torch.testing.assert_close(got.float(), run_reference("RoutedAttention", wide, attributes)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("axis, size, message", [(2, 7, "routes has L=6, but an earlier input has L=7"), (0, 3, "B=2, but")])
def test_wrong_shapes_are_logged_and_returned(axis: int, size: int, message: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs, attributes = make_call("RoutedAttention")
    plugin = plugin_of("RoutedAttention", attributes)
    shapes = [list(x.shape) for x in inputs.values()]
    shapes[0][axis] = size
    descs = [desc(tuple(s), "float32" if n < 3 else "int32") for n, s in enumerate(shapes)]
    with caplog.at_level(logging.ERROR, "bilevel.tensorrt"):
        assert plugin.on_shape_change(descs, [desc((2, 4, 6, 6), "float32")]) == 1
        assert plugin.enqueue(descs, [], [0] * 6, [0], 0, 0) == 1
    assert caplog.text.count(message) == 2 and "RoutedAttention was not run" in caplog.text


def test_another_number_type_is_logged_and_returned(caplog: pytest.LogCaptureFixture) -> None:
    inputs, attributes = make_call("CoarseRoute")
    plugin = plugin_of("CoarseRoute", attributes)
    descs = [desc(tuple(x.shape), "int64") for x in inputs.values()]
    assert plugin.enqueue(descs, [], [0] * 4, [0], 0, 0) == 1
    assert "computes in float16, bfloat16, float32, not in INT64" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_the_types_that_are_taken(name: str) -> None:
    """Linear tensors; all of the model's float type alike; int32 and fp32 as declared."""
    op, plugin = contract.BY_NAME[name], plugin_of(name, make_call(name)[1])
    ports = (*op.inputs, *op.outputs)
    floats = [n for n, port in enumerate(ports) if port.dtype == "T"]
    for model in ("float16", "bfloat16", "float32"):
        descs = [dynamic((2,), model if port.dtype == "T" else port.dtype) for port in ports]
        for position, port in enumerate(ports):
            assert plugin.supports_format_combination(position, descs, len(op.inputs))
            for other in TYPES:
                wrong = [*descs]
                wrong[position] = dynamic((2,), other)
                allowed = (
                    other in ("float16", "bfloat16", "float32") if position in floats[:1] else other == wrong_type(port, model)
                )
                assert plugin.supports_format_combination(position, wrong, len(op.inputs)) == allowed
            packed = [*descs]
            packed[position] = dynamic((2,), model, layout=trt.TensorFormat.CHW4)
            assert not plugin.supports_format_combination(position, packed, len(op.inputs))
    types = [TYPES["bfloat16" if port.dtype == "T" else port.dtype] for port in op.inputs]
    expected = [TYPES["bfloat16" if port.dtype == "T" else port.dtype] for port in op.outputs]
    assert plugin.get_output_data_types(types) == expected


def wrong_type(port: contract.Port, model: str) -> str:
    return model if port.dtype == "T" else port.dtype


def test_what_no_kernel_covers_stops_the_build() -> None:
    inputs, attributes = make_call("CoarseRoute")
    plugin = plugin_of("CoarseRoute", {**attributes, "topk": 129})
    tensors = [dynamic(tuple(x.shape), "float32" if n < 2 else "int32") for n, x in enumerate(inputs.values())]
    with pytest.raises(ContractError, match="topk up to 128, not 129"):
        plugin.configure_plugin(tensors, [])


def test_fields_travel_as_the_contract_of_the_plan_says() -> None:
    name = "ExpertRoute"
    attributes = make_call(name)[1]
    plugin = plugin_of(name, attributes)
    written = [Field(f.name, f.type.name, f.data.tolist()) for f in plugin.get_fields_to_serialize()]
    read = read_fields(contract.EXPERT_ROUTE, written, from_plan=True)
    assert read == PluginNode(contract.EXPERT_ROUTE, attributes)
    assert [field.name for field in written] == [field.name for field in write_fields(read)]


@pytest.mark.parametrize("name", NAMES)
def test_creators_name_the_attributes(name: str) -> None:
    creator, op = creator_of(name), contract.BY_NAME[name]
    assert (creator.plugin_namespace, creator.plugin_version) == ("bilevel", str(op.version))
    assert [field.name for field in creator.field_names] == [attribute.name for attribute in op.attributes]
