"""What building and running an engine takes, estimated before anything is built, against what this machine has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from bilevel.bundle.format import Bundle
from bilevel.bundle.tensors import DTYPES
from bilevel.errors import EngineError
from bilevel.export.engine.network import Limits
from bilevel.export.graph.operator_geometry import read_requests
from bilevel.machine import Gpu
from bilevel.plugins.launch.plans import plans_everywhere
from bilevel.plugins.tensorrt.fields import workspace_limit

# Measured with TensorRT-RTX 1.7: the process peaks at 0.45 GiB for 8 MiB of weights, at 2.3 GiB for 370 MiB.
MOST_ELEMENTS = 2**31 - 1  # of a tensor in TensorRT
_BUILD_FIXED, _BUILD_FACTOR = 512 * 2**20, 6


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


def estimate_memory(bundle: Bundle, limits: Limits, with_plugins: bool) -> Estimate:
    """What an engine of a bundle's graph takes. Raises BilevelError for a graph that no kernel covers."""
    model = onnx.load(str(bundle.graph_path), load_external_data=False).graph
    weights = sum(
        math.prod(weight.dims) * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize for weight in model.initializer
    )
    caches = bundle.state_bytes(limits.batch, limits.capacity)
    activations = _activations(bundle.config, limits, DTYPES[bundle.precision].numpy.itemsize)
    if with_plugins:
        activations += _workspace(bundle.graph_path, limits)
    return Estimate(weights, activations, caches, _BUILD_FIXED + _BUILD_FACTOR * weights)


def check_volumes(bundle: Bundle, limits: Limits) -> None:
    """Raises EngineError where a tensor of the largest call has more elements than TensorRT's tensors have."""
    sizes, config = limits.sizes(limits.batch, limits.chunk), bundle.config
    graph = bundle.graph
    volumes = {
        spec.name: math.prod(spec.resolve(sizes))
        for spec in (*graph.inputs, *graph.outputs, *(past for past, _ in graph.state))
    }
    width = max(config[name] for name in ("hidden_size", "intermediate_size"))
    volumes["a layer's activations"] = limits.batch * limits.chunk * width
    name = max(volumes, key=lambda each: volumes[each])
    if volumes[name] > MOST_ELEMENTS:
        raise EngineError(
            f"{name} would have {volumes[name]:,} elements, and TensorRT's tensors have at most {MOST_ELEMENTS:,}; "
            "lower --batch, --capacity or --prefill-chunk"
        )


def memory_problem(estimate: Estimate, available: int | None, gpu: Gpu | None) -> str:
    """Why the engine cannot be built here, or cannot run on ``gpu`` (None: it runs elsewhere); "" where it can.

    A GPU that shares the machine's memory is counted once: an engine is built, and then runs.
    """
    advice = "build on a machine with more memory, or go on with --yes"
    if available is not None and estimate.build > available:
        return f"building takes about {human(estimate.build)}, {human(available)} are free here; {advice}"
    if gpu is None:
        return ""
    room = min(gpu.memory_bytes, available) if gpu.is_integrated and available is not None else gpu.memory_bytes
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
