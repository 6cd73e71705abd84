"""What a benchmark measures and what it finds: the plan, and the numbers of one context length."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bilevel.bundle.cache_rows import CacheRows
from bilevel.bundle.format import Bundle
from bilevel.bundle.tensors import DTYPES
from bilevel.errors import RequestError
from bilevel.machine import available_memory
from bilevel.runtime.bench.roofline import FLOAT_BYTES

DEFAULT_CONTEXTS = (2048, 8192, 32768, 131072)
BURST, UNCOUNTED = 8, 2  # steps of one turn that count, and steps before them that do not
CHECKED = 4  # tokens whose logits are compared on filled caches
ROUTED, DENSE = "routed", "dense"


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high), len(values))


@dataclass
class SideResult:
    """One side at one context length. Times in seconds; None or empty: not measured.

    outside_engine: share of a decoded token's time outside ONNX Runtime's run call. parts: median seconds of a decoded token by
    part, of a profiled run, whose sum is above decode's median because recording costs time. roofline: the least times.
    """

    decode: Spread
    outside_engine: float
    peak_bytes: int
    state_bytes: int
    attended: float
    prefill: Spread | None = None
    decode_roofline: float | None = None
    prefill_roofline: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    cpu_library: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of decode, at the median."""
        return 1 / self.decode.median


@dataclass
class Case:
    """One context length.

    checks: relative errors of what was verified before timing; judged_by_check: some exceed the limit, and bilevel check passed
    the same graph. busy: share of the machine's cores that other processes kept
    busy just before (None where the system does not say).
    """

    context: int
    sides: dict[str, SideResult]
    checks: dict[str, float]
    busy: float | None = None
    judged_by_check: bool = False

    def ratio(self, name: str) -> float | None:
        """How many times the routed side is faster ("decode", "prefill"), or smaller ("peak_bytes"), than the dense twin."""
        if DENSE not in self.sides:
            return None
        values = [getattr(self.sides[side], name) for side in (DENSE, ROUTED)]
        if None in values:
            return None
        dense, routed = (value.median if isinstance(value, Spread) else value for value in values)
        return dense / routed


@dataclass(frozen=True)
class BenchPlan:
    """What to measure. threads: at least 1. max_prefill: longest context whose prefill is timed (0: none)."""

    bundle: Bundle
    contexts: tuple[int, ...]
    decode_steps: int = 64
    prefill_runs: int = 3
    max_prefill: int = 8192
    threads: int = 1
    has_twin: bool = True
    has_profile: bool = True
    seed: int = 0

    @property
    def rounds(self) -> int:
        """Turns that each side gets."""
        return -(-self.decode_steps // BURST)

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that are measured."""
        return (ROUTED, DENSE) if self.has_twin else (ROUTED,)

    @property
    def float_bytes(self) -> int:
        """Bytes of one float weight and of one number in the routed graph's block keys."""
        return DTYPES[self.bundle.precision].numpy.itemsize

    @property
    def cache_bytes(self) -> float:
        """Bytes of one number in the routed graph's caches of keys and values, its share of a packed row's scales included."""
        if self.bundle.caches == "fp32":
            return self.float_bytes
        width = int(self.bundle.config["head_dim"])
        return CacheRows.of(self.bundle.caches, width).num_bytes / width

    @property
    def is_checked(self) -> bool:
        """Whether the last check of this very graph that the bundle records was passed."""
        recorded = self.bundle.files[self.bundle.graph.file].sha256
        of_this = [check for check in self.bundle.checks if isinstance(check, dict) and check.get("model_sha256") == recorded]
        return bool(of_this and of_this[-1].get("passed") is True)

    @property
    def twin_cache_bytes(self) -> int:
        """Bytes of one number in the dense twin's caches: quantised bundles have a twin with int8 caches."""
        twin = self.bundle.twin
        return twin.state[0][0].itemsize if twin and twin.state else FLOAT_BYTES

    def capacity(self, context: int) -> int:
        """Tokens that the caches of one context hold, whole blocks."""
        return self.bundle.round_up(context + self.rounds * (BURST + UNCOUNTED) + CHECKED)

    @property
    def longest(self) -> int:
        """The longest context, in whole blocks, behind which there is room for every step."""
        size = self.bundle.block_size
        return (self.bundle.max_positions - self.rounds * (BURST + UNCOUNTED) - CHECKED) // size * size

    def refusal(self, context: int, available: int | None = None) -> str | None:
        """Why ``context`` cannot be measured, or None. available: bytes of memory (None: do not look)."""
        if context > self.longest:
            return f"the model's {self.bundle.max_positions} positions leave room for {self.longest} and the steps behind them"
        if available is not None and (needed := self.memory(context)) > available:
            return f"it needs about {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free"
        return None

    def memory(self, context: int) -> int:
        """About the bytes that all processes of one context hold at a time: caches, weights as the engine packs them, work."""
        bundles = [self.bundle, *([self.bundle.dense_twin()] if self.has_twin else [])]
        weights = sum(record.num_bytes for record in self.bundle.files.values())
        return sum(b.state_bytes(1, self.capacity(context)) + 2 * weights + 2**28 for b in bundles)


def busy_share(seconds: float = 0.5) -> float | None:
    """Share of all cores' time that is not idle while this process sleeps (Linux), None where the system does not say."""

    def ticks() -> tuple[int, int]:
        values = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # idle, and waiting for a disk

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total, idle = (after - before for after, before in zip(ticks(), (total, idle), strict=True))
    except OSError:
        return None
    return 1 - idle / max(total, 1)


def choose_contexts(plan: BenchPlan, asked: tuple[int, ...] | None) -> tuple[tuple[int, ...], dict[int, str]]:
    """(contexts to measure, those left out with the reason). Raises RequestError for one that was asked for and cannot be."""
    memory = available_memory()
    if asked is not None:
        for context in asked:
            if reason := plan.refusal(context, memory):
                raise RequestError(f"{context} tokens cannot be measured: {reason}; give shorter ones with --contexts")
        return asked, {}
    skipped = {context: reason for context in DEFAULT_CONTEXTS if (reason := plan.refusal(context, memory))}
    chosen = tuple(context for context in DEFAULT_CONTEXTS if context not in skipped)
    if chosen:
        return chosen, skipped
    if plan.longest < 1:
        raise RequestError(
            f"the model's {plan.bundle.max_positions} positions leave no room for the steps that are timed; "
            "lower --decode-steps"
        )
    return choose_contexts(plan, (plan.longest,))[0], skipped


def default_threads() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
