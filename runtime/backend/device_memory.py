"""A GPU's memory, streams and graphs for the runtime, through NVIDIA's ``cuda.bindings`` (extra ``gpu``).

``CudaDevice`` is all that the runtime knows of CUDA. Addresses and handles are numbers, as TensorRT takes them.
"""

from __future__ import annotations

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


class CudaDevice:
    """The current GPU and one stream of it, on which everything here is enqueued. Raises EngineError where a call fails."""

    def __init__(self) -> None:
        self._cuda: Any = require("cuda.bindings.runtime")
        self.stream: int = int(self._call("a stream", self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking))

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function of CUDA, or EngineError with CUDA's own words."""
        status, *results = function(*arguments)
        if int(status) != 0:
            _, text = self._cuda.cudaGetErrorString(status)
            remedy = (
                "use a smaller capacity, batch or chunk, or close what else uses the GPU"
                if int(status) == int(self._cuda.cudaError_t.cudaErrorMemoryAllocation)
                else "bilevel doctor tells what this machine can run"
            )
            raise EngineError(f"CUDA refused {what} ({text.decode() if isinstance(text, bytes) else text}); {remedy}")
        return results[0] if results else None

    def allocate_raw(self, num_bytes: int) -> int:
        """The address of new memory; ``Memory`` frees it."""
        return int(self._call(f"{num_bytes / 2**20:.0f} MiB of memory", self._cuda.cudaMalloc, max(1, num_bytes)))

    def free_raw(self, address: int) -> None:
        """Give memory back. CUDA waits for what uses it."""
        self._cuda.cudaFree(address)

    def allocate(self, num_bytes: int, *, zeroed: bool = False) -> Memory:
        """Memory; zeroed: filled with zero bytes."""
        memory = Memory(self, num_bytes)
        if zeroed:
            self.clear(memory.address, num_bytes)
        return memory

    def clear(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""
        self._call("to clear memory", self._cuda.cudaMemsetAsync, address, 0, num_bytes, self.stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array, which must be contiguous, to an address; it may be changed when the call has returned."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("a copy", self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Fill an array, which must be contiguous, from an address; it may be read after ``synchronize``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("a copy", self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy_strips(self, target: int, source: int, width: int, pitch: int, count: int, source_pitch: int = 0) -> None:
        """Copy ``count`` strips of ``width`` bytes from one address to another, where they lie ``pitch`` bytes apart.

        source_pitch: the distance at the source, 0 where it is the same.
        """
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        arguments = (target, pitch, source, source_pitch or pitch, width, count, kind, self.stream)
        self._call("a copy", self._cuda.cudaMemcpy2DAsync, *arguments)

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """This GPU in DLPack's numbers."""
        return CUDA, int(self._call("the GPU's number", self._cuda.cudaGetDevice))

    def order(self, stream: int) -> None:
        """Have another stream wait for everything enqueued here so far."""
        event = self._call("an event", self._cuda.cudaEventCreateWithFlags, self._cuda.cudaEventDisableTiming)
        try:
            self._call("to record an event", self._cuda.cudaEventRecord, event, self.stream)
            self._call("to wait for an event", self._cuda.cudaStreamWaitEvent, stream, event, 0)
        finally:
            self._cuda.cudaEventDestroy(event)

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        self._call("to wait", self._cuda.cudaStreamSynchronize, self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What ``enqueue`` enqueues, as a graph: a function that enqueues it again with one call. Raises EngineError."""
        cuda = self._cuda
        relaxed = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("to capture", cuda.cudaStreamBeginCapture, self.stream, relaxed)
        try:
            enqueue()
        finally:
            status, graph = cuda.cudaStreamEndCapture(self.stream)
        self._call("the captured graph", lambda: (status,))
        executable = self._call("the captured graph", cuda.cudaGraphInstantiate, graph, 0)
        self._call("to drop a graph", cuda.cudaGraphDestroy, graph)
        return lambda: self._call("a graph", cuda.cudaGraphLaunch, executable, self.stream)

    def free_bytes(self) -> int:
        """Memory of the GPU that is free."""
        return int(self._call("to count memory", lambda: self._cuda.cudaMemGetInfo()[:2]))
