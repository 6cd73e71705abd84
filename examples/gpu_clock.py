"""Times of work on a GPU, for ``examples/gpu_bench.py``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median, least, most; note: what to know of it, or why there is none (median None)."""

    median: float | None
    low: float = 0.0
    high: float = 0.0
    runs: int = 0
    note: str = ""


class Clock:
    """Times work on one device. budget: seconds that the timed runs of one side may take; 0: one run."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.cuda = device.type == "cuda"
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 1
        self._flushed = torch.empty(max(size, 2**26) if self.cuda else 1, dtype=torch.uint8, device=device)

    def once(self, work: Callable[[], object], flush: bool) -> float:
        """Milliseconds."""
        if not self.cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        if flush:
            self._flushed.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))

    def measure(self, work: Callable[[], object], flush: bool = False) -> Timing:
        if self.budget <= 0:
            only = self.once(work, flush)
            return Timing(only, only, only, 1)
        self.once(work, flush)
        first = max(self.once(work, flush), 1e-3)
        runs = max(3, min(100, int(1e3 * self.budget / first)))
        times = [self.once(work, flush) for _ in range(runs)]
        return Timing(statistics.median(times), min(times), max(times), runs)

    def seconds(self, work: Callable[[], object]) -> float:
        """The least time of one run."""
        return self.measure(work).low / 1e3

    def captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """``work`` as a CUDA graph, so that starting it costs the host nothing."""
        if not self.cuda:
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def ratio(other: Timing, ours: Timing) -> float | None:
    return other.median / ours.median if other.median is not None and ours.median else None
