"""A double of TensorRT and of a GPU: plans execute in ONNX Runtime on host memory, and TensorRT's rules are enforced.

Work is done when the stream is synchronised, not before: whoever reads earlier reads poison. Every tensor needs an address,
shapes lie inside the profile, a cache's input and output share one address, a capture follows a run with the same shapes, and
nothing is captured while weights stream. An update that goes beyond the end of a cache is dropped as a whole.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bilevel.bundle.format import Bundle, read_manifest
from bilevel.errors import EngineError
from bilevel.export.engine.cache_writes import choose_writer, write_in_place
from bilevel.export.engine.versions import Flavour
from bilevel.runtime.backend.device_memory import Memory

VERSION = "11.4.0"
_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(float16)": np.float16}
_POISON = 0xEE


class FakeDevice:
    """``CudaDevice`` on host memory. limit: bytes that may be allocated at once."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.stream, self.limit, self.used, self.name = 7, limit, 0, "RTX 5090"
        self.blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.pending: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.num_graph_launches = 0
        self.dlpack_device = (2, 0)  # it calls the host's memory a GPU's
        self.ordered: list[int] = []  # streams that were made to wait
        self.num_downloads, self.num_downloaded = 0, 0  # copies to the host, and their bytes

    def allocate_raw(self, num_bytes: int) -> int:
        if self.used + num_bytes > self.limit:
            raise EngineError("CUDA refused memory (out of memory); use a smaller capacity, batch or chunk")
        self.used += num_bytes
        block = ctypes.create_string_buffer(bytes([_POISON]) * max(1, num_bytes), max(1, num_bytes))
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free_raw(self, address: int) -> None:
        self.synchronize()
        self.used -= len(self.blocks.pop(address))

    def allocate(self, num_bytes: int, *, zeroed: bool = False) -> Memory:
        memory = Memory(self, num_bytes)  # type: ignore[arg-type]
        if zeroed:
            self.clear(memory.address, num_bytes)
        return memory

    def free_bytes(self) -> int:
        return self.limit - self.used

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.pending if self.captured is None else self.captured).append(work)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        data = array.tobytes()
        target = self.array(address, (len(data),), np.uint8)
        self.enqueue(lambda: np.copyto(target, np.frombuffer(data, np.uint8)))

    def download(self, array: NDArray[Any], address: int) -> None:
        assert array.flags.c_contiguous
        array.view(np.uint8)[...] = _POISON  # until the stream is synchronised
        self.num_downloads, self.num_downloaded = self.num_downloads + 1, self.num_downloaded + array.nbytes
        source = self.array(address, (array.nbytes,), np.uint8)
        self.enqueue(lambda: np.copyto(array.view(np.uint8).reshape(-1), source))

    def clear(self, address: int, num_bytes: int) -> None:
        target = self.array(address, (num_bytes,), np.uint8)
        self.enqueue(lambda: target.fill(0))

    def copy_strips(self, target: int, source: int, width: int, pitch: int, count: int, source_pitch: int = 0) -> None:
        def copy() -> None:
            for n in range(count):
                ctypes.memmove(target + n * pitch, source + n * (source_pitch or pitch), width)

        self.enqueue(copy)

    def order(self, stream: int) -> None:
        self.ordered.append(stream)
        self.synchronize()

    def synchronize(self) -> None:
        work, self.pending = self.pending, []
        for each in work:
            each()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.captured = []
        try:
            enqueue()
        finally:
            work, self.captured = self.captured, None

        def launch() -> None:
            self.num_graph_launches += 1
            self.pending.extend(work)

        return launch

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """The memory at an address; it must hold the shape."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start = max(first for first in self.blocks if first <= address)
        left = start + len(self.blocks[start]) - address
        assert size <= left, f"{size} bytes do not fit into the {left} at this address"
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.profile, self.runs = engine, -1, 0
        self.memory = (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self.engine.device.stream
        self.profile = profile
        return profile < len(self.engine.plan["new_tokens"])

    def set_device_memory(self, address: int, num_bytes: int) -> None:
        assert self.profile >= 0, "how much memory it takes depends on the profile"
        self.memory = address, num_bytes

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile >= 0, "an optimisation profile comes first"
        self.shapes[name], self.runs = tuple(shape), 0
        if name == "input_ids":
            fewest, most = self.engine.plan["new_tokens"][self.profile]
            if not fewest <= shape[1] <= most:
                return self.engine.fail(f"the shape {shape} of input_ids is outside the profile")
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == self.engine.device.stream and self.engine.plan["backend"] == "tensorrt-rtx"
        return self.engine.is_capturable

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        assert stream == engine.device.stream and set(self.shapes) == set(engine.inputs)
        address, size = self.memory
        if size < (needed := engine.get_device_memory_size_for_profile_v2(self.profile)):
            return engine.fail(f"the context has {size} bytes of working memory and needs {needed}")
        engine.device.enqueue(lambda: engine.device.array(address, (needed,), np.uint8).fill(_POISON))
        if missing := set(engine.names) - set(self.addresses):
            return engine.fail(f"the tensor {min(missing)} has no address")
        for name in engine.inputs:
            written = name.replace("past.", "present.")
            if written != name and written in engine.names and self.addresses[name] != self.addresses[written]:
                return engine.fail(f"the cache {name} has two addresses")
        if engine.device.captured is not None and self.runs == 0:
            return engine.fail("a capture before the first run with these shapes")
        if engine.device.captured is not None and not engine.is_capturable:
            return engine.fail("a capture of a context that says it cannot be captured")
        if engine.device.captured is not None and engine.budget < engine.streamable_weights_size:
            return engine.fail("a capture while weights are streamed, for which enqueueV3 waits")
        self.runs += 1
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        engine.device.enqueue(lambda: engine.execute(shapes, addresses))
        return True


class FakeRuntimeConfig:
    """TensorRT-RTX's. What a context compiles is the name of its configuration's strategy."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.strategy, self.dynamic_shapes_kernel_specialization_strategy = device, -1, "LAZY"
        self.cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self.device.name)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    """What was compiled, on one kind of GPU."""

    def __init__(self, gpu: str) -> None:
        self.gpu, self.compiled = gpu, set[str]()

    def deserialize(self, data: bytes) -> bool:
        try:
            gpu, compiled = json.loads(data)
        except ValueError:
            return False
        self.compiled = set(compiled) if gpu == self.gpu else set()
        return bool(gpu == self.gpu)

    def serialize(self) -> bytes:
        return json.dumps([self.gpu, sorted(self.compiled)]).encode()


class _Engine:
    def __init__(self, plan: dict[str, Any], trt: FakeTensorrt, fail: Callable[[str], bool]) -> None:
        self.plan, self.device, self.fail, self.has_memory = plan, trt._device, fail, trt.has_memory
        self.is_capturable = trt.is_capturable
        self.session = ort.InferenceSession(plan["graph"], providers=["CPUExecutionProvider"])
        self.inputs = {port.name: _TYPES[port.type] for port in self.session.get_inputs()}
        # A builder leaves out what the head reads (``export/engine/build.py``).
        ports = [port for port in self.session.get_outputs() if not port.name.startswith("hidden.")]
        self.outputs = {port.name: _TYPES[port.type] for port in ports}
        self.has_context, self.budget = False, 0
        self.streamable_weights_size = 1 << 20 if plan["streams"] else 0
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(plan["new_tokens"])

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self.device)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        ports = [*self.session.get_inputs(), *self.session.get_outputs()]
        return [size if isinstance(size, int) else -1 for port in ports if port.name == name for size in port.shape]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 100 * self.plan["new_tokens"][profile][1]

    def create_execution_context(self, strategy: Any) -> _Context | None:
        if isinstance(strategy, FakeRuntimeConfig):
            assert strategy.cache is not None
            strategy.cache.compiled |= {str(strategy.dynamic_shapes_kernel_specialization_strategy)}
            strategy = strategy.strategy
        assert strategy == 2, "each context would take working memory of its own"
        self.has_context = True
        return _Context(self) if self.has_memory or self.fail("out of memory") else None

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert not self.has_context, "a context has fixed the budget"
        assert 0 <= budget <= self.streamable_weights_size
        self.budget = budget

    def execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {n: self.device.array(addresses[n], shapes[n], kind).copy() for n, kind in self.inputs.items()}
        for (name, kind), value in zip(self.outputs.items(), self.session.run([*self.outputs], feeds), strict=True):
            self.device.array(addresses[name], value.shape, kind)[...] = value


class _Registry:
    """TensorRT's: one of the process and one of each Runtime. Each takes a library once, whose plugins it has afterwards."""

    def __init__(self, trt: FakeTensorrt) -> None:
        self.trt, self.libraries = trt, list[str]()

    def load_library(self, path: str) -> object | None:
        if path in self.libraries or not Path(path).is_file() or self.trt.refuses_libraries:
            return None
        self.libraries.append(path)
        self.trt.libraries.append(path)
        return object()


class FakeTensorrt:
    """What the runtime uses of the module ``tensorrt``."""

    def __init__(self, device: FakeDevice, version: str = VERSION) -> None:
        self.__version__ = version
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
        self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
        self.libraries: list[str] = []  # of every registry, in the order in which they were loaded
        self._registry = _Registry(self)
        self.refuses_libraries, self.has_memory, self.is_capturable = False, True, True
        self._device = device

        class ILogger:
            ERROR = 1

        self.ILogger = ILogger

    def get_plugin_registry(self) -> _Registry:
        return self._registry

    def Runtime(self, logger: Any) -> Any:
        def fail(reason: str) -> bool:
            logger.log(self.ILogger.ERROR, reason)
            return False

        def deserialize(plan: bytes) -> _Engine | None:
            try:
                content = json.loads(plan)
                if content["plugins"] and not (registry.libraries or self._registry.libraries):
                    fail("Cannot find plugin: RoutedAttention, version: 1, namespace: bilevel")
                    return None
                return _Engine(content, self, fail)
            except ValueError:
                fail("the plan's magic tag does not match")
                return None

        registry = _Registry(self)
        return SimpleNamespace(deserialize_cuda_engine=deserialize, get_plugin_registry=lambda: registry)


def _rank_logits(graph: Path, count: int) -> Path:
    """A copy of a graph with the outputs of ``export/engine/sampling.py``, beside it: its weights lie there."""
    model = onnx.load(str(graph), load_external_data=False)
    model.graph.initializer.append(numpy_helper.from_array(np.array([count]), "best.count"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "best.axis"))
    model.graph.node.extend(
        [
            helper.make_node("TopK", ["logits", "best.count"], ["top_logits", "best.ids"], axis=1),
            helper.make_node("Cast", ["best.ids"], ["top_ids"], to=TensorProto.INT32),
            helper.make_node("ReduceLogSumExp", ["logits", "best.axis"], ["log_sum"], keepdims=0),
        ]
    )
    for name, kind, shape in (
        ("top_logits", TensorProto.FLOAT, ("batch", count)),
        ("top_ids", TensorProto.INT32, ("batch", count)),
        ("log_sum", TensorProto.FLOAT, ("batch",)),
    ):
        model.graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    path = graph.with_suffix(".ranked.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def drop_whole_updates(model: onnx.ModelProto) -> None:
    """Let every TensorScatter do what TensorRT's layer does: a row whose update goes beyond the cache's end is not written.

    ONNX Runtime's refuses such a call, or writes beyond the end.
    """
    graph = model.graph
    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "TensorScatter":
            continue
        past, update, start = node.input
        name = f"{node.output[0]}.guarded"
        at = {part: f"{name}.{part}" for part in ("room", "count", "last", "first", "written", "fits", "rows", "axes")}
        graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3]), at["axes"]))
        guarded = [
            helper.make_node("Shape", [past], [at["room"]], start=2, end=3),
            helper.make_node("Shape", [update], [at["count"]], start=2, end=3),
            helper.make_node("Sub", [at["room"], at["count"]], [at["last"]]),
            helper.make_node("Min", [start, at["last"]], [at["first"]]),
            helper.make_node("TensorScatter", [past, update, at["first"]], [at["written"]], axis=-2, mode="linear"),
            helper.make_node("LessOrEqual", [start, at["last"]], [at["fits"]]),
            helper.make_node("Unsqueeze", [at["fits"], at["axes"]], [at["rows"]]),
            helper.make_node("Where", [at["rows"], at["written"], past], [node.output[0]]),
        ]
        del graph.node[position]
        for each in reversed(guarded):
            graph.node.insert(position, each)


def _write_in_place(bundle: Bundle, capacity: int, backend: str) -> Path:
    """The graph as TensorRT would be given it, beside it, for an engine without plugins."""
    graph = bundle.graph_path
    model = onnx.load(str(graph), load_external_data=False)
    sizes = {"capacity": capacity, "num_blocks": capacity // bundle.block_size}
    flavour = Flavour(backend, None, (11, 4))
    write_in_place(model, bundle.graph.state, sizes, lambda write: choose_writer(flavour, write, with_plugins=False))
    drop_whole_updates(model)
    path = graph.with_suffix(f".{capacity}.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def write_engine(bundle: Path, name: str = "fake", num_best: int = 0, as_built: bool = False, **changes: Any) -> Path:
    """An engine that the double runs: the bundle's own graph. Returns its manifest.

    as_built: caches are written as engines write them. num_best: it ranks that many logits.
    """
    from hashlib import sha256

    manifest = json.loads((bundle / "bundle.json").read_text())
    new_tokens = changes.get("new_tokens", [[1, manifest["limits"]["prefill_chunk"]], [1, 1]])
    graph = bundle / manifest["graph"]["file"]
    capacity = changes.get("capacity", 16 * manifest["block_size"])
    backend = changes.get("backend", "tensorrt")
    graph = _write_in_place(read_manifest(bundle), capacity, backend) if as_built else graph
    graph = _rank_logits(graph, num_best) if num_best else graph
    facts = {"streams": changes.get("weight_streaming", False), "backend": backend}
    facts["plugins"] = bool(changes.get("plugins"))
    plan = json.dumps({"graph": str(graph), "new_tokens": new_tokens, **facts}).encode()
    folder = bundle / "engines"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.plan").write_bytes(plan)
    content = {
        "format": "bilevel-engine",
        "format_version": 1,
        "created_by": {"bilevel": "0.1.0"},
        "backend": "tensorrt",
        "version": VERSION,
        "platform": None,
        "architectures": [87],
        "precision": manifest["precision"],
        "capacity": capacity,
        "batch": [1, 4],
        "new_tokens": new_tokens,
        "plugins": None,
        "weight_streaming": False,
        "graph_sha256": manifest["files"][manifest["graph"]["file"]]["sha256"],
        "memory_bytes": {"weights": 1000, "activations": 1000, "caches": 1000},
        "plan": {"file": f"{name}.plan", "sha256": sha256(plan).hexdigest(), "bytes": len(plan)},
    }
    (folder / f"{name}.json").write_text(json.dumps({**content, **changes}))
    return folder / f"{name}.json"
