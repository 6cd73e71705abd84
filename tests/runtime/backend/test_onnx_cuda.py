"""ONNX Runtime on a GPU, through a double that executes on the CPU and enforces the real one's rules."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bilevel import machine as machine_module
from bilevel.bundle.format import load_bundle
from bilevel.errors import BundleError, EngineError, MissingDependency, RequestError
from bilevel.runtime.backend import onnx_cuda
from bilevel.runtime.backend.onnx_cuda import CudaSession
from bilevel.runtime.backend.select import choose, list_options, open_session
from bilevel.runtime.cli.main import main
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.serve.limits import choose_limits
from tests.doubles.bundle import write_bundle
from tests.doubles.onnxruntime import FakeOnnxruntime
from tests.doubles.tensorrt import FakeDevice
from tests.runtime.cli.test_doctor import ORIN, no_driver

Use = Callable[..., FakeOnnxruntime]


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def use(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Put the double in the place of ONNX Runtime."""

    def put(**options: Any) -> FakeOnnxruntime:
        module = FakeOnnxruntime(device, **options)
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        return module

    return put


def open_cuda(bundle: Path, device: FakeDevice) -> CudaSession:
    return CudaSession(load_bundle(bundle), 1, device)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [["ab"], ["abcabcabc", "b", "cab"]])
def test_the_tokens_of_the_cpu(prompts: list[str], exported: Any, device: FakeDevice, use: Use) -> None:
    """Chunked prefill of rows of different lengths; one binding for single tokens, caches in place, no library of the CPU's."""
    bundle, params = exported("two_level")[1], SamplingParams(max_tokens=12)
    expected = Generator.open(bundle, "onnx").generate(prompts, params, prefill_chunk=4).finish()
    module = use()
    opened = open_cuda(bundle, device)
    got = Generator(opened, BundleTokenizer(opened.bundle.tokenizer_path)).generate(prompts, params, prefill_chunk=4).finish()
    assert [each.token_ids for each in got] == [each.token_ids for each in expected]
    assert module.sessions[0].num_bindings <= 4 and opened.cpu_library is None


def test_rows_routes_and_prefixes(exported: Any, device: FakeDevice, use: Use) -> None:
    bundle = exported("two_level")[1]
    expected = Generator.open(bundle, "onnx").session.allocate(2, 128)
    use()
    every = open_cuda(bundle, device).allocate(2, 128)
    tokens = np.arange(13)[None] % 7
    for caches in (every, expected):
        caches.rows(1, 1).run(tokens, np.zeros(1, np.int32), np.array([13], np.int32))
        caches.copy_prefix(1, 0, 11)
    call = (np.array([[5], [6]]), np.array([11, 13], np.int32), np.ones(2, np.int32))
    # The CPU's library, which the other side has, rounds otherwise.
    np.testing.assert_allclose(every.run(*call), expected.run(*call), rtol=1e-4, atol=1e-5)
    assert every.routes is not None and expected.routes is not None
    np.testing.assert_array_equal(every.routes.blocks, expected.routes.blocks)


def test_a_server_asks_for_what_the_gpu_has_room_for(exported: Any, use: Use) -> None:
    bundle = load_bundle(exported("two_level")[1])
    use()
    row = bundle.state_bytes(1, bundle.block_size)
    for blocks, tokens in ((5, 4 * bundle.block_size), (10**6, bundle.max_positions)):
        device = FakeDevice(limit=4 * 2 * row * blocks)
        limits = choose_limits(CudaSession(bundle, 1, device), 2, None, 8)  # type: ignore[arg-type]
        assert limits.row_tokens == tokens, "a quarter of it, less the block in which idle rows are written"


def test_it_never_runs_on_the_cpu_unasked(exported: Any, device: FakeDevice, use: Use) -> None:
    bundle = exported("two_level")[1]
    use(loads=False)
    with pytest.raises(
        EngineError,
        match="CUDA provider does not load .*libonnxruntime_providers_cuda.so.*; install what it needs: "
        "pip install 'onnxruntime-gpu.cuda,cudnn.'",
    ):
        open_cuda(bundle, device)
    use(has_provider=False)
    with pytest.raises(
        EngineError, match="is built without its CUDA provider; pip uninstall onnxruntime, then pip install onnx"
    ):
        open_cuda(bundle, device)


def test_calls_that_fail(exported: Any, device: FakeDevice, use: Use) -> None:
    bundle = exported("two_level")[1]
    module = use()
    opened = open_cuda(bundle, device)
    with pytest.raises(RequestError, match="capacity=13 must be a multiple of the model's block_size"):
        opened.allocate(1, 13)
    caches = opened.allocate(1, 16)
    call = (np.zeros((1, 4), np.int64), np.zeros(1, np.int32), np.full(1, 4, np.int32))
    with pytest.raises(RequestError, match="4 new tokens do not fit behind 13 in caches of 16; give shorter prompts"):
        caches.run(call[0], np.full(1, 13, np.int32), call[2])
    module.out_of_memory = True
    with pytest.raises(
        BundleError, match="not run the graph on the GPU .*Failed to allocate memory.*; use fewer or shorter prom"
    ):
        caches.run(*call)
    device.limit = device.used
    with pytest.raises(EngineError, match="out of memory.; use a smaller capacity, batch or chunk"):
        opened.allocate(4, 128)


def test_a_graph_that_does_not_open(tmp_path: Path, device: FakeDevice, use: Use) -> None:
    bundle = load_bundle(write_bundle(tmp_path))
    bundle.graph_path.write_bytes(b"no graph")
    use()
    with pytest.raises(
        BundleError, match="model.onnx cannot be opened by ONNX Runtime on the GPU .*; bilevel run --backend onnx$"
    ):
        CudaSession(bundle, 1, device)  # type: ignore[arg-type]


def test_the_log_stays_quiet(device: FakeDevice, use: Use, capfd: pytest.CaptureFixture[str]) -> None:
    """What ONNX Runtime prints of libraries that it lacks is said in the sentence, once."""
    module = use(loads=False)
    assert "CUDA provider does not load" in machine_module.find_provider_problem() and module.severity == 3
    use()
    assert machine_module.find_provider_problem() == ""
    assert capfd.readouterr() == ("", "")


GPU = replace(ORIN, packages={**ORIN.packages, "tensorrt": None})


@pytest.mark.parametrize(
    "machine, expected",
    [
        (GPU, ""),
        (replace(GPU, packages={}), "onnxruntime is not installed; pip install 'bilevel[gpu]'"),
        (no_driver(), "the CUDA driver libcuda.so.1 cannot be opened; install it"),
        (replace(GPU, cuda_provider_problem="libcudnn.so.9 is missing; install it"), "libcudnn.so.9 is missing; install it"),
        (replace(GPU, packages={"onnxruntime": "1.30"}), "cuda.bindings is not installed; pip install 'cuda-bindings==12.*'"),
    ],
)
def test_whether_it_runs(machine: Any, expected: str, tmp_path: Path) -> None:
    bundle = load_bundle(write_bundle(tmp_path))
    (option,) = [option for option in list_options(bundle, machine) if option.backend == "onnx-cuda"]
    assert option.problem == expected
    if not expected:
        assert choose(list_options(bundle, machine))[0].backend == "onnx", "its speed is unknown: only who asks for it gets it"
        assert "on the GPU (portable bodies, of unknown speed)" in choose(list_options(bundle, machine), "onnx-cuda")[1]
    else:
        with pytest.raises(EngineError, match="nothing runs this bundle here: "):
            choose(list_options(bundle, machine), "onnx-cuda")


def test_the_command(
    exported: Any, device: FakeDevice, use: Use, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(exported("two_level")[1])
    command = ["run", bundle, "abc", "--max-tokens", "3", "--backend"]
    assert main([*command, "onnx"]) == 0
    expected = capsys.readouterr().out
    use()
    monkeypatch.setattr("bilevel.runtime.backend.select.look", lambda: GPU)
    monkeypatch.setattr(onnx_cuda, "CudaDevice", lambda: device)
    assert main([*command, "onnx-cuda"]) == 0
    out, err = capsys.readouterr()
    assert out == expected and "[model.onnx in ONNX Runtime on the GPU (portable bodies, of unknown speed)]" in err
    assert main([*command, "onnx-cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"][0]["text"] in expected


def test_this_machine_refuses_in_a_sentence(exported: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The real library, as it is installed here: no session, and no silent run on the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert machine_module.find_provider_problem()[:40] in ("", "ONNX Runtime's CUDA provider does not lo")
        return
    assert main(["run", str(exported("two_level")[1]), "abc", "--backend", "onnx-cuda"]) != 0
    assert "nothing runs this bundle here: model.onnx in ONNX Runtime on the GPU" in capsys.readouterr().err
    with pytest.raises(EngineError, match="onnx-cuda|nothing runs"):
        open_session(exported("two_level")[1], "onnx-cuda")


def test_what_is_used_exists() -> None:
    """The double answers for the real module: every option and method is there, with the parameters that are given."""
    for name in ("get_available_providers", "set_default_logger_severity", "preload_dlls"):
        assert callable(getattr(onnxruntime, name))
    for method in (onnxruntime.IOBinding.bind_input, onnxruntime.IOBinding.bind_output):
        assert list(inspect.signature(method).parameters)[1:] == [
            "name",
            "device_type",
            "device_id",
            "element_type",
            "shape",
            "buffer_ptr",
        ]
    assert "enable_fallback" in inspect.getsource(onnxruntime.InferenceSession.__init__)
    assert {"run_with_iobinding", "get_providers"} <= set(dir(onnxruntime.InferenceSession))


@pytest.mark.parametrize("module", ["cuda", "cuda.bindings"])
def test_without_cuda_bindings(module: str, exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other packages have a folder ``cuda``."""
    for name in [name for name in sys.modules if name.startswith("cuda.bindings")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match="cuda.bindings.driver is not installed: pip install 'bilevel.gpu.'"):
        CudaSession(load_bundle(exported("two_level")[1]))
