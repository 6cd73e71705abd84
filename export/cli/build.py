"""``bilevel build BUNDLE``."""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import machine
from bilevel.bundle.engines import BACKENDS, FOLDER, read_engine
from bilevel.errors import EngineError, require
from bilevel.machine import Gpu

if TYPE_CHECKING:
    from bilevel.bundle.format import Bundle
    from bilevel.export.engine.build import Plan

EPILOG = """\
An engine is the bundle's graph, optimised by TensorRT for one kind of GPU. It lies in BUNDLE/engines with a manifest; bilevel
inspect shows it, bilevel run takes the best one that fits the machine.

  bilevel build my-bundle --backend tensorrt-rtx --sm 89,120    for RTX 40 and 50, on any x86-64 Linux machine, without a GPU
  bilevel build my-bundle --backend tensorrt                    for the GPU at hand: on a Jetson, on the Jetson

Sizes are fixed here: --capacity tokens for each row's caches, --batch rows. Every engine has two optimisation profiles, one for
the prompt's chunks and one for single tokens. The routed nodes run as plugins of the bundle's kernel library (bilevel kernels
build), or of --plugins FILE; python builds with stand-ins that need that library only on the device, none with the portable
bodies, slower but without a library. A build that is interrupted leaves what was there before.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Build an engine from a bundle."
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by bilevel export")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="tensorrt-rtx", help="who builds and runs it (default tensorrt-rtx)"
    )
    parser.add_argument("--sm", metavar="LIST", help="tensorrt-rtx: architectures of the GPUs, as in 89,120")
    parser.add_argument(
        "--capacity", type=int, metavar="N", help="tokens that a row's caches hold (default: the model's positions)"
    )
    parser.add_argument("--batch", default="1", metavar="N", help="rows: the most, or a range such as 1-8 (default 1)")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="most tokens of one call (default: the bundle's)")
    parser.add_argument("--plugins", metavar="FILE", help="a kernel library, python or none (default: the bundle's library)")
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="tensorrt: measurements of kernels, kept from build to build (default: BUNDLE/engines/timings)",
    )
    parser.add_argument(
        "--weight-streaming",
        action="store_true",
        help="for models too large for the GPU's memory: weights stay in the host's and are copied for every call",
    )
    parser.add_argument(
        "--reproducible",
        action="store_true",
        help="the same bytes every time that this bundle is built in this folder: on one core, giving way to everything else",
    )
    parser.add_argument("--yes", action="store_true", help="build even where the estimate of memory says that it cannot fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def parse_architectures(text: str | None) -> tuple[int, ...]:
    """``"89,sm_120"`` -> (89, 120). Raises EngineError."""
    parts = [part.strip().removeprefix("sm_") for part in (text or "").split(",")]
    if not all(re.fullmatch(r"[0-9]{2,3}", part) for part in parts):
        raise EngineError(f"--sm {text or '(nothing)'} must list GPU architectures, as in --sm 89,120 (RTX 40 and RTX 50)")
    return tuple(sorted({int(part) for part in parts}))


def parse_batch(text: str) -> tuple[int, int]:
    """``"8"`` -> (1, 8), ``"2-8"`` -> (2, 8). Raises EngineError."""
    rows = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)", text)
    least, most = (int(rows[1] or 1), int(rows[2])) if rows else (0, 0)
    if not 1 <= least <= most:
        raise EngineError(f"--batch {text} must be a number of rows, or a range such as 1-8")
    return least, most


def _read_bundle(folder: Path) -> Bundle:
    """A bundle that TensorRT can read. Raises BundleError and EngineError."""
    from bilevel.bundle.format import read_manifest

    bundle = read_manifest(folder)
    if bundle.weights["format"] != "fp32":
        raise EngineError(
            f"{folder} has {bundle.weights['format']} weights in ONNX Runtime's format, which TensorRT cannot read; "
            "export another: "
            "bilevel export CHECKPOINT BUNDLE --precision fp16"
        )
    if bundle.caches != "fp32":
        raise EngineError(
            f"{folder} caches keys and values in {bundle.caches}, for which there are no GPU kernels; export another: "
            "bilevel export CHECKPOINT BUNDLE --precision fp16"
        )
    return bundle


def make_plan(args: argparse.Namespace) -> tuple[Plan, Gpu | None]:
    """What to build, and the GPU that it is for where that is the one at hand; options are checked cheap ones first."""
    if args.backend == "tensorrt" and args.sm:
        raise EngineError("--sm goes with --backend tensorrt-rtx; tensorrt builds for the GPU at hand, so run it on the device")
    archs = parse_architectures(args.sm) if args.backend == "tensorrt-rtx" else ()
    least, most = parse_batch(args.batch)
    bundle = _read_bundle(args.bundle)
    require("onnx")
    from bilevel.export.engine.build import Plan
    from bilevel.export.engine.cache_writes import check_caches
    from bilevel.export.engine.memory import check_volumes, estimate_memory
    from bilevel.export.engine.network import Limits
    from bilevel.export.engine.plugins import choose_plugins
    from bilevel.export.engine.versions import load_flavour, measures_kernels
    from bilevel.export.engine.worker import NO_PLUGINS

    block, positions = bundle.block_size, bundle.max_positions
    capacity = positions if args.capacity is None else args.capacity
    if not 1 <= capacity <= bundle.round_up(positions):
        raise EngineError(f"--capacity {capacity} must lie between 1 and the model's {positions} positions")
    capacity = bundle.round_up(capacity)
    chunk = bundle.prefill_chunk if args.prefill_chunk is None else args.prefill_chunk
    if chunk < 1:
        raise EngineError(f"--prefill-chunk {chunk} must be at least 1")
    limits = Limits(most, capacity, min(chunk, capacity), block, least)
    check_volumes(bundle, limits)
    flavour = load_flavour(args.backend)
    gpu = machine.find_gpu() if args.backend == "tensorrt" else None
    archs = _check_architectures(flavour, archs, gpu)
    plugins = choose_plugins(args.bundle, args.plugins, archs)
    if plugins.source == NO_PLUGINS:
        check_caches(flavour, bundle.graph.state)
    estimate = estimate_memory(bundle, limits, plugins.source != NO_PLUGINS)
    if args.weight_streaming and gpu is not None and gpu.is_integrated:
        raise EngineError("--weight-streaming is of no use here: this GPU's memory is the host's; leave it out")
    if args.timing_cache is not None and not measures_kernels(flavour):
        raise EngineError(f"--timing-cache goes with --backend tensorrt; {args.backend} measures nothing while it builds")
    timings = (args.timing_cache or args.bundle / FOLDER / "timings") if measures_kernels(flavour) else None
    chosen = Plan(
        bundle,
        flavour,
        archs,
        limits,
        plugins,
        estimate,
        timings,
        weight_streaming=args.weight_streaming,
        reproducible=args.reproducible,
    )
    return chosen, gpu


def _check_architectures(flavour: Any, archs: tuple[int, ...], gpu: Gpu | None) -> tuple[int, ...]:
    from bilevel.export.engine.versions import compute_capabilities

    if flavour.backend == "tensorrt":
        if gpu is None:
            raise EngineError(
                "tensorrt builds for the GPU at hand, and there is none; run this on the device, or take tensorrt-rtx"
            )
        return (gpu.capability,)
    known = compute_capabilities(flavour)
    for arch in archs:
        if arch not in known:
            names = ", ".join(f"sm_{each}" for each in known)
            raise EngineError(
                f"tensorrt-rtx {flavour.version_text} builds for {names}, not for sm_{arch}; for other GPUs run bilevel build "
                "--backend tensorrt on the device"
            )
    return archs


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    plan, gpu = make_plan(args)
    from bilevel.export.engine.build import build_engine
    from bilevel.export.engine.memory import human, memory_problem, sizes_in_words

    console = require("rich.console").Console(stderr=True)
    available = machine.available_memory()
    free = "" if available is None else f", {human(available)} are free"
    console.print(f"building takes about {human(plan.estimate.build)} of memory{free}", highlight=False, soft_wrap=True)
    console.print(
        f"running takes about {human(plan.estimate.run)}: {sizes_in_words(plan.estimate)}", highlight=False, soft_wrap=True
    )
    if plan.plugins.why:
        console.print(f"building with the Python plugins: {plan.plugins.why}", highlight=False, soft_wrap=True)
    # The host takes the weights that find no room.
    needed = replace(plan.estimate, weights=0) if plan.weight_streaming else plan.estimate
    problem = memory_problem(needed, available, gpu)
    if problem and not args.yes:
        raise EngineError(problem)
    rich = require("rich.progress")
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    started = time.perf_counter()
    with rich.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        path = build_engine(
            plan,
            lambda phase, done, total: progress.update(task, description=phase, completed=done, total=total or None),
        )
    _report(path, time.perf_counter() - started, args.json)
    return 0


def _report(path: Path, seconds: float, as_json: bool) -> None:
    engine = read_engine(path)
    if as_json:
        print(json.dumps({"manifest": str(path), "seconds": seconds, **engine.as_dict()}))
        return
    archs = ", ".join(f"sm_{arch}" for arch in engine.architectures)
    served = f"{engine.plugins['nodes']} plugin layers" if engine.plugins else "routed nodes as portable bodies"
    print(f"wrote {engine.path} ({engine.num_bytes / 1e6:.1f} MB) in {seconds:.1f} s")
    print(f"for {archs}; capacity {engine.capacity}, {served}")
    print(f"next: bilevel inspect {path.parent.parent}")
