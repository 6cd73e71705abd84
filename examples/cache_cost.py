"""What packed caches cost and save: processor time of a decoded token, and the peak memory of its process.

    python examples/cache_cost.py --weights int4 --contexts 1024,32768,131072

Geometry "small" with fp32, int8 and int4 caches and the dense twin (int8 caches where weights or caches are small), one thread
each, in turns. Processor time, not the clock's, so that a machine that others use too gives numbers that can be compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

from bilevel.runtime.bench.side import Side, SideSpec
from bilevel.runtime.cli.bench import geometry_bundle

CACHES = ("fp32", "int8", "int4")


def measure(spec: SideSpec, context: int, steps: int) -> tuple[float, int, int]:
    """(ms of processor time a token, median; peak bytes; bytes of the caches) behind ``context`` cached tokens."""
    side = Side(spec)
    side.fill(context, seed=0)
    side.decode(3)
    times = []
    for _ in range(steps):
        before = time.process_time()
        side.decode(1)
        times.append(time.process_time() - before)
    return statistics.median(times) * 1e3, side.peak_memory(), side.state_bytes()


def apart(*arguments: object) -> tuple[float, int, int]:
    """``measure`` in a process of its own, whose peak is its own too."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def main() -> None:
    """Print one line for each context and side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="small")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--contexts", default="1024,32768,131072")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    bundles: dict[str, Path] = {kv: geometry_bundle(args.geometry, args.weights, print, kv) for kv in CACHES}
    sides = {f"{kv} caches": (bundle, False) for kv, bundle in bundles.items()} | {"dense twin": (bundles["int8"], True)}
    for context in map(int, args.contexts.split(",")):
        capacity = (context + args.steps + 64) // 64 * 64
        found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, (bundle, is_twin) in sides.items():
                found[name].append(apart(SideSpec(bundle, is_twin, 1, capacity), context, args.steps))
        for name, results in found.items():
            ms, peak, state = ([each[place] for each in results] for place in range(3))
            shown = ", ".join(f"{value:.1f}" for value in ms)
            print(
                f"{context} tokens, {name}: {shown} ms, peak {max(peak) / 1e9:.2f} GB, caches {state[0] / 1e9:.3f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
