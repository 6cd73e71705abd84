"""The runtime's side of CUDA: every name that it uses exists, and what CUDA refuses becomes a sentence."""

from __future__ import annotations

import ast
import inspect
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as real

from bilevel.errors import EngineError
from bilevel.runtime.backend import device_memory
from bilevel.runtime.backend.device_memory import CudaDevice


def used_names() -> set[str]:
    """What device_memory.py looks up in ``cuda.bindings.driver``."""
    nodes = ast.walk(ast.parse(inspect.getsource(device_memory)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr[:2].lower() == "cu"}


class FakeCuda:
    """Answers like ``cuda.bindings.driver``, on host memory; notes the calls. refused: {function: status}.

    As the driver does, it refuses a thread whose context nobody has set. context: that of the thread that begins.
    """

    def __init__(self, context: int = 0, **refused: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refused, self.threads = refused, {threading.get_ident(): context}
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        self.CUresult = SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2)
        self.CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE="device")
        self.CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        self.CUDA_MEMCPY2D = SimpleNamespace

    def __getattr__(self, name: str) -> Any:
        results = {
            "cuCtxGetCurrent": (self.threads.get(threading.get_ident(), 0),),
            "cuDeviceGet": (0,),
            "cuDevicePrimaryCtxRetain": (5,),
            "cuStreamCreate": (77,),
            "cuMemAlloc": (4096,),
            "cuStreamEndCapture": ("graph",),
            "cuGraphInstantiate": ("executable",),
            "cuMemGetInfo": (1000, 2000),
            "cuCtxGetDevice": (3,),
            "cuEventCreate": ("event",),
            "cuGetErrorString": (b"out of memory",),
        }
        needs_context = name not in ("cuInit", "cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuGetErrorString")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            thread = threading.get_ident()
            if name == "cuCtxSetCurrent":
                self.threads[thread] = int(arguments[0])
            if needs_context and not self.threads.get(thread):
                return 201, *[None] * len(results.get(name, ()))
            return self.refused.get(name, 0), *results.get(name, ())

        return call


def make(monkeypatch: pytest.MonkeyPatch, context: int = 0, **refused: int) -> tuple[CudaDevice, FakeCuda]:
    cuda = FakeCuda(context, **refused)
    # The CUDA runtime of these bindings is newer than the driver: it would answer 35 to everything.
    monkeypatch.setattr(device_memory, "require", {"cuda.bindings.driver": cuda}.__getitem__)
    return CudaDevice(), cuda


def test_every_name_exists_in_the_real_package() -> None:
    assert len(used_names()) > 25
    kinds = (real, real.CUresult, real.CUstreamCaptureMode, real.CUstream_flags, real.CUevent_flags, real.CUmemorytype)
    assert [name for name in used_names() if not any(hasattr(kind, name) for kind in kinds)] == []
    assert real.CUresult.CUDA_ERROR_OUT_OF_MEMORY == 2
    fields = ("srcMemoryType", "srcDevice", "srcPitch", "dstMemoryType", "dstDevice", "dstPitch", "WidthInBytes", "Height")
    assert all(hasattr(real.CUDA_MEMCPY2D, name) for name in fields)


@pytest.mark.parametrize("context", [0, 9])
def test_every_thread_gets_the_context(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's, else the first GPU's primary one, which is what TensorRT uses; once a thread."""
    device, cuda = make(monkeypatch, context)
    assert (("cuDevicePrimaryCtxRetain", 0) in cuda.calls) is not bool(context)
    seen: list[int | EngineError] = []

    def work() -> None:
        try:
            device.allocate(64)
            device.synchronize()
            seen.append(cuda.threads[threading.get_ident()])
        except EngineError as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [context or 5]
    assert cuda.calls.count(("cuCtxSetCurrent", context or 5)) == 2


def test_memory_is_freed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda = make(monkeypatch)
    memory = device.allocate(64, zeroed=True)
    assert ("cuMemAlloc", 64) in cuda.calls and ("cuMemsetD8Async", 4096, 0, 64, 77) in cuda.calls
    del memory
    assert cuda.calls.count(("cuMemFree", 4096)) == 1


def test_copies_name_addresses_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda = make(monkeypatch)
    memory, array = device.allocate(64), np.zeros(4, np.float32)
    device.upload(memory.address, array)
    device.download(array, memory.address)
    assert ("cuMemcpyHtoDAsync", 4096, array.ctypes.data, 16, 77) in cuda.calls
    assert ("cuMemcpyDtoHAsync", array.ctypes.data, 4096, 16, 77) in cuda.calls
    assert device.free_bytes() == 1000
    device.clear(memory.address, 0)  # the driver refuses copies of nothing
    device.upload(memory.address, np.zeros(0, np.float32))
    assert not [call for call in cuda.calls if call[0].startswith("cuMem") and 0 in call[3:4]]


def test_strips_and_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances of target and source as CUDA wants them; an event is recorded here, waited for there, and dropped."""
    device, cuda = make(monkeypatch)
    for source_pitch, expected in ((0, 8), (4, 4)):
        device.copy_strips(10, 20, 4, 8, 3, source_pitch)
        name, copy, stream = cuda.calls[-1]
        assert (name, stream, copy.WidthInBytes, copy.Height) == ("cuMemcpy2DAsync", 77, 4, 3)
        assert (copy.dstMemoryType, copy.dstDevice, copy.dstPitch) == ("device", 10, 8)
        assert (copy.srcMemoryType, copy.srcDevice, copy.srcPitch) == ("device", 20, expected)
    assert device.dlpack_device == (2, 3)
    device.order(5)
    assert cuda.calls[-4:] == [
        ("cuEventCreate", 2),
        ("cuEventRecord", "event", 77),
        ("cuStreamWaitEvent", 5, "event", 0),
        ("cuEventDestroy", "event"),
    ]


def test_a_capture_is_ended_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was captured goes with the last who can launch it."""
    device, cuda = make(monkeypatch)
    launch = device.capture(lambda: cuda.calls.append(("work",)))
    launch()
    del launch
    names = [call[0] for call in cuda.calls]
    assert names[-7:] == [
        "cuStreamBeginCapture",
        "work",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
    ]

    def broken() -> None:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        device.capture(broken)
    assert cuda.calls[-1][0] == "cuStreamEndCapture"


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this one may be: the real bindings, which find no libcuda."""
    missing = FakeCuda()

    def absent(flags: int) -> Any:
        raise RuntimeError("libcuda.so.1 not found")

    missing.cuInit = absent  # type: ignore[attr-defined]
    monkeypatch.setattr(device_memory, "require", lambda name: missing)
    with pytest.raises(EngineError, match="the CUDA driver cannot be opened .libcuda.so.1 not found.; install NVIDIA's driver"):
        CudaDevice()


@pytest.mark.parametrize(
    "refused, what",
    [
        ({"cuInit": 35}, "to start .out of memory, error 35.; bilevel doctor tells"),
        ({"cuStreamCreate": 35}, "a stream .out of memory, error 35.; bilevel doctor tells"),
        ({"cuMemAlloc": 2}, "3 MiB of memory .out of memory, error 2.; use a smaller capacity, batch or chunk"),
        ({"cuStreamSynchronize": 700}, "to wait .out of memory, error 700.; bilevel doctor"),
        ({"cuGraphInstantiate": 1}, "the captured graph"),
    ],
)
def test_refusals_are_sentences(refused: dict[str, int], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=f"CUDA refused {what}"):
        device, _ = make(monkeypatch, **refused)
        device.allocate(3 * 2**20)
        device.synchronize()
        device.capture(lambda: None)
