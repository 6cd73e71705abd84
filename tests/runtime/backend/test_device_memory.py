"""The runtime's side of CUDA: every name that it uses exists, and what CUDA refuses becomes a sentence."""

from __future__ import annotations

import ast
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

from bilevel.errors import EngineError
from bilevel.runtime.backend import device_memory
from bilevel.runtime.backend.device_memory import CudaDevice


def used_names() -> set[str]:
    """What device_memory.py looks up in ``cuda.bindings.runtime``."""
    nodes = ast.walk(ast.parse(inspect.getsource(device_memory)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("cuda")}


class FakeCuda:
    """Answers like ``cuda.bindings.runtime``, on host memory; notes the calls. refused: {function: status}."""

    def __init__(self, **refused: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refused = refused
        self.cudaStreamNonBlocking = 1
        self.cudaError_t = SimpleNamespace(cudaErrorMemoryAllocation=2)
        self.cudaMemcpyKind = SimpleNamespace(
            cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="across"
        )
        self.cudaEventDisableTiming = 2
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattr__(self, name: str) -> Any:
        results = {
            "cudaStreamCreateWithFlags": (77,),
            "cudaMalloc": (4096,),
            "cudaStreamEndCapture": ("graph",),
            "cudaGraphInstantiate": ("executable",),
            "cudaMemGetInfo": (1000, 2000),
            "cudaGetDevice": (3,),
            "cudaEventCreateWithFlags": ("event",),
            "cudaGetErrorString": (b"out of memory",),
        }

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.refused.get(name, 0), *results.get(name, ())

        return call


def make(monkeypatch: pytest.MonkeyPatch, **refused: int) -> tuple[CudaDevice, FakeCuda]:
    cuda = FakeCuda(**refused)
    monkeypatch.setattr(device_memory, "require", lambda name: cuda)
    return CudaDevice(), cuda


def test_every_name_exists_in_the_real_package() -> None:
    assert len(used_names()) > 15
    kinds = (real, real.cudaMemcpyKind, real.cudaError_t, real.cudaStreamCaptureMode)
    assert [name for name in used_names() if not any(hasattr(kind, name) for kind in kinds)] == []
    assert real.cudaError_t.cudaErrorMemoryAllocation == 2


def test_memory_is_freed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda = make(monkeypatch)
    memory = device.allocate(64, zeroed=True)
    assert ("cudaMalloc", 64) in cuda.calls and ("cudaMemsetAsync", 4096, 0, 64, 77) in cuda.calls
    del memory
    assert cuda.calls.count(("cudaFree", 4096)) == 1


def test_copies_name_addresses_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda = make(monkeypatch)
    memory, array = device.allocate(64), np.zeros(4, np.float32)
    device.upload(memory.address, array)
    device.download(array, memory.address)
    assert ("cudaMemcpyAsync", 4096, array.ctypes.data, 16, "up", 77) in cuda.calls
    assert ("cudaMemcpyAsync", array.ctypes.data, 4096, 16, "down", 77) in cuda.calls
    assert device.free_bytes() == 1000


def test_strips_and_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances of target and source as CUDA wants them; an event is recorded here, waited for there, and dropped."""
    device, cuda = make(monkeypatch)
    device.copy_strips(10, 20, 4, 8, 3)
    device.copy_strips(10, 20, 4, 8, 3, 4)
    assert cuda.calls[-2:] == [("cudaMemcpy2DAsync", 10, 8, 20, pitch, 4, 3, "across", 77) for pitch in (8, 4)]
    assert device.dlpack_device == (2, 3)
    device.order(5)
    assert cuda.calls[-4:] == [
        ("cudaEventCreateWithFlags", 2),
        ("cudaEventRecord", "event", 77),
        ("cudaStreamWaitEvent", 5, "event", 0),
        ("cudaEventDestroy", "event"),
    ]


def test_a_capture_is_ended_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda = make(monkeypatch)
    launch = device.capture(lambda: cuda.calls.append(("work",)))
    launch()
    names = [call[0] for call in cuda.calls]
    assert names[-6:] == [
        "cudaStreamBeginCapture",
        "work",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaGraphLaunch",
    ]

    def broken() -> None:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        device.capture(broken)
    assert cuda.calls[-1][0] == "cudaStreamEndCapture"


@pytest.mark.parametrize(
    "refused, what",
    [
        ({"cudaStreamCreateWithFlags": 35}, "a stream .out of memory.; bilevel doctor tells"),
        ({"cudaMalloc": 2}, "3 MiB of memory .out of memory.; use a smaller capacity, batch or chunk"),
        ({"cudaStreamSynchronize": 700}, "to wait .out of memory.; bilevel doctor"),
        ({"cudaGraphInstantiate": 1}, "the captured graph"),
    ],
)
def test_refusals_are_sentences(refused: dict[str, int], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=f"CUDA refused {what}"):
        device, _ = make(monkeypatch, **refused)
        device.allocate(3 * 2**20)
        device.synchronize()
        device.capture(lambda: None)
