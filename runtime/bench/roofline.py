"""The least time that a call can take: its bytes and operations over what this machine was measured to reach.

Counted are the weights of the matrix products (read once per call), the keys and values that are attended, the keys that the
routers score, and two operations for every multiplication. Small things (norms, indices, activations) are left out, so the
bound is a bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT_BYTES = 4
# Bytes of one quantised weight; 32 of them share a float scale and a zero point, in a matrix product of their own width, in an
# expert of a byte.
QUANTISED_BYTES = {"int8": 1 + 5 / 32, "int4": 0.5 + 4.5 / 32}
EXPERT_BYTES = {"int8": 1 + 5 / 32, "int4": 0.5 + 5 / 32}


# What is read again and again may lie in a cache, so the rate belongs to an amount: caches of servers hold small models whole.
READ_SIZES = tuple(2**power for power in (24, 26, 28, 30))


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and floating-point operations that must be done."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: flops_per_second of an fp32 matrix product, bytes_per_second of READ_SIZES bytes read anew."""

    flops_per_second: float
    bytes_per_second: tuple[float, ...]

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, number by number: what else runs on the machine can only lower one."""
        rates = tuple(map(max, self.bytes_per_second, other.bytes_per_second))
        return Ceilings(max(self.flops_per_second, other.flops_per_second), rates)

    def read_rate(self, num_bytes: float) -> float:
        """Bytes per second where ``num_bytes`` are read in every step."""
        return float(np.interp(math.log(max(num_bytes, 1)), np.log(READ_SIZES), self.bytes_per_second))

    def seconds(self, work: Work, calls: int = 1) -> float:
        """The least time for ``work`` that is spread over ``calls`` equal steps."""
        return max(work.bytes / self.read_rate(work.bytes / calls), work.flops / self.flops_per_second)


class CeilingMeter:
    """Measures the ceilings with numpy, in a process whose linear algebra has the given number of threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def measure(self, size: int = 2048) -> Ceilings:
        """Read arrays of READ_SIZES bytes, and multiply two matrices [size, size]; the best of several runs each."""
        values = np.ones(READ_SIZES[-1] // FLOAT_BYTES, np.float32)
        with ThreadPoolExecutor(self.threads) as pool:
            rates = tuple(num_bytes / self._read(pool, values[: num_bytes // FLOAT_BYTES]) for num_bytes in READ_SIZES)
        matrix = np.ones((size, size), np.float32)
        return Ceilings(2 * size**3 / _best(lambda: matrix @ matrix), rates)

    def _read(self, pool: ThreadPoolExecutor, values: NDArray[np.float32]) -> float:
        """Seconds to read ``values`` with every thread; of numpy's operations the maximum has the fastest loop."""
        slices = np.array_split(values, self.threads)
        return _best(lambda: list(pool.map(np.max, slices)))


def _best(action: Callable[[], object], runs: int = 6) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


class Geometry:
    """Counts of one model, from the ``config`` of its bundle.

    weights: "fp32" (floats), "int8" or "int4". twin_cache_bytes: bytes of one number in the dense twin's caches. float_bytes:
    of one float weight and of one number in the routed graph's block keys. cache_bytes: of one number in its keys and values
    (None: float_bytes).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: str,
        twin_cache_bytes: int = FLOAT_BYTES,
        float_bytes: int = FLOAT_BYTES,
        cache_bytes: float | None = None,
    ) -> None:
        self.cache_bytes = float_bytes if cache_bytes is None else cache_bytes
        self.config, self.twin_cache_bytes, self.float_bytes = config, twin_cache_bytes, float_bytes
        self.matrix_bytes = QUANTISED_BYTES.get(weights, float(float_bytes))
        self.expert_bytes = EXPERT_BYTES.get(weights, float(float_bytes))
        self.routing: Mapping[str, Any] = config.get("routing") or {"preset": "dense"}
        self.layers = int(config["num_hidden_layers"])
        self.query_heads, self.heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        self.width = int(config["head_dim"])
        # Of the layers: those whose words choose what they read. A block's bounds are two vectors.
        self.routed_layers = 0 if self.routing["preset"] == "dense" else self.layers - len(self.routing.get("dense_layers", ()))
        self.key_width = self.width * (2 if self.routing.get("key") == "bounds" else 1)

    @property
    def num_weights(self) -> int:
        """Weights that one token is multiplied with: projections, MLP or chosen experts, head."""
        config, hidden = self.config, int(self.config["hidden_size"])
        attention = hidden * self.width * (2 * self.query_heads + 2 * self.heads)
        mlp = 3 * hidden * int(config["intermediate_size"])
        experts = config.get("experts") or {"layers": []}
        with_experts = len(experts["layers"])
        total = self.layers * attention + (self.layers - with_experts) * mlp + hidden * int(config["vocab_size"])
        return total + self.num_expert_weights + self.num_gate_weights

    @property
    def num_expert_weights(self) -> int:
        """Those of the chosen experts."""
        experts = self.config.get("experts") or {"layers": [], "intermediate_size": 0, "top_k": 0}
        chosen = 3 * experts["intermediate_size"] * experts["top_k"]
        return len(experts["layers"]) * int(self.config["hidden_size"]) * chosen

    @property
    def num_gate_weights(self) -> int:
        """Those of the experts' gates, which stay floats in every format."""
        experts = self.config.get("experts")
        if not experts:
            return 0
        groups = experts["n_group"] if experts["group_score"] == "external" else 0
        return len(experts["layers"]) * int(self.config["hidden_size"]) * (experts["num_experts"] + groups)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights that one token is multiplied with, as they are stored."""
        experts, floats = self.num_expert_weights, self.num_gate_weights
        matrices = self.num_weights - experts - floats
        return matrices * self.matrix_bytes + experts * self.expert_bytes + floats * self.float_bytes

    def _cache_bytes(self, is_twin: bool) -> float:
        """Bytes of one number in a side's keys and values."""
        return self.twin_cache_bytes if is_twin else self.cache_bytes

    def attended(self, length: int, is_twin: bool) -> float:
        """Tokens that the last of ``length`` tokens reads, averaged over the layers."""
        if is_twin or not self.routed_layers:
            return length
        size, num_blocks = int(self.routing["block_size"]), int(self.routing["topk"])
        own = (length - 1) % size + 1
        routed = min(length, (num_blocks - 1) * size + own)
        return length + (routed - length) * self.routed_layers / self.layers

    def scored(self, length: int, is_twin: bool) -> tuple[int, int]:
        """(level 1's, a routed layer's) block keys that the last of ``length`` tokens is compared with: complete past ones."""
        if is_twin or not self.routed_layers:
            return 0, 0
        blocks = (length - 1) // int(self.routing["block_size"])
        if self.routing["preset"] != "two_level":
            return 0, blocks
        return blocks, min(blocks, int(self.routing["coarse_topk"]))

    def decode(self, context: int, is_twin: bool) -> Work:
        """One token behind ``context`` cached ones."""
        tokens, (level_1, level_2) = self.attended(context + 1, is_twin), self.scored(context + 1, is_twin)
        route_width = int(self.routing.get("route_dim") or self.config["hidden_size"])
        cached = 2 * self.layers * self.heads * self.width * tokens * self._cache_bytes(is_twin)
        keys = self.routed_layers * self.heads * self.key_width * level_2
        scored = self.float_bytes * (keys + level_1 * route_width)
        num_bytes = self.weight_bytes + cached + scored
        flops = 2 * (self.num_weights + self._products(tokens, level_2) + level_1 * route_width)
        return Work(num_bytes, flops)

    def prefill(self, length: int, chunk: int, is_twin: bool) -> Work:
        """``length`` tokens from nothing, ``chunk`` a call: every call reads the weights and the caches so far once."""
        head = int(self.config["hidden_size"]) * int(self.config["vocab_size"])  # only each call's last token needs it
        calls = math.ceil(length / chunk)
        attended = sum(self.attended(position, is_twin) for position in range(1, length + 1))
        scored = [self.scored(position, is_twin) for position in range(1, length + 1)]
        level_1, level_2 = (sum(values) for values in zip(*scored, strict=True))
        route_width = int(self.routing.get("route_dim") or self.config["hidden_size"])
        cached = sum(min((call + 1) * chunk, length) for call in range(calls)) * 2 * self.heads * self.width * self.layers
        num_bytes = calls * self.weight_bytes + cached * self._cache_bytes(is_twin)
        weights = length * (self.num_weights - head) + calls * head
        return Work(num_bytes, 2 * (weights + self._products(attended, level_2) + level_1 * route_width))

    def _products(self, tokens: float, blocks: int) -> float:
        """Multiplications of queries in all layers: with ``tokens`` keys and values, with ``blocks`` keys of blocks."""
        read = self.layers * self.width * 2 * tokens
        return self.query_heads * (read + self.routed_layers * self.key_width * blocks)
