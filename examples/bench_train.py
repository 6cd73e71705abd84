"""Whole training steps (forward, backward, update) of a two-level model beside its dense twin: ``bench_train.py``.

Both have the geometry "small", random weights and random tokens; the twin's attention is PyTorch's
scaled_dot_product_attention. Each length has a process for each side, and their steps alternate, so that whatever else the
machine does hits both. Time is the median of the steps behind the first one, with the processor's own time beside it. Memory is
the most that a process ever held; what it held before its first step (code, weights) is given beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import queue
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SIDES = ("two_level", "dense")


def work(side: str, length: int, options: argparse.Namespace) -> None:
    """A side's process: one step for each line that arrives, and a line of JSON about it."""
    import torch

    from bilevel.config import Routing
    from bilevel.export.decoder.geometries import GEOMETRIES
    from bilevel.model import CausalLM
    from bilevel.training import LossWeights, make_optimizer, train_step

    config = dataclasses.replace(GEOMETRIES[options.geometry], num_hidden_layers=options.layers)
    if side == "dense":
        config = dataclasses.replace(config, routing=Routing(preset="dense"))
    torch.manual_seed(0)
    model = CausalLM(config)
    model.model.recomputes_layers = options.recompute
    optimizer = make_optimizer(model, peak=1e-4)
    tokens = torch.randint(0, config.vocab_size, (1, length + 1))
    before = _peak()
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        losses = train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], lr=1e-4, weights=LossWeights())
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        line = {"s": seconds, "cpu_s": cpu, "peak_mb": _peak(), "before_mb": before, "loss": losses["cross_entropy"]}
        print(json.dumps(line), flush=True)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Side:
    """One side's process at one length."""

    def __init__(self, side: str, length: int, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--side", side, "--lengths", str(length)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def step(self, limit: float) -> dict[str, float] | None:
        """What one step took; None where it was not done in ``limit`` seconds, or the process died (of memory)."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=limit)
        except (queue.Empty, BrokenPipeError):
            return None
        return json.loads(line) if line else None

    def end(self) -> None:
        self.process.kill()
        with self.process:  # closes the pipes, once the process is gone
            self.reader.join()


def measure(length: int, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Both sides at one length: medians of their steps' times, tokens per second, peak memory."""
    sides = {side: Side(side, length, arguments) for side in SIDES}
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    try:
        for turn in range(options.rounds + 1):
            for side in SIDES:
                if len(steps[side]) == turn and (line := sides[side].step(options.limit)) is not None:
                    steps[side].append(line)
    finally:
        for each in sides.values():
            each.end()
    result: dict[str, Any] = {"length": length}
    for side, lines in steps.items():
        timed = lines[1:] or lines  # where only the first was done in time, it has to do
        if not timed:
            result[side] = None
            continue
        cpu = statistics.median(line["cpu_s"] for line in timed)
        seconds = statistics.median(line["s"] for line in timed)
        result[side] = {
            "s": seconds, "cpu_s": cpu, "steps": len(timed), "tokens_per_s": length / seconds,
            "peak_mb": lines[-1]["peak_mb"], "before_mb": lines[-1]["before_mb"],
        }  # fmt: skip
    return result


def exponent(results: list[dict[str, Any]], side: str, key: str, without: str = "") -> float | None:
    """The slope of log(value) over log(length), least squares, where something is left; None of fewer than two lengths."""
    values = [(each["length"], each[side][key] - (each[side][without] if without else 0)) for each in results if each[side]]
    points = [(math.log(length), math.log(value)) for length, value in values if value > 0]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, key, title in zip(axes, ("s", "peak_mb"), ("seconds a step", "peak memory, MB"), strict=True):
        for side in SIDES:
            points = [(each["length"], each[side][key]) for each in results if each[side]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=side.replace("_", "-"))
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps of a two-level model beside its dense twin.")
    parser.add_argument("--geometry", default="small", choices=("small", "tiny"))
    parser.add_argument("--layers", type=int, default=12, help="of the model; fewer where the twin would take too long")
    parser.add_argument("--lengths", default="2k,8k,32k", help="tokens of the one row of a step")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each side, after a first one")
    parser.add_argument(
        "--limit", type=float, default=900.0, help="most seconds of a step; a side that takes longer is left out"
    )
    parser.add_argument("--recompute", action="store_true", help="layers are computed again on the way back")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="file for a picture")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.lengths = [int(n.removesuffix("k")) * (1024 if n.endswith("k") else 1) for n in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths {options.lengths!r} must be numbers of tokens, such as 2k,8k")
    if min(options.lengths) < 1 or options.layers < 1 or options.rounds < 1:
        parser.error("--lengths, --layers and --rounds must be at least 1")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.side:
        work(options.side, options.lengths[0], options)
        return 0
    passed = ["--geometry", options.geometry, "--layers", str(options.layers), *["--recompute"][: options.recompute]]
    results = []
    for length in options.lengths:
        results.append(measure(length, options, passed))
        for side in SIDES:
            if (line := results[-1][side]) is None:
                print(f"{length:7,} {side:9}: not within {options.limit:g} s, or out of memory", flush=True)
                continue
            print(
                f"{length:7,} {side:9}: {line['s']:8.2f} s a step ({line['cpu_s']:.2f} s of processor), "
                f"{line['tokens_per_s']:7.0f} tokens/s, {line['peak_mb']:6.0f} MB",
                flush=True,
            )
        if all(results[-1][side] for side in SIDES):
            print(f"{length:7,} dense / two-level: {results[-1]['dense']['s'] / results[-1]['two_level']['s']:.2f}", flush=True)
    exponents = {
        side: {"s": exponent(results, side, "s"), "memory": exponent(results, side, "peak_mb", "before_mb")} for side in SIDES
    }
    print(f"exponents of the length: {json.dumps(exponents)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"geometry": options.geometry, "layers": options.layers, "results": results, "exponents": exponents}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
