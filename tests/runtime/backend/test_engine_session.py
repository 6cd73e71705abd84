"""Engines driven end to end through a double that executes in ONNX Runtime and enforces TensorRT's rules."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.bundle.engines import Engine, find_engines, read_engine
from bilevel.bundle.format import load_bundle
from bilevel.errors import EngineError, RequestError
from bilevel.runtime.backend import compiled
from bilevel.runtime.backend import engine as engine_session
from bilevel.runtime.backend.compiled import cache_file
from bilevel.runtime.backend.engine import EngineSession
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.schedule.route_stats import EVERY, RouteStats
from tests.doubles.bundle import write_bundle
from tests.doubles.gpu import request_of
from tests.doubles.tensorrt import FakeDevice, FakeTensorrt, write_engine
from tests.plugins.tensorrt.plugin_library import build_plugins
from tests.support.operator_calls import make_call

Copied = Callable[..., tuple[Path, Path]]


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def trt(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    module = FakeTensorrt(device)
    monkeypatch.setattr(engine_session, "load_module", lambda backend: module)
    return module


@pytest.fixture
def bundle(copied: Copied) -> Path:
    return copied("two_level")[1]


def open_engine(bundle: Path, device: FakeDevice, library: Path | None = None, **changes: Any) -> EngineSession:
    engine = read_engine(write_engine(bundle, as_built=True, **changes))
    return EngineSession(load_bundle(bundle), engine, library, device)  # type: ignore[arg-type]


def run_calls(session: Any, lengths: Iterable[int]) -> np.ndarray[Any, Any]:
    """The logits of calls of so many tokens, one behind the other, of one row."""
    caches, past, found = session.allocate(1, 64), 0, []
    for length in lengths:
        call = (np.full((1, length), 5, np.int64), np.array([past], np.int32), np.array([length], np.int32))
        found.append(np.array(caches.run(*call)))
        past += length
    return np.stack(found)


@pytest.mark.parametrize("prompts", [["ab"], ["abcabcabc", "b", "cab"]])
def test_an_engine_generates_what_onnx_runtime_does(
    prompts: list[str], bundle: Path, device: FakeDevice, trt: FakeTensorrt
) -> None:
    """Chunked prefill of rows of different lengths, then single tokens as a captured graph."""
    params = SamplingParams(max_tokens=12)
    expected = Generator.open(bundle, "onnx").generate(prompts, params, prefill_chunk=4).finish()
    session = open_engine(bundle, device)
    generator = Generator(session, BundleTokenizer(session.bundle.tokenizer_path))
    got = generator.generate(prompts, params, prefill_chunk=4).finish()
    assert [each.token_ids for each in got] == [each.token_ids for each in expected]
    assert device.num_graph_launches >= 9


def test_a_graph_is_captured_anew_when_the_shapes_change(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    """One profile for everything: prefill between single tokens changes its shapes and back."""
    session = open_engine(bundle, device, new_tokens=[[1, 16]])
    caches = session.allocate(1, 16)
    reference = Generator.open(bundle, "onnx").session.allocate(1, 16)
    past = 0
    for length in (1, 1, 1, 3, 1, 1, 1):
        call = (np.full((1, length), 5, np.int64), np.array([past], np.int32), np.array([length], np.int32))
        np.testing.assert_allclose(caches.run(*call), reference.run(*call), rtol=1e-5, atol=1e-5)
        past += length
    assert device.num_graph_launches == 4


def test_caches_share_one_buffer_and_go_back(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    session = open_engine(bundle, device)
    caches = session.allocate(2, 16)
    state = session.bundle.state_bytes(2, caches.capacity)
    assert state <= device.used <= state + 40_000  # one buffer for an input and its output
    caches.run(np.zeros((2, 3), np.int64), np.zeros(2, np.int32), np.full(2, 3, np.int32))
    assert caches.routes is not None and caches.routes.blocks.any()
    del caches
    assert device.used == 100 * max(
        most for _, most in session.engine.new_tokens
    )  # the contexts' working memory, the session's
    del session
    assert device.used == 0


def test_routes_are_copied_when_they_are_read(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    """Equal to ONNX Runtime's, whole and by single tokens; one copy for all of them; gone with the next call."""
    session, reference = open_engine(bundle, device), Generator.open(bundle, "onnx").session
    caches, expected = session.allocate(2, 16), reference.allocate(2, 16)
    assert caches.routes is None
    past = 0
    for length in (5, 1, 1):
        call = (
            np.full((2, length), 5, np.int64),
            np.full(2, past, np.int32),
            np.array([length, length - length // 2], np.int32),
        )
        expected.run(*call)
        caches.run(*call)
        routes, right, before = caches.routes, expected.routes, device.num_downloads
        assert routes is not None and right is not None and right.experts
        np.testing.assert_array_equal(routes.blocks, right.blocks)
        np.testing.assert_array_equal(routes.candidates, right.candidates)
        for layer, ids in right.experts.items():
            np.testing.assert_array_equal(routes.experts[layer], ids)
        assert device.num_downloads == before + 1 and caches.routes is not routes
        past += length
    caches.run(*call)
    with pytest.raises(
        RequestError, match="the routes of an earlier call are gone from the GPU; read them before the next call"
    ):
        routes.blocks.any()


def test_watching_the_routers_of_a_server_is_cheap(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    """The statistics are shown every decode step and look at few of them: no other copies its routes."""
    session = open_engine(bundle, device)
    caches, stats = session.allocate(1, 64), RouteStats(session.bundle, 64)
    for past in range(EVERY + 1):
        caches.run(np.full((1, 1), 5, np.int64), np.array([past], np.int32), np.ones(1, np.int32))
        stats.sample([(0, past)], caches.routes)  # type: ignore[arg-type]
    assert device.num_downloads == EVERY + 1 + 2 and 0 < stats.attended(0) <= 1


def test_nothing_is_copied_that_nobody_reads(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    """A piece of a prompt: no bytes. A token: its logits. Each is copied once, and is gone with the next call."""
    session = open_engine(bundle, device)
    caches = session.allocate(2, 16)
    row = 4 * session.bundle.vocab_size
    pieces = caches.run(np.zeros((2, 4), np.int64), np.zeros(2, np.int32), np.full(2, 4, np.int32))
    assert device.num_downloaded == 0
    token = caches.run(np.zeros((2, 1), np.int64), np.full(2, 4, np.int32), np.ones(2, np.int32))
    np.testing.assert_array_equal(np.asarray(token)[1], token[1].fetch())
    assert device.num_downloaded == 2 * row and device.num_downloads == 1
    with pytest.raises(RequestError, match="the logits of an earlier call are gone from the GPU"):
        pieces[0].fetch()


@pytest.mark.parametrize(
    "params, bytes_per_token",
    [
        (SamplingParams(max_tokens=12), 516),
        (SamplingParams(max_tokens=12, temperature=1.0, top_k=8, seed=5), 516),
        (SamplingParams(max_tokens=12, temperature=0.3, top_p=0.5, seed=5), None),
        (SamplingParams(max_tokens=12, temperature=1.0, seed=5), 516 + 4 * 293),
        (SamplingParams(max_tokens=12, repetition_penalty=1.3), 516 + 4 * 293),
    ],
    ids=str,
)
def test_an_engine_that_ranks_its_logits(
    params: SamplingParams, bytes_per_token: int | None, bundle: Path, device: FakeDevice, trt: FakeTensorrt
) -> None:
    """The same texts, and fewer bytes where the best logits tell the token: 64 values, 64 ids, a sum."""
    expected = Generator.open(bundle, "onnx").generate(["abcabc"], params).finish()
    session = open_engine(bundle, device, num_best=64)
    got = Generator(session, BundleTokenizer(session.bundle.tokenizer_path)).generate(["abcabc"], params).finish()
    assert got[0].token_ids == expected[0].token_ids
    if bytes_per_token is not None:
        assert device.num_downloaded == 12 * bytes_per_token


def test_rows_share_memory_and_prefixes_are_copied(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    """A prompt read in row 1, its first 11 tokens given to row 0, both continued: as if each had read its own."""
    session, reference = open_engine(bundle, device, capacity=128), Generator.open(bundle, "onnx").session
    every, expected = session.allocate(2, 64), reference.allocate(2, 64)
    tokens = np.arange(13)[None] % 7
    for caches in (every, expected):
        caches.rows(1, 1).run(tokens, np.zeros(1, np.int32), np.array([13], np.int32))
        caches.copy_prefix(1, 0, 11)
    call = (np.array([[5], [6]]), np.array([11, 13], np.int32), np.ones(2, np.int32))
    np.testing.assert_allclose(every.run(*call), expected.run(*call), rtol=1e-5, atol=1e-5)
    # The same by way of the host's memory, from either backend to the other, and less than what was read.
    parts = [caches.read_prefix(1, 12) for caches in (every, expected)]
    for one, other in zip(*parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for caches, given in zip((every, expected), reversed(parts), strict=True):
        caches.write_prefix(0, given, 10)
    call = (np.array([[5], [6]]), np.array([10, 14], np.int32), np.ones(2, np.int32))
    np.testing.assert_allclose(every.run(*call), expected.run(*call), rtol=1e-5, atol=1e-5)


def test_rows_that_tensorrt_cannot_read(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    caches = open_engine(bundle, device, capacity=12).allocate(2, 12)
    assert caches.rows(0, 1).batch == 1
    with pytest.raises(
        RequestError, match="a row of the cache .* bytes, a GPU reads from multiples of 256; take another --capacity"
    ):
        caches.rows(1, 1)


def test_plugins_are_loaded_before_the_plan(bundle: Path, device: FakeDevice, trt: FakeTensorrt, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_text("")
    open_engine(bundle, device, tmp_path / "library.so")
    assert trt.libraries == [str(tmp_path / "library.so")]
    with pytest.raises(EngineError, match="cannot load the plugins of .*absent.so .*; build it anew: bilevel kernels build"):
        open_engine(bundle, device, tmp_path / "absent.so")


def test_two_sessions_of_two_bundles(
    bundle: Path, device: FakeDevice, trt: FakeTensorrt, tmp_path: Path, exported: Copied
) -> None:
    """In one process, with the same plugins and at the same time: each gives what its own bundle gives."""
    (tmp_path / "library.so").write_text("")
    other = Path(shutil.copytree(exported("moba")[1], tmp_path / "other"))
    plugins = {"nodes": 3, "library": None}
    sessions = [open_engine(each, device, tmp_path / "library.so", plugins=plugins) for each in (bundle, other, bundle)]
    found = [run_calls(session, (3, 1, 1, 1)) for session in sessions]
    for each, logits in zip((bundle, other, bundle), found, strict=True):
        expected = run_calls(Generator.open(each, "onnx").session, (3, 1, 1, 1))
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="NVIDIA's wheels of TensorRT-RTX are for x86-64")
def test_registries_of_the_real_module(tmp_path: Path) -> None:
    """What the double does, TensorRT-RTX does: a library fits into each local registry, and once into the process's."""
    library = build_plugins([request_of("WriteCache", *make_call("WriteCache"))], tmp_path / "library.so")
    program = """
import sys
import tensorrt_rtx as trt

builders = [trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)) for _ in range(2)]
registries = [each.get_plugin_registry() for each in builders] + [trt.get_plugin_registry()] * 2
print(*[registry.load_library(sys.argv[1]) is not None for registry in registries])
"""
    run = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True", "True", "False"]


def test_calls_outside_the_engine_are_refused(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    session = open_engine(bundle, device, capacity=32)
    with pytest.raises(
        RequestError, match="batch=5 is outside what the engine was built for .1 to 4.; build it anew: .* --batch 5"
    ):
        session.allocate(5, 16)
    with pytest.raises(RequestError, match="capacity=48 is more than the engine was built for .32.; shorten the prompt, or"):
        session.allocate(1, 48)
    caches = session.allocate(1, 32)
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    with pytest.raises(RequestError, match="a call of 17 tokens a row is outside .*; give a prefill chunk of at most 16"):
        caches.run(np.zeros((1, 17), np.int64), zero, 17 * one)
    with pytest.raises(RequestError, match="4 new tokens do not fit behind 30 in caches of 32"):
        caches.run(np.zeros((1, 4), np.int64), 30 * one, 4 * one)
    with pytest.raises(RequestError, match="input_ids has shape .2, 1., the caches hold 1 rows"):
        caches.run(np.zeros((2, 1), np.int64), zero, one)


def test_what_does_not_run_here_is_said(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    remedy = "build it anew: bilevel build .* --backend tensorrt"
    with pytest.raises(EngineError, match=f"was built by tensorrt 10.3.0, installed is 11.4.0; install 10.3.0, or {remedy}"):
        open_engine(bundle, device, version="10.3.0")
    manifest = write_engine(bundle)
    plan = manifest.with_suffix(".plan")
    plan.write_bytes(plan.read_bytes()[:-1])
    engine = read_engine(manifest)
    with pytest.raises(EngineError, match=f"fake.plan is damaged: its SHA-256 differs from the one in its manifest; {remedy}"):
        EngineSession(load_bundle(bundle), engine, None, device)  # type: ignore[arg-type]
    plan.unlink()
    with pytest.raises(EngineError, match=f"fake.plan cannot be read .No such file or directory.; {remedy}"):
        EngineSession(load_bundle(bundle), engine, None, device)  # type: ignore[arg-type]


def test_a_plan_that_tensorrt_refuses(bundle: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    from hashlib import sha256

    manifest = write_engine(bundle)
    content = json.loads(manifest.read_text())
    manifest.with_suffix(".plan").write_bytes(b"garbage")
    content["plan"]["sha256"] = sha256(b"garbage").hexdigest()
    manifest.write_text(json.dumps(content))
    with pytest.raises(EngineError, match="does not load .the plan's magic tag does not match.; build it anew"):
        EngineSession(load_bundle(bundle), read_engine(manifest), None, device)  # type: ignore[arg-type]


def test_an_engine_of_another_graph(copied: Copied, tmp_path: Path, device: FakeDevice, trt: FakeTensorrt) -> None:
    (tmp_path / "other").mkdir()
    other = write_bundle(tmp_path / "other")
    engine = read_engine(write_engine(other))
    with pytest.raises(EngineError, match="fake.plan has no tensor .*; build it anew"):
        EngineSession(load_bundle(copied("two_level")[1]), engine, None, device)  # type: ignore[arg-type]


def test_what_rtx_compiles_is_kept(
    bundle: Path, trt: FakeTensorrt, device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From process to process, for one kind of GPU. The context whose calls are captured compiles before it runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(device: FakeDevice) -> EngineSession:
        trt._device = device
        session = open_engine(bundle, device, backend="tensorrt-rtx")
        caches = session.allocate(1, 16)
        for past, length in enumerate((2, 1, 1)):
            caches.run(np.ones((1, length), np.int64), np.full(1, past + 1, np.int32), np.full(1, length, np.int32))
        return session

    def kept() -> list[Any]:
        (file,) = (tmp_path / "bilevel").iterdir()
        assert file == cache_file(session.engine)
        return list(json.loads(file.read_bytes()))

    session = run(device)
    assert kept() == ["RTX 5090", ["EAGER", "LAZY"]]
    cache_file(session.engine).write_bytes(json.dumps(["RTX 5090", ["FROM BEFORE"]]).encode())
    run(device)
    assert kept() == ["RTX 5090", ["EAGER", "FROM BEFORE", "LAZY"]]
    other = FakeDevice()
    other.name = "RTX 4070"
    run(other)
    assert kept() == ["RTX 4070", ["EAGER", "LAZY"]]
    cache_file(session.engine).write_bytes(b"damaged")
    run(device)
    assert kept() == ["RTX 5090", ["EAGER", "LAZY"]]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    run(device)  # a home that cannot be written to is no obstacle


@pytest.mark.parametrize(("free_mib", "budget"), [(1024, 1 << 20), (256 + 5, 5 * 2**20 // 8), (100, 0)])
def test_weights_that_find_no_room_stay_with_the_host(
    free_mib: int, budget: int, bundle: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What caches and activations take is not given to weights; the double has 1 MiB of weights that may stream."""
    trt._device = device = FakeDevice(limit=free_mib * 2**20)
    sizes = {"weights": 2**40, "activations": 4 * 2**20, "caches": 3 * 2**20 // 8}
    session = open_engine(bundle, device, weight_streaming=True, memory_bytes=sizes)
    assert session._engine.weight_streaming_budget_v2 == budget
    tokens = run_calls(session, (3, 1, 1, 1, 1))
    np.testing.assert_allclose(tokens, run_calls(Generator.open(bundle, "onnx").session, (3, 1, 1, 1, 1)), rtol=1e-5, atol=1e-5)
    # TensorRT refuses a capture while weights stream.
    assert device.num_graph_launches == (3 if budget == 1 << 20 else 0)


@pytest.mark.parametrize("when", [1, 2])
def test_a_refused_capture_is_said_once(
    when: int, bundle: Path, device: FakeDevice, trt: FakeTensorrt, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever refuses it, the first or a later one: the rows get their tokens, and no later call is captured."""
    session, captured = open_engine(bundle, device, new_tokens=[[1, 16]]), []

    def refuse(enqueue: Callable[[], None]) -> Callable[[], None]:
        captured.append(enqueue)
        if len(captured) >= when:
            raise EngineError("CUDA refused the captured graph (operation not permitted when stream is capturing)")
        return FakeDevice.capture(device, enqueue)

    device.capture = refuse  # type: ignore[method-assign]
    lengths = (1, 1, 1, 3, 1, 1, 1, 2, 1, 1)
    found = run_calls(session, lengths), run_calls(session, lengths)
    np.testing.assert_allclose(found[0], run_calls(Generator.open(bundle, "onnx").session, lengths), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(*found)
    assert len(captured) == when and [record.levelname for record in caplog.records] == ["WARNING"]
    assert "decode runs without a CUDA graph" in caplog.text and "not permitted" in caplog.text


@pytest.mark.parametrize("is_capturable", [True, False])
def test_rtx_is_asked_before_a_capture(
    is_capturable: bool, bundle: Path, device: FakeDevice, trt: FakeTensorrt, caplog: pytest.LogCaptureFixture
) -> None:
    trt.is_capturable = is_capturable
    lengths = (3, 1, 1, 1)
    found = run_calls(open_engine(bundle, device, backend="tensorrt-rtx"), lengths)
    np.testing.assert_allclose(found, run_calls(Generator.open(bundle, "onnx").session, lengths), rtol=1e-5, atol=1e-5)
    assert device.num_graph_launches == 2 * is_capturable
    assert ("TensorRT-RTX would not be captured" in caplog.text) is not is_capturable
    assert "says it cannot be captured" not in caplog.text


def test_out_of_the_gpus_memory(bundle: Path, trt: FakeTensorrt) -> None:
    small = FakeDevice(limit=1000)
    session = open_engine(bundle, small)
    with pytest.raises(EngineError, match="out of memory.; use a smaller capacity, batch or chunk"):
        session.allocate(1, 16)
    assert small.used == 0  # what was allocated before is freed


@pytest.mark.parametrize(
    "backend, package", [("tensorrt", "on a Jetson JetPack brings it"), ("tensorrt-rtx", "tensorrt-rtx-cu13")]
)
def test_a_module_that_is_not_there(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(EngineError, match=f"needs the Python module tensorrt.* .No module named .*; install .*{package}"):
        engine_session.load_module(backend)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="NVIDIA's wheels of TensorRT-RTX are for x86-64")
@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt_lean"])
def test_every_name_exists_in_the_real_modules(module: str) -> None:
    trt = importlib.import_module(module)
    owners = [
        trt,
        trt.ILogger,
        trt.Runtime,
        trt.ICudaEngine,
        trt.IExecutionContext,
        trt.IPluginRegistry,
        trt.ExecutionContextAllocationStrategy,
    ]
    ours = {name for each in (EngineSession, engine_session.EngineCaches) for name in dir(each)}
    text = inspect.getsource(engine_session)
    if module == "tensorrt_rtx":
        owners += [trt.DynamicShapesKernelSpecializationStrategy, trt.IRuntimeConfig, trt.IRuntimeCache]
        text += inspect.getsource(compiled)
    source = ast.walk(ast.parse(text))
    used = {
        node.attr
        for node in source
        if isinstance(node, ast.Attribute)
        and re.search(r"\b_?(trt|engine|context|runtime|config|cache)\b", ast.unparse(node.value))
    }
    used -= (
        {name for name in ours}
        | set(Engine.__dataclass_fields__)
        | {"remedy", "device_bytes", "read_plan", "runtime", "plugins"}
    )
    assert used >= {"execute_async_v3", "set_tensor_address", "deserialize_cuda_engine", "USER_MANAGED", "load_library"}
    if module == "tensorrt_lean":  # TensorRT itself compiles nothing on the device
        used -= {"DynamicShapesKernelSpecializationStrategy", "EAGER", "dynamic_shapes_kernel_specialization_strategy"}
        used -= {"set_execution_context_allocation_strategy", "is_stream_capturable"}
    assert [name for name in sorted(used) if not any(hasattr(owner, name) for owner in owners)] == []


def test_manifests_that_are_none(bundle: Path) -> None:
    write_engine(bundle, "good")
    for name, changes in (
        ("a", {"format_version": 2}),
        ("b", {"backend": "tvm"}),
        ("c", {"batch": [4, 1]}),
        ("d", {"plan": {"file": "../../secret", "sha256": "", "bytes": 1}}),
        ("e", {"capacity": "many"}),
        ("f", {"new_tokens": []}),
    ):
        write_engine(bundle, name, **{"new_tokens": [[1, 1]], **changes})
    (bundle / "engines" / "g.json").write_text("{")
    engines, problems = find_engines(bundle)
    assert [engine.name for engine in engines] == ["good"] and len(problems) == 7
    for problem, word in zip(
        problems, ("format", "'tvm'", "batch", "secret", "capacity", "profile", "JSON|Expecting"), strict=True
    ):
        assert "is no engine's manifest" in str(problem) and "build it anew: bilevel build" in str(problem)
        assert any(each in str(problem) for each in word.split("|")), str(problem)
