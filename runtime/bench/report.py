"""A benchmark's numbers as tables, as one JSON object and as a plot."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bilevel
from bilevel.errors import require
from bilevel.runtime.bench.plan import DENSE, ROUTED, BenchPlan, Case, SideResult, Spread
from bilevel.runtime.bench.profile import PARTS
from bilevel.runtime.bench.roofline import READ_SIZES, Ceilings

MILLI, MEBI = 1e3, 2**20
BUSY = 0.1  # share of the cores from which other processes are worth a warning
_COLOURS = {ROUTED: "#1b6ca8", DENSE: "#c8553d"}


def describe_machine(threads: int) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    return {
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "bilevel": bilevel.__version__,
        **{name: _version(name) for name in ("onnxruntime", "numpy")},
        "revision": git_revision(Path(__file__).resolve().parent),
    }


def _cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name") or facts.get("Model") or facts.get("Hardware") or platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(folder: Path) -> str | None:
    """The commit of the checkout that ``folder`` lies in, with "+" where files were changed; None outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(
    plan: BenchPlan, cases: list[Case], ceilings: Ceilings, skipped: dict[int, str], geometry: str | None
) -> dict[str, Any]:
    """Everything measured. Times in seconds, sizes in bytes; ratio: how many times better than the dense twin."""
    return {
        "benchmark": "bilevel bench",
        "bundle": str(plan.bundle.folder),
        "geometry": geometry,
        "precision": plan.bundle.precision,
        "weights": plan.bundle.weights["format"],
        "kv": plan.bundle.caches,
        "model": dict(plan.bundle.config),
        "machine": describe_machine(plan.threads),
        "ceilings": {
            "flops_per_second": ceilings.flops_per_second,
            "bytes_per_second": dict(zip(map(str, READ_SIZES), ceilings.bytes_per_second, strict=True)),
        },
        "decode_steps": plan.decode_steps,
        "prefill_chunk": plan.bundle.prefill_chunk,
        "seed": plan.seed,
        "caches": "synthetic for decode, real for prefill",
        "cases": [_case_as_json(case) for case in cases],
        "skipped": {str(context): reason for context, reason in skipped.items()},
    }


def _case_as_json(case: Case) -> dict[str, Any]:
    sides = {}
    for name, side in case.sides.items():
        sides[name] = {
            **asdict(side),
            "decode_tokens_per_second": side.tokens_per_second,
            "prefill_tokens_per_second": case.context / side.prefill.median if side.prefill else None,
            "first_token_seconds": side.prefill.median if side.prefill else None,
        }
    ratios = {name: case.ratio(name) for name in ("decode", "prefill", "peak_bytes")}
    return {
        "context": case.context,
        "busy": case.busy,
        "checks": case.checks,
        "judged_by_check": case.judged_by_check,
        "sides": sides,
        "ratio": ratios,
    }


def print_tables(plan: BenchPlan, cases: list[Case], ceilings: Ceilings, skipped: dict[int, str]) -> None:
    """The numbers on stdout. A pipe gets lines of 120 characters."""
    console = require("rich.console").Console(width=None if os.isatty(1) else 120, highlight=False)
    machine = describe_machine(plan.threads)
    console.print(
        f"{machine['cpu']}, {plan.threads} threads, onnxruntime {machine['onnxruntime']}; "
        f"reads {ceilings.bytes_per_second[-1] / 1e9:.1f} GB/s, multiplies {ceilings.flops_per_second / 1e9:.0f} GFLOP/s (fp32)"
    )
    for title, columns, rows in (_decode(cases), _prefill(cases), _parts(cases)):
        table = require("rich.table").Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)
    console.print("Medians; in brackets the middle half of the measurements. roofline: the least time that the machine allows.")
    if any(case.judged_by_check for case in cases):
        console.print("Some outputs differ by more than the fixed limits (--json: checks); bilevel check passed this graph.")
    console.print("Decode runs on caches filled with random numbers. runtime: share of the time outside ONNX Runtime.")
    disturbed = [case.context for case in cases if case.busy is not None and case.busy > BUSY]
    if disturbed:
        console.print(f"Other processes kept the machine busy before {', '.join(map(str, disturbed))} tokens: measure again.")
    for context, reason in skipped.items():
        console.print(f"not measured: {context} tokens ({reason})")


Table = tuple[str, list[str], list[list[str]]]


def _decode(cases: list[Case]) -> Table:
    columns = ["cached", "side", "ms a token", "", "roofline", "tokens/s", "ratio", "attended", "runtime", "peak MiB"]
    rows = []
    for case in cases:
        for name, side in case.sides.items():
            rows.append(
                [
                    str(case.context),
                    name,
                    *_spread(side.decode, MILLI),
                    f"{(side.decode_roofline or 0) * MILLI:.2f}",
                    f"{side.tokens_per_second:.1f}",
                    _times(case.ratio("decode") if name == ROUTED else None),
                    f"{side.attended:.1%}",
                    f"{side.outside_engine:.1%}",
                    f"{side.peak_bytes / MEBI:.0f}",
                ]
            )
    return "Decode and memory", columns, rows


def _prefill(cases: list[Case]) -> Table:
    columns = ["prompt", "side", "s to the 1st token", "", "roofline", "tokens/s", "ratio"]
    rows = []
    for case in cases:
        for name, side in case.sides.items():
            if side.prefill is None or side.prefill_roofline is None:
                continue
            ratio = _times(case.ratio("prefill") if name == ROUTED else None)
            speed = f"{case.context / side.prefill.median:.0f}"
            rows.append([str(case.context), name, *_spread(side.prefill, 1), f"{side.prefill_roofline:.2f}", speed, ratio])
    return "Prefill", columns, rows


def _spread(spread: Spread, factor: float) -> tuple[str, str]:
    digits = 2 if spread.median * factor < 10 else 1
    low, median, high = (f"{value * factor:.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return median, f"[{low} - {high}]"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _parts(cases: list[Case]) -> Table:
    """Milliseconds of a decoded token by part; the profiled run's shares of the median step."""
    rows = []
    for case in cases:
        for name, side in case.sides.items():
            if side.parts:
                shares = decode_parts(side)
                rows.append([str(case.context), name, *(f"{shares[part] * MILLI:.2f}" for part in shares)])
    return "A decoded token by part, ms", ["tokens", "side", *PARTS, "runtime"], rows


def decode_parts(side: SideResult) -> dict[str, float]:
    """Seconds of a decoded token by part, scaled to the median step: recording made the profiled run slower."""
    runtime = side.decode.median * side.outside_engine
    recorded = sum(side.parts.values())
    return {**{part: side.parts[part] / recorded * (side.decode.median - runtime) for part in PARTS}, "runtime": runtime}


def save_plot(path: Path, cases: list[Case], title: str) -> None:
    """Cost per decoded token, and time to the first token where several were measured, against context length; log-log.

    The file's ending (.png, .svg) chooses the format.
    """
    require("matplotlib").use("agg")
    plt = require("matplotlib.pyplot")
    has_prefill = sum(case.sides[ROUTED].prefill is not None for case in cases) > 1
    figure, axes = plt.subplots(1, 1 + has_prefill, figsize=(6.4 * (1 + has_prefill), 4.6), squeeze=False, layout="constrained")
    decode = {n: [(c.context, c.sides[n].decode, c.sides[n].decode_roofline) for c in cases] for n in cases[0].sides}
    _draw(axes[0][0], decode, MILLI, "ms per generated token", "tokens cached")
    if has_prefill:
        prefill = {
            name: [(c.context, c.sides[name].prefill, c.sides[name].prefill_roofline) for c in cases if c.sides[name].prefill]
            for name in cases[0].sides
        }
        _draw(axes[0][1], prefill, 1, "seconds to the first token", "tokens of the prompt")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axis: Any, curves: dict[str, list[Any]], factor: float, value: str, length: str) -> None:
    """One panel: a line per side with its quartiles and, dotted, its roofline; every point carries its number."""
    highest = {c: max(s.median for points in curves.values() for at, s, _ in points if at == c) for c in _contexts(curves)}
    for name, points in curves.items():
        contexts, colour = [context for context, _, _ in points], _COLOURS[name]
        medians = [spread.median * factor for _, spread, _ in points]
        below = [(spread.median - spread.low) * factor for _, spread, _ in points]
        above = [(spread.high - spread.median) * factor for _, spread, _ in points]
        label = "two-level routing" if name == ROUTED else "dense twin"
        axis.errorbar(contexts, medians, yerr=[below, above], marker="o", capsize=3, color=colour, label=label)
        axis.plot(contexts, [least * factor for _, _, least in points], ":", color=colour, label=f"{label}, roofline")
        for context, spread, _ in points:
            at, offset = (context, spread.median * factor), (0, 9 if spread.median == highest[context] else -16)
            style = {"ha": "center", "fontsize": 8, "color": colour}
            axis.annotate(f"{at[1]:.3g}", at, offset, textcoords="offset points", **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(_contexts(curves), [f"{c // 1024}k" if c % 1024 == 0 else str(c) for c in _contexts(curves)])
    axis.yaxis.set_major_locator(require("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.minorticks_off()
    axis.margins(0.1, 0.18)
    axis.set(xlabel=length, ylabel=value)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _contexts(curves: dict[str, list[Any]]) -> list[int]:
    return sorted({context for points in curves.values() for context, _, _ in points})
