"""What building and running an engine takes, estimated before anything is built, against what this machine has."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from bilevel.export.engine.network import Limits
from bilevel.export.graph.operator_geometry import read_requests
from bilevel.plugins.launch.plans import plans_everywhere
from bilevel.plugins.tensorrt.fields import workspace_limit

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int32": 4, "int64": 8}
# Measured with TensorRT-RTX 1.7: the process peaks at 0.45 GiB for 8 MiB of weights, at 2.3 GiB for 370 MiB.
_BUILD_FIXED, _BUILD_FACTOR = 512 * 2**20, 6
_MEMORY, _CAPABILITY_MAJOR, _CAPABILITY_MINOR, _INTEGRATED = "cuDeviceTotalMem_v2", 75, 76, 18  # of cuda.h


@dataclass(frozen=True)
class Estimate:
    """Bytes. weights, activations, caches: on the device while the engine runs; build: of the process that builds."""

    weights: int
    activations: int
    caches: int
    build: int

    @property
    def run(self) -> int:
        """Of the device, while the engine runs."""
        return self.weights + self.activations + self.caches


@dataclass(frozen=True)
class Gpu:
    """The GPU at hand. architecture: as in 87; is_shared: its memory is the machine's, as on a Jetson."""

    architecture: int
    memory: int
    is_shared: bool


def _activations(config: Mapping[str, Any], limits: Limits, size: int) -> int:
    """What is alive at once between two layers and inside the widest one; TensorRT fuses some of it away."""
    hidden, width = config["hidden_size"], config["head_dim"]
    attention = 3 * config["num_attention_heads"] * width + 4 * config["num_key_value_heads"] * width
    inner = 3 * config["intermediate_size"]
    tokens = limits.batch * limits.chunk
    return tokens * (3 * hidden + max(attention, inner)) * size + 4 * limits.batch * config["vocab_size"]


def _workspace(graph: Path, limits: Limits) -> int:
    """The plugins' workspace, which layers use one after the other."""
    blocks = limits.capacity // limits.block_size
    call = {"B": limits.batch, "L": limits.chunk, "U": blocks, "M": limits.capacity, "T": limits.batch * limits.chunk}
    most = 0
    for op, geometry, dtype in read_requests(graph):
        values = {**geometry, **call}
        sizes = {name: value for name, value in values.items() if name in op.symbols and isinstance(value, int)}
        plans = plans_everywhere(op, geometry, dtype).values()
        most = max([most, *(workspace_limit(each, sizes) for each in plans)])
    return most


def estimate_memory(graph: Path, manifest: Mapping[str, Any], limits: Limits, with_plugins: bool) -> Estimate:
    """What an engine of ``graph`` takes; manifest: the bundle's. Raises BilevelError for a graph that no kernel covers."""
    model = onnx.load(str(graph), load_external_data=False).graph
    weights = sum(
        math.prod(weight.dims) * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize for weight in model.initializer
    )
    sizes = limits.sizes(limits.batch, 1)
    states = {state["input"] for state in manifest["graph"]["state"]}
    caches = sum(
        math.prod(sizes.get(size, size) for size in spec["shape"]) * _BYTES[spec["dtype"]]
        for spec in manifest["graph"]["inputs"]
        if spec["name"] in states
    )
    activations = _activations(manifest["config"], limits, _BYTES[manifest["precision"]])
    if with_plugins:
        activations += _workspace(graph, limits)
    return Estimate(weights, activations, caches, _BUILD_FIXED + _BUILD_FACTOR * weights)


def available_memory() -> int | None:
    """Bytes that this machine can give to a process; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def gpu_at_hand() -> Gpu | None:
    """The first GPU, as the driver tells of it without a context; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    getattr(driver, _MEMORY)(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    architecture = 10 * attribute(_CAPABILITY_MAJOR) + attribute(_CAPABILITY_MINOR)
    return Gpu(architecture, memory.value, bool(attribute(_INTEGRATED)))


def memory_problem(estimate: Estimate, available: int | None, gpu: Gpu | None) -> str:
    """Why the engine cannot be built here, or cannot run on ``gpu`` (None: it runs elsewhere); "" where it can.

    A GPU that shares the machine's memory is counted once: an engine is built, and then runs.
    """
    advice = "build on a machine with more memory, or go on with --yes"
    if available is not None and estimate.build > available:
        return f"building takes about {human(estimate.build)}, {human(available)} are free here; {advice}"
    if gpu is None:
        return ""
    room = min(gpu.memory, available) if gpu.is_shared and available is not None else gpu.memory
    if estimate.run <= room:
        return ""
    parts = sizes_in_words(estimate)
    return (
        f"running takes about {human(estimate.run)} ({parts}), the GPU has {human(room)}; lower --capacity or --batch, or --yes"
    )


def sizes_in_words(estimate: Estimate) -> str:
    """As in "weights 8.0 MiB, activations 1.2 MiB, caches 3.1 MiB"."""
    parts: Sequence[tuple[str, int]] = (
        ("weights", estimate.weights),
        ("activations", estimate.activations),
        ("caches", estimate.caches),
    )
    return ", ".join(f"{name} {human(size)}" for name, size in parts)


def human(size: int) -> str:
    """1234567 -> "1.2 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
