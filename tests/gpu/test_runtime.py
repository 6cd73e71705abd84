"""The runtime's part of ``make gpu-test``, on the CPU: its checks pass in doubles, and report errors that are planted."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bilevel.bundle.format import load_bundle
from bilevel.errors import EngineError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.backend.select import BackendOption
from bilevel.runtime.backend.session import Session
from tests.doubles.tensorrt import FakeDevice
from tests.gpu import checks_backends as backends
from tests.gpu import checks_device as checks
from tests.gpu import program as gpu_test


class HostDevice(FakeDevice):
    """The host's memory, under its own name; all devices have the same, as streams of one GPU do."""

    shared: ClassVar[dict[int, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.dlpack_device = self.shared, (1, 0)


def test_they_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "order", partial(checks.order, rounds=3))
    found = list(checks.device(HostDevice))
    assert len(found) == 11 and [result for result in found if result.ok is not True] == []
    assert not HostDevice.shared, "everything went back"


def forget(*_: Any, **__: Any) -> None:
    """Nothing is done."""


def late_upload(self: Any, address: int, array: Any) -> None:
    """It reads the array when it is too late."""
    self.enqueue(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))


def wrong_pitch(self: Any, target: int, source: int, width: int, pitch: int, count: int, source_pitch: int = 0) -> None:
    RIGHT(self, target, source, width, pitch, count, pitch)


def eager_capture(self: Any, enqueue: Callable[[], None]) -> Callable[[], None]:
    enqueue()
    return enqueue


def stuck_capture(self: Any, enqueue: Callable[[], None]) -> Callable[[], None]:
    """A failure does not end it."""
    self.captured = []
    enqueue()
    work, self.captured = self.captured, None
    return lambda: self.pending.extend(work)


def last_first(self: Any) -> None:
    work, self.pending = self.pending, []
    for each in work[:-1][::-1] + work[-1:]:
        each()


def silent_refusal(self: Any, num_bytes: int) -> int:
    if num_bytes > self.limit:
        raise EngineError("CUDA error 2")
    return int(FakeDevice.allocate_raw(self, num_bytes))


RIGHT = FakeDevice.copy_strips


@pytest.mark.parametrize(
    "method, planted, check, reported",
    [
        ("upload", late_upload, checks.copies, "up and down"),
        ("download", forget, checks.copies, "up and down"),
        ("clear", forget, checks.copies, "allocated as zeros"),
        ("copy_strips", wrong_pitch, checks.copies, "strips"),
        ("synchronize", last_first, checks.order, "order of a stream"),
        ("order", forget, checks.order, "another stream waits"),
        ("capture", eager_capture, checks.graphs, "capture and replay"),
        ("capture", stuck_capture, checks.graphs, "a capture that fails"),
        ("allocate_raw", silent_refusal, checks.limits, "more than there is"),
        ("free_raw", forget, checks.limits, "memory comes back"),
    ],
)
def test_what_is_wrong_is_reported(
    method: str, planted: Any, check: Any, reported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostDevice, "shared", {})
    monkeypatch.setattr(HostDevice, method, planted)
    lines: list[str] = []
    rounds = {"rounds": 3} if check is checks.order else {}
    assert gpu_test.run_group(check(HostDevice, **rounds), lines.append) == 1
    assert [line for line in lines if reported in line and line.endswith("false]")]


@pytest.fixture
def bundle(exported: Any) -> Path:
    found: Path = exported("two_level")[1]
    return found


class Altered:
    """A session whose logits are off."""

    def __init__(self, session: Any, by: float) -> None:
        self.session, self.bundle, self.by = session, session.bundle, by

    def allocate(self, batch: int, capacity: int) -> Any:
        caches, by = self.session.allocate(batch, capacity), self.by

        class Caches:
            def run(self, *call: Any) -> np.ndarray:
                logits = np.array(caches.run(*call))
                logits[:, 5] += by
                return logits

        return Caches()


def test_backends_are_compared_with_the_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounding passes, an error does not; what does not run here is not run, with its reason."""

    copied = [0, 3]

    def opened(path: Path, option: BackendOption) -> Session:
        session: Any = OnnxSession(load_bundle(path), 1)
        by = {"onnx": 0.0, "onnx-cuda": 1e-4, "tensorrt": 1e-1}.get(option.backend)
        if by is None:
            raise EngineError("the plan does not load")
        return Altered(session, 0.0 if option.name == "engine" else by)  # type: ignore[return-value]

    monkeypatch.setattr(backends, "copied_caches", lambda option: copied.pop(0))
    engine: Any = object()
    options = [
        BackendOption("onnx-cuda", "graph", ""),
        BackendOption("tensorrt", "engine", "", engine),
        BackendOption("tensorrt", "another", "", engine),
        BackendOption("tensorrt-rtx", "rtx", "", engine),
        BackendOption("tensorrt-rtx", "old", "it was built for another GPU", engine),
    ]
    found = list(backends.run_options(bundle, options, opened))
    assert [result.ok for result in found] == [True, True, True, True, False, False, False, False, None]
    assert "48 of 48 tokens equal" in found[0].measure and found[7].measure == "the plan does not load"
    assert (found[3].measure, found[6].measure) == ("0 caches copied", "3 caches copied")
    assert found[5].what.endswith("a second session")


def test_a_refusal_by_design_is_not_a_failure() -> None:
    """TensorRT before 10.15 needs the plugins; whatever else a build ends with is a failure."""
    said = "tensorrt 10.3 has no layer that writes caches in place, so that an engine needs the plugin WriteCache: build"
    verdicts = [backends.judge_build("x", status, text).ok for status, text in ((0, "built"), (2, said), (2, "no"), (1, said))]
    assert verdicts == [True, None, False, False]


def test_where_a_bundle_comes_from(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the one that is named: an engine is built into it."""
    monkeypatch.setenv(backends.VARIABLE, str(bundle))
    copy = backends.find_bundle(tmp_path)
    assert isinstance(copy, Path) and load_bundle(copy).vocab_size and copy != bundle
    monkeypatch.setenv(backends.VARIABLE, str(tmp_path / "absent"))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    said = backends.find_bundle(tmp_path / "new")
    assert isinstance(said, str) and "to export one torch, onnx, onnxscript are missing; make one where they are" in said
    assert [result.ok for result in backends.backends(tmp_path)] == [None]


def test_on_this_machine(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group as it stands, with its own builds left out: every backend that cannot run here says why."""
    monkeypatch.setenv(backends.VARIABLE, str(bundle))
    monkeypatch.setattr(backends, "build_engines", lambda copy: iter(()))
    found = list(backends.backends(tmp_path))
    assert found and all(result.ok in (True, None) for result in found) and found[-1].measure
    shutil.rmtree(tmp_path / "bundle")
