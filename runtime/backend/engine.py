"""An engine of TensorRT or TensorRT-RTX as a session: what ``runtime/backend/session.py`` asks of a backend, on a GPU.

Caches live in the GPU's memory (``device_caches``), so nothing but tokens and what is read of the logits crosses the bus. A
call of one token per row is captured into a CUDA graph the second time and launched as one then, where TensorRT lets it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.bundle.engines import BACKENDS, Engine
from bilevel.bundle.format import Bundle
from bilevel.bundle.manifest import CALL_INPUTS
from bilevel.bundle.tensors import TensorSpec
from bilevel.errors import EngineError, RequestError
from bilevel.runtime.backend.compiled import CompiledKernels, cache_file
from bilevel.runtime.backend.device_caches import DeviceCaches
from bilevel.runtime.backend.device_layout import RowMemory
from bilevel.runtime.backend.device_memory import CudaDevice, Memory
from bilevel.runtime.backend.device_results import BEST
from bilevel.runtime.backend.session import SessionLimits

_LOG = logging.getLogger("bilevel.engine")
_RESERVE = 256 * 2**20  # bytes of the GPU's memory that stay free for what TensorRT takes as it runs


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

    library: the kernel library whose plugins the plan uses, None for a plan without. Raises EngineError for a plan that is
    damaged or does not run here.
    """

    def __init__(self, bundle: Bundle, engine: Engine, library: Path | None, gpu: CudaDevice | None = None) -> None:
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
        self.gpu = CudaDevice() if gpu is None else gpu
        self._runtime = self._trt.Runtime(self._logger)
        # The runtime's own registry: the process's takes a library once, and refuses it to every further session.
        if library is not None and not self._runtime.get_plugin_registry().load_library(str(library)):
            raise EngineError(
                f"TensorRT cannot load the plugins of {library} ({self._reason()}); build it anew: bilevel kernels build"
            )
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{engine.path.name} does not load ({self._reason()}); {engine.remedy}")
        self._working: Memory | None = None
        self._compiled: CompiledKernels | None = None
        self._may_capture = True
        self._check_ports()
        if engine.weight_streaming:
            self._place_weights()

    @property
    def backend(self) -> str:
        """See ``Session.backend``."""
        return self.engine.backend

    @property
    def device(self) -> str:
        """See ``Session.device``."""
        return f"cuda:{self.gpu.dlpack_device[1]}"

    @property
    def limits(self) -> SessionLimits:
        """See ``Session.limits``: what the engine was built for."""
        fewest, most = self.engine.batch
        return SessionLimits(
            _reach(self.engine.new_tokens),
            fewest,
            most,
            self.engine.capacity,
            self.gpu.free_bytes(),
            f"the engine {self.engine.name}",
            self.engine.remedy,
        )

    def _place_weights(self) -> None:
        """Put as many weights on the GPU as find room beside caches and activations; the others stay with the host."""
        room = max(0, self.gpu.free_bytes() - self.engine.device_bytes - _RESERVE)
        # Before the first context: it fixes the budget.
        streamable = self._engine.streamable_weights_size
        self._engine.weight_streaming_budget_v2 = min(streamable, room)
        # With weights that come from the host, enqueueV3 waits for the GPU, which no capture may ("not graph capturable").
        self._may_capture = room >= streamable

    def _reason(self) -> str:
        """What went wrong last, in TensorRT's words."""
        return self._errors[-1].strip().splitlines()[0] if self._errors else "TensorRT gave no reason"

    def _check_ports(self) -> None:
        """The plan's inputs and outputs are those of the graph. Outputs that only hold routes may be missing, and caches of
        token ids, which it then only reads (``export/engine/cache_writes.py``)."""
        self.tensors = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        present = {name for _, name in self.bundle.graph.state}
        tokens = {name: spec for spec, name in self.bundle.graph.state if spec.dtype == CALL_INPUTS["input_ids"]}
        self.only_read = tuple(spec for name, spec in tokens.items() if name not in self.tensors)
        expected = {spec.name for spec in self.bundle.graph.inputs} | present - tokens.keys() | {"logits"}
        if missing := expected - self.tensors:
            raise EngineError(f"{self.engine.path.name} has no tensor {min(missing)}; {self.engine.remedy}")
        results = [spec for spec in self.bundle.graph.outputs if spec.name in self.tensors - present]
        self.results = (*results, *(self._best_outputs() if self.tensors >= set(BEST) else ()))
        if unknown := self.tensors - expected - tokens.keys() - {spec.name for spec in self.results}:
            raise EngineError(f"{self.engine.path.name} has a tensor {min(unknown)} that the graph lacks; {self.engine.remedy}")
        self.longest = max(most for _, most in self.engine.new_tokens)

    def _best_outputs(self) -> list[TensorSpec]:
        """The outputs of an engine that ranks its logits: it says how many it gives."""
        values, ids, log_sum = BEST
        count = tuple(self._engine.get_tensor_shape(values))[1]
        return [
            TensorSpec(values, "float32", ("batch", count)),
            TensorSpec(ids, "int32", ("batch", count)),
            TensorSpec(log_sum, "float32", ("batch",)),
        ]

    def allocate(self, batch: int, capacity: int) -> EngineCaches:
        """See ``Session.allocate``: caches of the engine's own capacity, which must be at least ``capacity``."""
        fewest, most = self.engine.batch
        if not fewest <= batch <= most:
            raise RequestError(
                f"batch={batch} is outside what the engine was built for ({fewest} to {most}); "
                f"{self.engine.remedy} --batch {batch}"
            )
        if not 1 <= capacity <= self.engine.capacity:
            raise RequestError(
                f"capacity={capacity} is more than the engine was built for ({self.engine.capacity}); shorten the prompt, or "
                f"{self.engine.remedy} --capacity {capacity}"
            )
        return EngineCaches(self, batch, RowMemory.allocate(self, batch, self.engine.capacity))

    def _context_config(self, profile: int) -> Any:
        """How a context is made: without working memory of its own, in TensorRT-RTX with the kernels compiled before."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.engine.backend != "tensorrt-rtx":
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if self.engine.new_tokens[profile] == (1, 1):
            # The capture of a single token fixes its kernels: the final ones, not those that run until these are compiled.
            config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._compiled is None:
            self._compiled = CompiledKernels(config, cache_file(self.engine))
        self._compiled.serve(config)
        return config

    def keep_compiled(self) -> None:
        """Keep what TensorRT-RTX has compiled for new shapes."""
        if self._compiled is not None:
            self._compiled.keep()

    def context(self, profile: int) -> Any:
        """A new execution context on an optimisation profile. Contexts run one after another, in the same working memory."""
        if self._working is None:
            sizes = map(self._engine.get_device_memory_size_for_profile_v2, range(self._engine.num_optimization_profiles))
            self._working = self.gpu.allocate(max(sizes))
        context = self._engine.create_execution_context(self._context_config(profile))
        if context is None or not context.set_optimization_profile_async(profile, self.gpu.stream):
            raise EngineError(
                f"the engine gets no memory to run ({self._reason()}); use a smaller batch, or {self.engine.remedy}"
            )
        context.set_device_memory(self._working.address, self._working.num_bytes)
        self.gpu.synchronize()
        return context

    def capture(self, context: Any, execute: Callable[[], None]) -> Callable[[], None] | None:
        """``execute`` as a CUDA graph; None where weights stream, or where a capture was refused: it runs call by call then.

        The first refusal is logged and is the last: the others would be refused like it.
        """
        if not self._may_capture:
            return None
        try:
            # TensorRT-RTX says beforehand that it would have to allocate, or to compile, while it runs.
            if self.engine.backend == "tensorrt-rtx" and not context.is_stream_capturable(self.gpu.stream):
                raise EngineError(f"TensorRT-RTX would not be captured ({self._reason()}); {self.engine.remedy}")
            return self.gpu.capture(execute)
        except EngineError as error:
            self._may_capture = False
            _LOG.warning("decode runs without a CUDA graph, which is slower but right: %s", error)
            return None

    def failure(self, what: str) -> EngineError:
        """What went wrong while running."""
        return EngineError(f"the engine {what} ({self._reason()}); bilevel doctor tells what this machine can run")


def _reach(lengths: Iterable[tuple[int, int]]) -> int:
    """The longest call such that every shorter one lies in one of these ranges too; 0 where 1 lies in none."""
    reach = 0
    for fewest, most in sorted(lengths):
        if fewest <= reach + 1:
            reach = max(reach, most)
    return reach


class EngineCaches(DeviceCaches):
    """See ``DeviceCaches``: one execution context for every optimisation profile, and decode as a CUDA graph."""

    def __init__(self, session: EngineSession, batch: int, memory: RowMemory) -> None:
        super().__init__(session, batch, session.engine.capacity, memory)
        self._engine_session = session
        self._contexts: dict[int, Any] = {}
        self._lengths: dict[int, int] = {}
        self._graphs: dict[int, Callable[[], None]] = {}
        self._calls: dict[int, int] = {}

    def rows(self, first: int, count: int) -> EngineCaches:
        """See ``Caches.rows``. Raises RequestError where a row of a cache does not begin where TensorRT reads."""
        return EngineCaches(self._engine_session, count, self._memory_from(first))

    def _prepare(self, length: int) -> None:
        self._context(self._profile(length), length)

    def _profile(self, length: int) -> int:
        """The optimisation profile for calls of ``length`` tokens a row: the narrowest that allows it."""
        ranges = self._engine_session.engine.new_tokens
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
            self._contexts[profile] = self._engine_session.context(profile)
        context = self._contexts[profile]
        if self._lengths.get(profile) == length:
            return context
        sizes = {**self._engine_session.bundle.sizes(self.batch, self.capacity), "new_tokens": length}
        for spec in self._engine_session.bundle.graph.inputs:
            if not context.set_input_shape(spec.name, spec.resolve(sizes)):
                raise self._engine_session.failure(f"refuses the shape {spec.resolve(sizes)} for {spec.name}")
        addresses = self.addresses(length)
        for name in sorted(self._engine_session.tensors):
            if not context.set_tensor_address(name, addresses[name]):
                raise self._engine_session.failure(f"has no tensor {name}")
        self._lengths[profile], self._calls[profile] = length, 0
        self._graphs.pop(profile, None)
        return context

    def _execute(self, length: int) -> None:
        """Run the engine. TensorRT must have run once with these shapes before it may be captured."""
        profile = self._profile(length)
        context = self._contexts[profile]

        def execute() -> None:
            if not context.execute_async_v3(self._gpu.stream):
                raise self._engine_session.failure("was not run")

        self._calls[profile] += 1
        if length == 1 and self._calls[profile] == 2:
            if graph := self._engine_session.capture(context, execute):
                self._graphs[profile] = graph
            self._engine_session.keep_compiled()
        self._graphs.get(profile, execute)()
