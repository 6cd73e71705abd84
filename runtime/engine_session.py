"""An engine of TensorRT or TensorRT-RTX as a session: what ``runtime/session.py`` asks of a backend, on a GPU.

Caches live in the GPU's memory, an input and its output at one address, so nothing but tokens and logits crosses the bus. A call of
one token per row is captured into a CUDA graph the second time and launched as one from then on.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.plugins.errors import EngineError, RequestError
from bilevel.runtime.bundle import Bundle
from bilevel.runtime.device_memory import Device, Memory
from bilevel.runtime.engines import BACKENDS, Engine
from bilevel.runtime.manifest import CALL_INPUTS
from bilevel.runtime.session import Routes
from bilevel.runtime.tensors import DTYPES, TensorSpec

_ALIGNMENT = 256  # bytes; of every address that TensorRT is given


def load_module(backend: str) -> ModuleType:
    """TensorRT's Python module of a backend. Raises EngineError where it is not installed or does not load."""
    try:
        return importlib.import_module(BACKENDS[backend])
    except (ImportError, OSError, RuntimeError) as error:
        package = (
            "tensorrt-rtx-cu13" if backend == "tensorrt-rtx" else "TensorRT (on a Jetson JetPack brings it) or tensorrt-cu13"
        )
        raise EngineError(f"the engine needs the Python module {BACKENDS[backend]} ({error}); install {package}") from None


def _logger(trt: Any, errors: list[str]) -> Any:
    """A logger for TensorRT that keeps its errors, for the exception that follows them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # TensorRT's bindings want the class named

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                errors.append(message)

    return Logger()


class EngineSession:
    """A plan, deserialised on the current GPU.

    library: the kernel library whose plugins the plan uses, None for a plan without. Raises EngineError for a plan that is damaged
    or does not run here.
    """

    def __init__(self, bundle: Bundle, engine: Engine, library: Path | None, device: Device | None = None) -> None:
        self.bundle, self.engine = bundle, engine
        self._trt: Any = load_module(engine.backend)
        self._errors: list[str] = []
        self._logger = _logger(self._trt, self._errors)
        if self._trt.__version__ != engine.version:
            raise EngineError(
                f"{engine.path.name} was built by {engine.backend} {engine.version}, installed is {self._trt.__version__}; "
                f"install {engine.version}, or {engine.remedy}"
            )
        plan = engine.read_plan()
        if library is not None and not self._trt.get_plugin_registry().load_library(str(library)):
            raise EngineError(
                f"TensorRT cannot load the plugins of {library} ({self._reason()}); build it anew: bilevel kernels build"
            )
        self.device = Device() if device is None else device
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{engine.path.name} does not load ({self._reason()}); {engine.remedy}")
        self._working: Memory | None = None
        self._check_ports()

    def _reason(self) -> str:
        """What went wrong last, in TensorRT's words."""
        return self._errors[-1].strip().splitlines()[0] if self._errors else "TensorRT gave no reason"

    def _check_ports(self) -> None:
        """The plan's inputs and outputs are those of the graph; outputs that only tell of routes may be missing."""
        self.tensors = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        expected = {spec.name for spec in self.bundle.inputs} | {present for _, present in self.bundle.state} | {"logits"}
        if missing := expected - self.tensors:
            raise EngineError(f"{self.engine.path.name} has no tensor {min(missing)}; {self.engine.remedy}")

    def allocate(self, batch: int, capacity: int) -> EngineCaches:
        """See ``Session.allocate``: caches of the engine's own capacity, which must be at least ``capacity``."""
        fewest, most = self.engine.batch
        if not fewest <= batch <= most:
            raise RequestError(
                f"batch={batch} is outside what the engine was built for ({fewest} to {most}); {self.engine.remedy} --batch {batch}"
            )
        if not 1 <= capacity <= self.engine.capacity:
            raise RequestError(
                f"capacity={capacity} is more than the engine was built for ({self.engine.capacity}); shorten the prompt, or "
                f"{self.engine.remedy} --capacity {capacity}"
            )
        return EngineCaches(self, batch)

    def context(self, profile: int) -> Any:
        """A new execution context on an optimisation profile. All contexts run one after another, in the same working memory."""
        if self._working is None:
            sizes = map(self._engine.get_device_memory_size_for_profile_v2, range(self._engine.num_optimization_profiles))
            self._working = self.device.allocate(max(sizes))
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(profile, self.device.stream):
            raise EngineError(
                f"the engine gets no memory to run ({self._reason()}); use a smaller batch, or {self.engine.remedy}"
            )
        context.set_device_memory(self._working.address, self._working.num_bytes)
        self.device.synchronize()
        return context

    def failure(self, what: str) -> EngineError:
        """What went wrong while running."""
        return EngineError(f"the engine {what} ({self._reason()}); bilevel doctor tells what this machine can run")


class EngineCaches:
    """See ``Caches``: rows in the GPU's memory.

    state: {name of a cache's input: its memory and the address of its first row}; None: new and zeroed. buffers: what a call reads
    and what it gives, shared by caches that are cut out of others; None: new. Routes are not fetched.
    """

    def __init__(
        self,
        session: EngineSession,
        batch: int,
        state: dict[str, tuple[Memory, int]] | None = None,
        buffers: tuple[dict[str, Memory], dict[str, Memory]] | None = None,
    ) -> None:
        self.batch, self.capacity = batch, session.engine.capacity
        self.routes: Routes | None = None
        self._session, self._device = session, session.device
        bundle, sizes = session.bundle, session.bundle.sizes(batch, self.capacity)
        if state is None:
            new = {spec.name: self._new(spec, sizes, zeroed=True) for spec, _ in bundle.state}
            state = {name: (memory, memory.address) for name, memory in new.items()}
        self._state = state
        longest = max(most for _, most in session.engine.new_tokens)
        sizes["new_tokens"] = longest
        self._logits = np.zeros((batch, bundle.vocab_size), np.float32)
        if buffers is None:
            # TensorRT wants an address for every output, those that nobody reads included.
            wanted = session.tensors - {name for _, name in bundle.state}
            call = {spec.name: self._new(spec, sizes) for spec in bundle.inputs if spec.name in CALL_INPUTS}
            buffers = call, {spec.name: self._new(spec, sizes) for spec in bundle.outputs if spec.name in wanted}
        self._call, self._results = buffers
        # An input and its output share the memory: the engine writes new tokens where the old ones lie.
        self._addresses = {name: memory.address for name, memory in {**self._call, **self._results}.items()}
        for spec, output in bundle.state:
            self._addresses[spec.name] = self._addresses[output] = state[spec.name][1]
        self._contexts: dict[int, Any] = {}
        self._lengths: dict[int, int] = {}
        self._graphs: dict[int, Callable[[], None]] = {}
        self._calls: dict[int, int] = {}

    def _new(self, spec: TensorSpec, sizes: Mapping[str, int], *, zeroed: bool = False) -> Memory:
        return self._device.allocate(math.prod(spec.resolve(sizes)) * DTYPES[spec.dtype].numpy.itemsize, zeroed=zeroed)

    def _row_bytes(self, spec: TensorSpec) -> int:
        shape = spec.resolve(self._session.bundle.sizes(1, self.capacity))
        return math.prod(shape) * DTYPES[spec.dtype].numpy.itemsize

    def rows(self, first: int, count: int) -> EngineCaches:
        """See ``Caches.rows``. Raises RequestError where a row of a cache does not begin where TensorRT reads."""
        state = {}
        for spec, _ in self._session.bundle.state:
            memory, address = self._state[spec.name]
            size = self._row_bytes(spec)
            if size % _ALIGNMENT and first:
                raise RequestError(
                    f"a row of the cache {spec.name} takes {size} bytes, TensorRT reads from multiples of {_ALIGNMENT}; build the "
                    "engine with another --capacity"
                )
            state[spec.name] = (memory, address + first * size)
        return EngineCaches(self._session, count, state, (self._call, self._results))

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """See ``Caches.copy_prefix``."""
        # A block that is not whole yet has no key that anybody reads: it is pooled anew by the call that ends it.
        bundle, sizes = self._session.bundle, self._session.bundle.sizes(1, self.capacity)
        kept = {"capacity": tokens, "num_blocks": tokens // bundle.block_size}
        for spec, _ in bundle.state:
            axis = next((n for n, size in enumerate(spec.shape) if size in kept), 0)
            shape, address, row = spec.resolve(sizes), self._state[spec.name][1], self._row_bytes(spec)
            step = math.prod(shape[axis + 1 :]) * DTYPES[spec.dtype].numpy.itemsize
            width = kept.get(str(spec.shape[axis]), 1) * step
            if width:
                places = (address + target * row, address + source * row)
                self._device.copy_strips(*places, width, shape[axis] * step, math.prod(shape[:axis]))

    def reserve(self) -> None:
        """See ``Caches.reserve``: a GPU's memory is taken when it is allocated."""

    def run(self, input_ids: NDArray[np.int64], past_len: NDArray[np.int32], new_len: NDArray[np.int32]) -> NDArray[np.float32]:
        """See ``Caches.run``. Raises RequestError when a call does not fit, EngineError when the engine fails."""
        batch, length = input_ids.shape
        if batch != self.batch or length < 1:
            raise RequestError(f"input_ids has shape {list(input_ids.shape)}, the caches hold {self.batch} rows")
        if int(past_len.max()) + length > self.capacity:
            raise RequestError(
                f"{length} new tokens do not fit behind {int(past_len.max())} in caches of {self.capacity}; give shorter prompts"
            )
        profile = self._profile(length)
        context = self._context(profile, length)
        for name, array in (("input_ids", input_ids), ("past_len", past_len), ("new_len", new_len)):
            self._device.upload(self._call[name], np.ascontiguousarray(array, DTYPES[CALL_INPUTS[name]].numpy))
        self._enqueue(profile, length, context)
        self._device.download(self._logits, self._results["logits"])
        self._device.synchronize()
        return self._logits

    def _profile(self, length: int) -> int:
        """The optimisation profile for calls of ``length`` tokens a row: the narrowest that allows it."""
        ranges = self._session.engine.new_tokens
        fitting = [index for index, (fewest, most) in enumerate(ranges) if fewest <= length <= most]
        if not fitting:
            raise RequestError(
                f"a call of {length} tokens a row is outside what the engine was built for ({ranges}); give a prefill chunk "
                f"of at most {max(most for _, most in ranges)}"
            )
        return min(fitting, key=lambda index: ranges[index][1] - ranges[index][0])

    def _context(self, profile: int, length: int) -> Any:
        """The profile's context with this call's shapes, every tensor at its address."""
        if profile not in self._contexts:
            self._contexts[profile] = self._session.context(profile)
        context = self._contexts[profile]
        if self._lengths.get(profile) == length:
            return context
        sizes = {**self._session.bundle.sizes(self.batch, self.capacity), "new_tokens": length}
        for spec in self._session.bundle.inputs:
            if not context.set_input_shape(spec.name, spec.resolve(sizes)):
                raise self._session.failure(f"refuses the shape {spec.resolve(sizes)} for {spec.name}")
        for name in sorted(self._session.tensors):
            if not context.set_tensor_address(name, self._addresses[name]):
                raise self._session.failure(f"has no tensor {name}")
        self._lengths[profile], self._calls[profile] = length, 0
        self._graphs.pop(profile, None)
        return context

    def _enqueue(self, profile: int, length: int, context: Any) -> None:
        """Run the engine. TensorRT must have run once with these shapes before it may be captured."""

        def execute() -> None:
            if not context.execute_async_v3(self._device.stream):
                raise self._session.failure("was not run")

        self._calls[profile] += 1
        if length == 1 and self._calls[profile] == 2:
            self._graphs[profile] = self._device.capture(execute)
        self._graphs.get(profile, execute)()
