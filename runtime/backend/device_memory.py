"""A GPU's memory, streams and graphs for the runtime, through NVIDIA's ``cuda.bindings`` (extra ``gpu``).

``CudaDevice`` is all that the runtime knows of CUDA. Addresses and handles are numbers, as TensorRT takes them.

Only the driver is called: it is the one that the machine has. The CUDA runtime inside ``cuda.bindings`` is linked to it and may
be newer than the driver, which answers every call with error 35 then (as on JetPack 6.2, whose driver is for CUDA 12.6).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from bilevel.errors import EngineError, require
from bilevel.runtime.backend.dlpack import CUDA


class Memory:
    """Memory on the GPU, freed with the object. address: of its first byte, a multiple of 256."""

    def __init__(self, device: CudaDevice, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._device = device
        self.address = device.allocate_raw(num_bytes)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._device.free_raw(self.address)


class Graph:
    """What was captured: a call enqueues it again. Goes with the object."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device, self._executable = device, executable

    def __call__(self) -> None:
        self._device.launch(self._executable)

    def __del__(self) -> None:
        self._device.drop(self._executable)


class CudaDevice:
    """The current GPU and one stream of it, on which everything here is enqueued. Raises EngineError where a call fails.

    Its context is the calling thread's, else the first GPU's primary one, which TensorRT and PyTorch use too; every thread that
    comes here gets it.
    """

    def __init__(self) -> None:
        self._cuda: Any = require("cuda.bindings.driver")
        self._threads = threading.local()
        self._threads.is_bound = True  # until there is a context to bind
        try:
            self._call("to start", self._cuda.cuInit, 0)
        except RuntimeError as error:  # of cuda.bindings, where there is no driver at all
            raise EngineError(f"the CUDA driver cannot be opened ({error}); install NVIDIA's driver to use a GPU") from None
        self._context: Any = self._call("its context", self._cuda.cuCtxGetCurrent)
        if not int(self._context or 0):
            device = self._call("the first GPU", self._cuda.cuDeviceGet, 0)
            self._context = self._call("a context", self._cuda.cuDevicePrimaryCtxRetain, device)
        self._threads.is_bound = False
        self.stream: int = int(
            self._call("a stream", self._cuda.cuStreamCreate, self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        )

    def _bind(self) -> None:
        """Make the context this thread's, once: the driver, unlike the CUDA runtime, does not do so by itself."""
        if not getattr(self._threads, "is_bound", False):
            self._threads.is_bound = True
            self._call("the context", self._cuda.cuCtxSetCurrent, self._context)

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function of CUDA, or EngineError with CUDA's own words."""
        self._bind()
        status, *results = function(*arguments)
        if int(status) != 0:
            _, text = self._cuda.cuGetErrorString(status)
            remedy = (
                "use a smaller capacity, batch or chunk, or close what else uses the GPU"
                if int(status) == int(self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
                else "bilevel doctor tells what this machine can run"
            )
            words = text.decode() if isinstance(text, bytes) else text
            raise EngineError(f"CUDA refused {what} ({words}, error {int(status)}); {remedy}")
        return results[0] if results else None

    def allocate_raw(self, num_bytes: int) -> int:
        """The address of new memory; ``Memory`` frees it."""
        return int(self._call(f"{num_bytes / 2**20:.0f} MiB of memory", self._cuda.cuMemAlloc, max(1, num_bytes)))

    def free_raw(self, address: int) -> None:
        """Give memory back. CUDA waits for what uses it."""
        self._bind()
        self._cuda.cuMemFree(address)

    def allocate(self, num_bytes: int, *, zeroed: bool = False) -> Memory:
        """Memory; zeroed: filled with zero bytes."""
        memory = Memory(self, num_bytes)
        if zeroed:
            self.clear(memory.address, num_bytes)
        return memory

    def clear(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""
        if num_bytes:
            self._call("to clear memory", self._cuda.cuMemsetD8Async, address, 0, num_bytes, self.stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array, which must be contiguous, to an address; it may be changed when the call has returned."""
        if array.nbytes:
            self._call("a copy", self._cuda.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Fill an array, which must be contiguous, from an address; it may be read after ``synchronize``."""
        if array.nbytes:
            self._call("a copy", self._cuda.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, self.stream)

    def copy_strips(self, target: int, source: int, width: int, pitch: int, count: int, source_pitch: int = 0) -> None:
        """Copy ``count`` strips of ``width`` bytes from one address to another, where they lie ``pitch`` bytes apart.

        source_pitch: the distance at the source, 0 where it is the same.
        """
        copy = self._cuda.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = source, source_pitch or pitch
        copy.dstDevice, copy.dstPitch = target, pitch
        copy.WidthInBytes, copy.Height = width, count
        self._call("a copy", self._cuda.cuMemcpy2DAsync, copy, self.stream)

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """This GPU in DLPack's numbers."""
        return CUDA, int(self._call("the GPU's number", self._cuda.cuCtxGetDevice))

    def order(self, stream: int) -> None:
        """Have another stream wait for everything enqueued here so far."""
        event = self._call("an event", self._cuda.cuEventCreate, self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            self._call("to record an event", self._cuda.cuEventRecord, event, self.stream)
            self._call("to wait for an event", self._cuda.cuStreamWaitEvent, stream, event, 0)
        finally:
            self._cuda.cuEventDestroy(event)

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        self._call("to wait", self._cuda.cuStreamSynchronize, self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What ``enqueue`` enqueues, as a graph: a function that enqueues it again with one call. Raises EngineError."""
        cuda = self._cuda
        relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("to capture", cuda.cuStreamBeginCapture, self.stream, relaxed)
        try:
            enqueue()
        finally:
            status, graph = cuda.cuStreamEndCapture(self.stream)
        self._call("the captured graph", lambda: (status,))
        try:
            return Graph(self, self._call("the captured graph", cuda.cuGraphInstantiate, graph, 0))
        finally:
            cuda.cuGraphDestroy(graph)

    def launch(self, executable: Any) -> None:
        """Enqueue a captured graph."""
        self._call("a graph", self._cuda.cuGraphLaunch, executable, self.stream)

    def drop(self, executable: Any) -> None:
        """Give a captured graph back."""
        self._bind()
        self._cuda.cuGraphExecDestroy(executable)

    def free_bytes(self) -> int:
        """Memory of the GPU that is free."""
        return int(self._call("to count memory", lambda: self._cuda.cuMemGetInfo()[:2]))
