"""Speed and memory of a bundle against context length, with its dense twin beside it.

The rules of the measurement. Each side runs in a process of its own with its own caches. The two take turns in bursts, each
burst begins with steps that do not count, and the order changes from round to round; reported are medians and quartiles. Before
anything is timed, the outputs must be right, or the context is refused:
    both graphs give the same logits where the routes hold every block (prefill in chunks and decode);
    on the filled caches a chunk of tokens gives the logits that the same tokens give one by one, on both sides;
    on the filled caches the CPU library gives the logits of the graph's portable bodies.
Where weights or caches are rounded, two right executions may differ by more than any fixed limit on caches of random numbers,
whose scores are nearly equal: there the graph may instead have passed ``bilevel check``, which judges choices by their margins
on text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import BilevelError
from bilevel.plugins.library.cpu import VARIABLE
from bilevel.runtime.bench.plan import BURST, CHECKED, DENSE, UNCOUNTED, BenchPlan, Case, SideResult, Spread, busy_share
from bilevel.runtime.bench.profile import PARTS
from bilevel.runtime.bench.roofline import CeilingMeter, Ceilings, Geometry
from bilevel.runtime.bench.side import Side, SideSpec
from bilevel.runtime.bench.worker import Worker

# Largest relative error (norm of the difference over norm) of right logits. Rounded activations turn the last bit of a sum into
# a whole step now and then, which may also turn over a near-tie of a router; a wrong result is off by about 1.
EXACT, ROUNDED = 1e-3, 0.3


class WrongOutput(BilevelError):
    """A side's outputs are not right, so its times mean nothing."""


def limit(precision: str, weights: str, caches: str = "fp32") -> float:
    """The largest relative error of right logits of a bundle with this float type and these formats."""
    return EXACT if (precision, weights, caches) == ("float32", "fp32", "fp32") else ROUNDED


def relative_error(values: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Norm of the difference over the norm of ``expected``; infinite where a number is not finite."""
    if not (np.isfinite(values).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.linalg.norm(values - expected) / max(float(np.linalg.norm(expected)), 1e-30))


class Benchmark:
    """Runs a plan. on_stage is told what is being done, in words."""

    def __init__(self, plan: BenchPlan, on_stage: Callable[[str], None] = lambda stage: None) -> None:
        self.plan, self._on_stage = plan, on_stage
        bundle = plan.bundle
        self._geometry = Geometry(
            bundle.config, bundle.weights["format"], plan.twin_cache_bytes, plan.float_bytes, plan.cache_bytes
        )
        self._limit = limit(bundle.precision, bundle.weights["format"], bundle.caches)
        self._judged_by_check = False
        self.ceilings: Ceilings | None = None

    def run(self) -> list[Case]:
        """Measure every context. Raises WrongOutput where a side's outputs are not right, BilevelError otherwise."""
        checks = self._check_all_kept() if self.plan.has_twin else {}
        cases = []
        for context in self.plan.contexts:
            busy = busy_share()
            self._measure_ceilings()
            cases.append(self._case(context, checks))
            cases[-1].busy, cases[-1].judged_by_check = busy, self._judged_by_check
        for case in cases:
            self._add_rooflines(case)
        return cases

    def _measure_ceilings(self) -> None:
        """Before every context, because a machine that is busy for a moment lowers them; the highest count."""
        self._on_stage("measuring memory bandwidth and matrix products")
        with closing(Worker(CeilingMeter, self.plan.threads, threads=self.plan.threads)) as meter:
            ceilings: Ceilings = meter.call("measure")
        self.ceilings = ceilings if self.ceilings is None else self.ceilings.best(ceilings)

    def _add_rooflines(self, case: Case) -> None:
        """The least times of one case, by the ceilings of the whole run."""
        assert self.ceilings is not None
        chunk = self.plan.bundle.prefill_chunk
        for side, result in case.sides.items():
            result.decode_roofline = self.ceilings.seconds(self._geometry.decode(case.context, side == DENSE))
            if result.prefill is not None:
                work = self._geometry.prefill(case.context, chunk, side == DENSE)
                result.prefill_roofline = self.ceilings.seconds(work, calls=-(-case.context // chunk))

    def _open(self, side: str, capacity: int, *, portable: bool = False, profile: bool = False) -> Worker:
        spec = SideSpec(self.plan.bundle.folder, side == DENSE, self.plan.threads, capacity, profile)
        return Worker(Side, spec, threads=self.plan.threads, environment={VARIABLE: "none"} if portable else None)

    def _tokens(self, count: int) -> list[int]:
        return np.random.default_rng(self.plan.seed + 1).integers(0, self.plan.bundle.vocab_size, count).tolist()

    def _require(self, error: float, what: str) -> float:
        if error <= self._limit:
            return error
        if self._limit == ROUNDED and np.isfinite(error) and self.plan.is_checked:
            self._judged_by_check = True
            return error
        remedy = "ask bilevel check BUNDLE --against CHECKPOINT, whose verdict then decides"
        raise WrongOutput(
            f"{what} (relative error {error:.1e}, at most {self._limit:.0e} is right), so no times are reported; "
            + (remedy if self._limit == ROUNDED else "find where: bilevel check BUNDLE --against CHECKPOINT")
        )

    def _check_all_kept(self) -> dict[str, float]:
        """Where the routes hold every block, routed and dense are the same function."""
        routing, bundle = self._geometry.routing, self.plan.bundle
        if routing["preset"] == "dense":
            return {}
        self._on_stage("comparing the two graphs where every block is kept")
        length = min(int(routing["topk"]) * bundle.block_size, bundle.max_positions)
        tokens, logits = self._tokens(length), []
        for side in self.plan.sides:
            with closing(self._open(side, bundle.round_up(length))) as worker:
                worker.call("logits", tokens[:-2], 0, bundle.prefill_chunk)
                logits.append(worker.call("logits", tokens[-2:], length - 2, 1))
        error = relative_error(*logits)
        what = f"the routed graph's logits after {length} tokens differ from the dense twin's, though every block is kept"
        return {"routed equals dense where all is kept": self._require(error, what)}

    def _case(self, context: int, checks: dict[str, float]) -> Case:
        plan, capacity, checks = self.plan, self.plan.capacity(context), dict(checks)
        with ExitStack() as stack:
            workers = {}
            for side in plan.sides:
                self._on_stage(f"{context} tokens: opening and checking the {side} side")
                workers[side] = stack.enter_context(closing(self._open(side, capacity)))
                checks |= self._check_filled(side, workers[side], context)
            prefill = self._prefill(workers, context)
            steps = self._decode(workers, context)
            results = {side: self._result(side, workers[side], context, steps[side], prefill.get(side)) for side in plan.sides}
        if plan.has_profile:
            for side in plan.sides:
                results[side].parts = self._profile(side, context, capacity)
        return Case(context, results, checks)

    def _check_filled(self, side: str, worker: Worker, context: int) -> dict[str, float]:
        """A chunk against single tokens, and the CPU library against the portable bodies, on the caches that are timed."""
        worker.call("fill", context, self.plan.seed)
        tokens = self._tokens(CHECKED)
        chunk = worker.call("logits", tokens, context, CHECKED)
        single = worker.call("logits", tokens, context, 1)
        name = f"{side}: a chunk equals single tokens"
        what = f"behind {context} tokens the {side} side's logits of a chunk differ from those of single tokens"
        checks = {name: self._require(relative_error(chunk, single), what)}
        if worker.call("cpu_library") is not None:
            with closing(self._open(side, self.plan.capacity(context), portable=True)) as portable:
                portable.call("fill", context, self.plan.seed)
                expected = portable.call("logits", tokens, context, 1)
            what = f"behind {context} tokens the CPU library's logits differ from those of the {side} graph's portable bodies"
            checks[f"{side}: the CPU library equals the bodies"] = self._require(relative_error(single, expected), what)
        return checks

    def _prefill(self, workers: dict[str, Worker], context: int) -> dict[str, Spread]:
        """Seconds until the first token of a prompt of ``context`` tokens, the sides by turns; empty where not asked for."""
        plan = self.plan
        if context > plan.max_prefill:
            return {}
        tokens: list[int] = self._tokens(context)
        for worker in workers.values():
            worker.call("prefill", tokens[: 2 * plan.bundle.prefill_chunk])
        seconds: dict[str, list[float]] = {side: [] for side in workers}
        for turn in range(plan.prefill_runs):
            for side in _order(list(workers), turn):
                self._on_stage(f"{context} tokens: prefill {turn + 1} of {plan.prefill_runs}, {side}")
                seconds[side].append(workers[side].call("prefill", tokens)["seconds"])
        return {side: Spread.of(values) for side, values in seconds.items()}

    def _decode(self, workers: dict[str, Worker], context: int) -> dict[str, list[tuple[float, float]]]:
        """(seconds, of which in the engine) of every counted step, the sides by turns."""
        for worker in workers.values():
            worker.call("fill", context, self.plan.seed)
        steps: dict[str, list[tuple[float, float]]] = {side: [] for side in workers}
        for turn in range(self.plan.rounds):
            for side in _order(list(workers), turn):
                self._on_stage(f"{context} tokens: decode, turn {turn + 1} of {self.plan.rounds}, {side}")
                steps[side] += workers[side].call("decode", UNCOUNTED + BURST)[UNCOUNTED:]
        return steps

    def _result(
        self, side: str, worker: Worker, context: int, steps: list[tuple[float, float]], prefill: Spread | None
    ) -> SideResult:
        return SideResult(
            decode=Spread.of([seconds for seconds, _ in steps]),
            outside_engine=float(np.median([(seconds - engine) / seconds for seconds, engine in steps])),
            peak_bytes=worker.call("peak_memory"),
            state_bytes=worker.call("state_bytes"),
            attended=self._geometry.attended(context + 1, side == DENSE) / (context + 1),
            prefill=prefill,
            cpu_library=worker.call("cpu_library"),
        )

    def _profile(self, side: str, context: int, capacity: int) -> dict[str, float]:
        """Median seconds by part of a decoded token, in a process of its own: recording costs time."""
        self._on_stage(f"{context} tokens: profile, {side}")
        with closing(self._open(side, capacity, profile=True)) as worker:
            worker.call("fill", context, self.plan.seed)
            worker.call("decode", UNCOUNTED + BURST)
            calls = worker.call("end_profiling", UNCOUNTED)
        return {part: float(np.median([call[part] for call in calls])) for part in PARTS}


def _order(sides: list[str], turn: int) -> list[str]:
    """The sides, the other one first in every second turn."""
    return sides[::-1] if turn % 2 else sides
