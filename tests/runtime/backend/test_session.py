"""What every backend answers, and that nobody outside ``runtime/backend`` asks which one it is."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel.bundle.engines import read_engine
from bilevel.bundle.format import load_bundle
from bilevel.errors import RequestError
from bilevel.runtime.backend import engine as engine_session
from bilevel.runtime.backend import select
from bilevel.runtime.backend.engine import EngineSession
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.backend.onnx_cuda import CudaSession
from bilevel.runtime.backend.session import Session, SessionLimits
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from tests import ROOT
from tests.doubles.bundle import PREFILL_CHUNK, predict, write_bundle
from tests.doubles.onnxruntime import FakeOnnxruntime
from tests.doubles.tensorrt import FakeDevice, FakeTensorrt, write_engine
from tests.runtime.cli.test_doctor import ORIN


def open_engine(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> EngineSession:
    device = FakeDevice()
    monkeypatch.setattr(engine_session, "load_module", lambda backend: FakeTensorrt(device))
    return EngineSession(load_bundle(folder), read_engine(write_engine(folder, **changes)), None, device)  # type: ignore[arg-type]


def open_cuda(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CudaSession:
    device = FakeDevice()
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeOnnxruntime(device))
    return CudaSession(load_bundle(folder), 1, device)  # type: ignore[arg-type]


def test_onnx_runtime_has_the_limits_of_the_model_and_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.runtime.backend.onnx.available_memory", lambda: 1000)
    session: Session = OnnxSession.open(write_bundle(tmp_path), threads=1)
    assert (session.backend, session.device) == ("onnx", "cpu")
    assert session.limits == SessionLimits(longest_call=PREFILL_CHUNK, cache_bytes=1000)


def test_onnx_runtime_on_a_gpu_has_the_limit_of_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session: Session = open_cuda(write_bundle(tmp_path), monkeypatch)
    assert (session.backend, session.device) == ("onnx-cuda", "cuda:0")
    before = session.limits
    assert before.longest_call == PREFILL_CHUNK and before.most_rows is None and before.capacity is None
    caches = session.allocate(2, 64)
    now = session.limits.cache_bytes
    assert before.cache_bytes is not None and now is not None and now < before.cache_bytes, "looked at anew"
    assert caches.batch == 2


@pytest.mark.parametrize(
    ("new_tokens", "longest_call"),
    [([[1, 16], [1, 1]], 16), ([[1, 8], [8, 12], [1, 1]], 12), ([[1, 4], [6, 16]], 4), ([[2, 16]], 0)],
)
def test_an_engine_has_the_limits_it_was_built_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_tokens: list[list[int]], longest_call: int
) -> None:
    """longest_call: of every length up to it there is a profile."""
    session: Session = open_engine(write_bundle(tmp_path), monkeypatch, batch=[2, 4], capacity=64, new_tokens=new_tokens)
    limits = session.limits
    assert (session.backend, session.device) == ("tensorrt", "cuda:0")
    assert (limits.fewest_rows, limits.most_rows, limits.capacity, limits.longest_call) == (2, 4, 64, longest_call)
    assert limits.builder == "the engine fake" and limits.remedy.startswith("build it anew: bilevel build ")


@pytest.mark.parametrize("backend", ["auto", "tensorrt", "onnx"])
def test_a_generator_opens_what_the_command_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The same choice as ``bilevel run --backend``, and why it was taken; the same tokens whatever runs."""
    bundle, device = write_bundle(tmp_path), FakeDevice()
    write_engine(bundle)
    monkeypatch.setattr(engine_session, "load_module", lambda backend: FakeTensorrt(device))
    monkeypatch.setattr(engine_session, "CudaDevice", lambda: device)
    monkeypatch.setattr(select, "look", lambda: ORIN)
    generator = Generator.open(bundle, backend)
    expected = ("onnx", "ONNX Runtime on the CPU") if backend == "onnx" else ("tensorrt", "fake")
    assert (generator.session.backend, generator.backend_reason) == expected
    (completion,) = generator.generate([[5, 6, 7]], SamplingParams(max_tokens=9)).finish()
    assert completion.token_ids == predict([5, 6, 7], 9)


def test_a_generator_says_what_it_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path)
    write_engine(bundle, architectures=[89])
    monkeypatch.setattr(select, "look", lambda: ORIN)
    generator = Generator.open(bundle)
    assert generator.session.backend == "onnx"
    assert "on the CPU (not fake: it was built for sm_89, this machine has sm_87" in generator.backend_reason
    with pytest.raises(RequestError, match="there is no backend 'tpu'"):
        Generator.open(bundle, "tpu")


def test_one_rule_chooses_for_the_api_and_for_the_commands() -> None:
    opener, of_generator = (inspect.signature(function).parameters for function in (select.open_session, Generator.open))
    assert {name: each.default for name, each in opener.items()} == {
        name: each.default for name, each in of_generator.items() if name != "speculation"
    }


def told_apart(source: str) -> list[int]:
    """Lines where a program asks of which class a session or caches are."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("isinstance", "issubclass", "type"):
            continue
        classes = ast.unparse(node.args[-1]).strip("()").lower().split(", ")
        if any(name.endswith(("session", "caches")) for name in classes):
            lines.append(node.lineno)
    return lines


def test_nobody_tells_backends_apart() -> None:
    sources = [path for path in (ROOT / "runtime").rglob("*.py") if path.parent.name != "backend"]
    assert len(sources) > 30
    assert {path.name: lines for path in sources if (lines := told_apart(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = isinstance(a, EngineSession)", [1]),
        ("\nif isinstance(a, (int, backend.OnnxCaches)): pass", [2]),
        ("type(self.session).__name__", [1]),
        ("isinstance(session.bundle.eos, int)", []),
        ("isinstance(prompt, str)", []),
    ],
)
def test_telling_apart_is_noticed(source: str, lines: list[int]) -> None:
    assert told_apart(source) == lines
