"""The C++ plugins: fields, types, shapes, workspace, numbers, over the C launcher on host memory. Needs NVIDIA's headers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import contract
from bilevel.plugins.library.gpu import KernelCall
from bilevel.plugins.tensorrt.fields import Field, PluginNode, write_fields
from tests.doubles.gpu import Gpu, call_of, fake_gpu, request_of
from tests.plugins.tensorrt.plugin_library import Plugin, Plugins, build_plugins
from tests.support.operator_calls import assert_same, make_call, run_reference

NAMES = [op.name for op in contract.GPU_OPS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture(scope="module")
def plugins(folder: Path) -> Plugins:
    """All operators in the geometry of ``make_call``, fp32; attention in fp16 too."""
    requests = [request_of(name, *make_call(name)) for name in NAMES]
    requests += [(op, geometry, "float16") for op, geometry, _ in requests if op.name == "RoutedAttention"]
    with fake_gpu(folder):
        return Plugins(build_plugins(requests, folder / "library.so", (80, 87)))


@pytest.fixture
def gpu(folder: Path, plugins: Plugins) -> Iterator[Gpu]:
    with fake_gpu(folder) as gpu:
        plugins.said()
        yield gpu


def attribute_fields(name: str) -> list[Field]:
    """What the parser would give."""
    attributes = make_call(name)[1]
    return [field for field in write_fields(PluginNode(contract.BY_NAME[name], attributes)) if field.name in attributes]


def made(plugins: Plugins, name: str) -> Plugin:
    plugin = plugins.make(name, attribute_fields(name), from_plan=False)
    assert plugin is not None, plugins.said()
    return plugin


def configured(plugins: Plugins, gpu: Gpu, name: str, tokens: int = 20) -> tuple[Plugin, KernelCall]:
    plugin, call = made(plugins, name), call_of(gpu.memory, name, *make_call(name, tokens))
    assert plugin.configure(call) == 0, plugins.said()
    return plugin, call


def changed(call: KernelCall, position: int, shape: tuple[int, ...] | None = None, dtype: str = "") -> KernelCall:
    """The call with another shape or type of one tensor."""
    tensors = [*call.inputs, *call.outputs]
    tensor = tensors[position]
    tensors[position] = replace(tensor, shape=tensor.shape if shape is None else shape, dtype=dtype or tensor.dtype)
    count = len(call.inputs)
    return replace(call, inputs=tensors[:count], outputs=tensors[count:])


@pytest.mark.parametrize("tokens", [1, 6, 20])
@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_out_of_a_plan_equals_the_reference(name: str, tokens: int, plugins: Plugins, gpu: Gpu) -> None:
    """Built for the largest call, written, read, attached; then run on a smaller one with the largest one's workspace."""
    built, largest = configured(plugins, gpu, name)
    # Nobody promises that a workspace begins where a buffer may.
    workspace = gpu.memory.bytes(128 + built.workspace(largest))[128:]
    read = plugins.make(name, built.fields(), from_plan=True)
    assert read is not None, plugins.said()
    running = read.attach()
    loads = gpu.driver.fake_loads()
    inputs, attributes = make_call(name, tokens)
    call = call_of(gpu.memory, name, inputs, attributes)
    assert running.shape_change(call) == 0 and running.enqueue(call, workspace.data_ptr()) == 0, plugins.said()
    assert_same([gpu.memory.read(tensor) for tensor in call.outputs], run_reference(name, inputs, attributes))
    assert gpu.driver.fake_launches() > 0 and gpu.driver.fake_loads() == loads, "attaching loaded everything"
    said = plugins.said()
    assert said == "" or (name == "WriteCache" and "copies its cache" in said)  # once: its output lies elsewhere here


def test_16_bits(plugins: Plugins, gpu: Gpu) -> None:
    inputs, attributes = make_call("RoutedAttention", 2)
    narrow = {key: x.half() if x.is_floating_point() else x for key, x in inputs.items()}
    call, plugin = call_of(gpu.memory, "RoutedAttention", narrow, attributes), made(plugins, "RoutedAttention")
    assert plugin.configure(call) == 0 and [f.data for f in plugin.fields() if f.name == "dtype"] == [(1,)]
    workspace = gpu.memory.bytes(128 + plugin.workspace(call))[128:]
    assert plugin.enqueue(call, workspace.data_ptr()) == 0, plugins.said()
    wide = {key: x.float() if x.is_floating_point() else x for key, x in narrow.items()}
    (expected,) = run_reference("RoutedAttention", wide, attributes)
    torch.testing.assert_close(gpu.memory.read(call.outputs[0]).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_the_python_plugins(name: str, plugins: Plugins, gpu: Gpu) -> None:
    plugin, call = configured(plugins, gpu, name)
    dtype = "float32" if call.op.has_float_type else ""
    expected = write_fields(PluginNode(call.op, call.attributes, dtype, tuple(t.shape for t in call.inputs)))
    for got, want in zip(plugin.fields(), expected, strict=True):
        assert (got.name, got.kind) == (want.name, want.kind)
        assert got.data == pytest.approx(tuple(want.data), rel=1e-7)


@pytest.mark.parametrize(
    "field, changes, message",
    [
        ("format_version", {"data": (3,)}, "format version 3, this library reads 2; build the engine anew with this bilevel"),
        ("format_version", {"name": "other"}, "format_version is missing or damaged"),
        ("format_version", {"kind": "CHAR"}, "format_version is missing or damaged"),
        ("format_version", {"data": (0,)}, "format_version is damaged"),
        ("format_version", {"data": ()}, "format_version is damaged"),
        ("dtype", {"data": (9,)}, "dtype is damaged"),
        ("dtype", {"data": ()}, "dtype is damaged"),
        ("dims", {"data": (1, 2)}, "dims is damaged"),
        ("dims", {"data": (-1,) * 5}, "dims is damaged"),
        ("dims", {"name": "other"}, "dims is missing or damaged"),
        ("dims", {"data": (20, 8, 20, 3, 8)}, "holds no kernels for ExpertRoute in float32"),
        ("dims", {"data": (20, 8, 20, 4, 9)}, "E=9"),
        ("top_k", {"name": "topk"}, "the attribute top_k is missing"),
        ("top_k", {"data": (0,)}, "top_k=0 must lie between 1 and 3840"),
        ("top_k", {"data": (1, 2)}, "top_k has 2 values, not 1"),
        ("top_k", {"kind": "INT64"}, "top_k is of type INT64, not INT32"),
        ("top_k", {"data": (5,)}, "holds no kernels for ExpertRoute in float32"),
        ("scale", {"data": (float("nan"),)}, "must be finite"),
        ("scale", {"kind": "FLOAT64"}, "scale is of type another type, not FLOAT32"),
        ("norm_floor", {"data": (-1.0,)}, "must be a finite number of at least 0"),
        ("score_func", {"data": tuple(b"cosine\0")}, "score_func='cosine' must be one of sigmoid, softmax"),
        ("score_func", {"data": ()}, "score_func='' must be one of"),
    ],
)
def test_damaged_fields(field: str, changes: dict[str, Any], message: str, plugins: Plugins, gpu: Gpu) -> None:
    fields = configured(plugins, gpu, "ExpertRoute")[0].fields()
    damaged = [replace(f, **changes) if f.name == field else f for f in fields]
    assert plugins.make("ExpertRoute", damaged, from_plan=True) is None
    assert message in plugins.said()


def test_text_needs_no_closing_zero(plugins: Plugins) -> None:
    fields = [replace(f, data=tuple(f.data)[:-1]) if f.kind == "CHAR" else f for f in attribute_fields("ExpertRoute")]
    plugin = plugins.make("ExpertRoute", fields, from_plan=False)
    assert plugin is not None and Field("score_func", "CHAR", tuple(b"sigmoid\0")) in plugin.fields()


def test_an_attribute_that_came_later_may_be_missing(plugins: Plugins) -> None:
    older = [field for field in attribute_fields("ExpertRoute") if field.name not in ("norm_floor", "zero_fill")]
    plugin = plugins.make("ExpertRoute", older, from_plan=False)
    assert plugin is not None
    assert [field.data for field in plugin.fields() if field.name in ("norm_floor", "zero_fill")] == [(0.0,), (0,)]


def test_unknown_and_missing_attributes(plugins: Plugins) -> None:
    fields = attribute_fields("CoarseRoute")
    assert plugins.make("CoarseRoute", [*fields, Field("colour", "INT32", (1,))], from_plan=False) is None
    assert "there is no attribute 'colour'" in plugins.said()
    assert plugins.make("CoarseRoute", fields[1:], from_plan=False) is None
    assert "bilevel.CoarseRoute layer: the attribute block_size is missing" in plugins.said()
    assert plugins.make("CoarseRoute", None, from_plan=False) is None
    assert "there are no attributes" in plugins.said()


@pytest.mark.parametrize(
    "position, shape, message",
    [
        (0, (2, 4, 7, 6), "L=6, but an earlier input has L=7"),
        (1, (2, 2, 20, 5), "D=5, but an earlier input has D=6"),
        (1, (2, 2, 20), "k must have rank 4"),
        (3, (2, 2, 6, 4, 1), "routes must have rank 4"),
        (4, (3,), "B=3"),
    ],
)
def test_wrong_shapes(position: int, shape: tuple[int, ...], message: str, plugins: Plugins, gpu: Gpu) -> None:
    """Refused when the engine is built, when shapes change, and when it runs; nothing is launched."""
    plugin, call = configured(plugins, gpu, "RoutedAttention", 6)
    workspace = gpu.memory.bytes(128 + plugin.workspace(call))[128:]
    wrong = changed(call, position, shape)
    assert plugin.configure(wrong, varies=False) != 0
    assert message in plugins.said()
    assert plugin.shape_change(wrong) != 0 and "bilevel.RoutedAttention refuses these shapes" in plugins.said()
    assert plugin.enqueue(wrong, workspace.data_ptr()) != 0 and "bilevel.RoutedAttention was not run" in plugins.said()
    assert gpu.driver.fake_launches() == 0


def test_bounds_of_sizes_that_vary_need_not_agree(plugins: Plugins, gpu: Gpu) -> None:
    plugin, call = configured(plugins, gpu, "RoutedAttention", 6)
    assert plugin.configure(changed(call, 0, (2, 4, 64, 6))) == 0
    assert next(f.data for f in plugin.fields() if f.name == "dims")[:4] == (2, 4, 64, 6)


def test_a_geometry_that_the_library_does_not_hold_stops_the_build(plugins: Plugins, gpu: Gpu) -> None:
    plugin, call = configured(plugins, gpu, "CoarseRoute", 6)
    other = changed(changed(call, 0, (2, 4, 6, 5)), 1, (2, 2, 5, 5))
    assert plugin.configure(other) != 0
    said = plugins.said()
    assert "bilevel.CoarseRoute cannot be built" in said and "bilevel kernels build" in said
    assert plugin.configure(changed(changed(call, 0, dtype="float16"), 1, dtype="float16")) != 0
    assert "float16" in plugins.said()
    assert plugin.configure(changed(call, 0, dtype="int64")) != 0
    assert "query must be fp16, bf16 or fp32" in plugins.said()


def test_a_workspace_that_is_not_there(plugins: Plugins, gpu: Gpu) -> None:
    plugin, call = configured(plugins, gpu, "RoutedAttention", 6)
    assert plugin.enqueue(call, 0) != 0
    assert "needs a workspace of" in plugins.said() and gpu.driver.fake_launches() == 0


def test_a_gpu_that_the_library_does_not_serve(plugins: Plugins, gpu: Gpu) -> None:
    """Attaching succeeds, as it must where there is no GPU; running says why it cannot."""
    gpu.configure(capability=90)
    plugin, call = configured(plugins, gpu, "RoutedAttention", 6)
    workspace = gpu.memory.bytes(128 + plugin.workspace(call))[128:]
    assert plugin.attach().enqueue(call, workspace.data_ptr()) != 0
    assert "none runs on sm_90" in plugins.said()


@pytest.mark.parametrize("name", NAMES)
def test_the_types_that_are_taken(name: str, plugins: Plugins, gpu: Gpu) -> None:
    """Linear tensors; all of the model's float type alike; int32 and fp32 as declared."""
    plugin, call = configured(plugins, gpu, name)
    ports = (*call.op.inputs, *call.op.outputs)
    floats = [n for n, port in enumerate(ports) if port.dtype == "T"]
    for model in ("float16", "bfloat16", "float32"):
        typed = call
        for n, port in enumerate(ports):
            typed = changed(typed, n, dtype=model if port.dtype == "T" else port.dtype)
        for n, port in enumerate(ports):
            assert plugin.supports(n, typed) and not plugin.supports(n, typed, is_packed=True)
            for other in ("float16", "bfloat16", "float32", "int32", "int64"):
                own = model if port.dtype == "T" else port.dtype
                allowed = other.startswith(("float", "bfloat")) if floats[:1] == [n] else other == own
                assert plugin.supports(n, changed(typed, n, dtype=other)) == allowed
        inputs = [model if port.dtype == "T" else port.dtype for port in call.op.inputs]
        expected = [model if port.dtype == "T" else port.dtype for port in call.op.outputs]
        assert plugin.output_types(inputs, len(expected)) == expected


def test_the_timing_cache_tells_plugins_apart(plugins: Plugins) -> None:
    keys = {made(plugins, name).timing_key() for name in NAMES}
    fields = [replace(f, data=(0.25,)) if f.name == "scale" else f for f in attribute_fields("RoutedAttention")]
    other = plugins.make("RoutedAttention", fields, from_plan=False)
    assert other is not None
    assert len(keys | {other.timing_key()}) == len(NAMES) + 1
    assert other.timing_key() == "bilevel.RoutedAttention/1;block_size=0x1p+2;causal=0x1p+0;scale=0x1p-2"


def test_the_library_shows_nothing_but_its_entry_points(plugins: Plugins) -> None:
    run = subprocess.run(["nm", "-D", "--defined-only", plugins.path], capture_output=True, text=True, check=True)
    shown = {
        line.split()[-1] for line in run.stdout.splitlines() if " W " not in line and " V " not in line and " u " not in line
    }
    assert {name for name in shown if not name.startswith("bilevel_")} == {"getCreators", "setLoggerFinder"}
    needed = subprocess.run(["readelf", "-d", plugins.path], capture_output=True, text=True, check=True).stdout
    assert "nvinfer" not in needed and "cuda" not in needed


@pytest.mark.parametrize("offset", [1, 8, 15])
def test_tensors_at_odd_addresses_are_refused(offset: int, plugins: Plugins, gpu: Gpu) -> None:
    """Kernels read 16 bytes at once: a sentence, and no launch. Every input and every output."""
    for name in NAMES:
        plugin, call = configured(plugins, gpu, name)
        workspace = gpu.memory.bytes(plugin.workspace(call))
        for position in range(len(call.inputs) + len(call.outputs)):
            tensors = [*call.inputs, *call.outputs]
            tensors[position] = replace(tensors[position], address=tensors[position].address + offset)
            odd = replace(call, inputs=tensors[: len(call.inputs)], outputs=tensors[len(call.inputs) :])
            assert plugin.enqueue(odd, workspace.data_ptr()) != 0 and "multiple of 16" in plugins.said()
    assert gpu.driver.fake_launches() == 0


def test_a_cache_that_tensorrt_moves_is_told_once(plugins: Plugins, gpu: Gpu) -> None:
    """WriteCache at two addresses gives the right cache, says that it copies, and says it once."""
    fresh = Plugins(Path(shutil.copy(plugins.path, plugins.path.with_name("told.so"))))  # that has told nothing yet
    plugin, call = configured(fresh, gpu, "WriteCache")
    same = replace(call, outputs=[call.inputs[0]])
    assert plugin.enqueue(same, 0) == 0 and "copies" not in fresh.said()
    assert plugin.enqueue(call, 0) == 0 and "copies its cache" in fresh.said()
    assert plugin.enqueue(call, 0) == 0 and "copies" not in fresh.said()
