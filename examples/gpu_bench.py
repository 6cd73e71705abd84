"""Routed attention on a GPU beside PyTorch's dense attention and FlexAttention: ``make gpu-bench``, or

    python examples/gpu_bench.py [--contexts 8k,128k] [--batches 1] [--phases decode] [--dtype bfloat16] [--json FILE]

Decode is one token against a full cache, replayed as a CUDA graph with the L2 cache flushed before every run; prefill is the
whole text in one call. Times are medians by CUDA events. ``all`` is both routing levels and the attention; level 1, which a
model runs once for all of its layers, is counted in full. Keys, queries and words are random: independent of one another (the
worst case, for no two tokens keep the same blocks), and with a correlation between neighbours. Needs PyTorch with its Triton,
nothing else beside bilevel.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_clock import Clock, Timing, ratio
from gpu_roofline import Roofline, dense_work, find_roofline, routed_work, union_factor
from gpu_sides import Case, Routed, dense_sides, flex_side, make_tensors

from bilevel import gpu_kernels

ERROR = {torch.float16: 2e-2, torch.bfloat16: 6e-2, torch.float32: 1e-3}  # of the largest value; more is a wrong result
_TILE_TOKENS = 16  # positions whose blocks the kernel reads together, where four heads share a choice


def rival(clock: Clock, case: Case, make: Callable[[], Callable[[], object]]) -> Timing:
    """A competitor's time; whatever stops it is told, and stops nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work = make()
            work()
            return timed(clock, case, work)
    except torch.OutOfMemoryError:
        return Timing(None, note="out of memory")
    except Exception as error:  # noqa: BLE001 (anything a competitor raises is its result)
        return Timing(None, note=(str(error).strip().splitlines() or [type(error).__name__])[0][:120])
    finally:
        release(clock)


def timed(clock: Clock, case: Case, work: Callable[[], object]) -> Timing:
    if case.phase != "decode":
        return clock.measure(work)
    return clock.measure(clock.captured(work), flush=True)


def release(clock: Clock) -> None:
    gc.collect()
    if clock.cuda:
        torch.cuda.empty_cache()


def measure_dense(clock: Clock, case: Case, tensors: Any, compiled: bool) -> tuple[str, Timing]:
    """The fastest of PyTorch's ways, or the last reason why there is none."""
    best = ("", Timing(None, note="nothing ran"))
    for name, work in dense_sides(case, tensors, compiled):
        found = rival(clock, case, lambda work=work: work)  # type: ignore[misc]
        if found.median is None:
            best = (name, found) if best[1].median is None else best
        elif best[1].median is None or found.median < best[1].median:
            best = (name, found)
    return best


def run_case(clock: Clock, roof: Roofline, case: Case, dense: tuple[str, Timing] | None, flex: bool) -> dict[str, Any]:
    """One row of the table. dense: as measured before, for what does not depend on the correlation."""
    tensors = make_tensors(case, clock.device)
    routed = Routed(case, tensors)
    out = routed.attend()
    error = routed.error(out)
    if not error <= ERROR[case.dtype]:
        raise SystemExit(f"gpu-bench: {case} gives wrong results (error {error:.1e} of the largest value); run make gpu-test")
    parts = {"coarse": routed.coarse, "fine": routed.fine, "attention": routed.attend, "all": routed.all}
    times = {name: timed(clock, case, work) for name, work in parts.items()}
    work = routed_work(tensors.q, tensors.k, routed.routes, tensors.past_len, case.block_size)
    whole = dense_work(tensors.q, tensors.k, case.context - case.length)
    union = union_factor(routed.routes, case.context // case.block_size, _TILE_TOKENS)
    compiled = clock.cuda
    times["flex"] = Timing(None, note="not asked for")
    if flex:
        times["flex"] = measure_flex(clock, case, tensors, routed, out, compiled)
    del out
    release(clock)
    way, times["dense"] = dense or measure_dense(clock, case, tensors, compiled and flex)
    return {
        **{key: str(value) if isinstance(value, torch.dtype) else value for key, value in asdict(case).items()},
        "times_ms": {name: asdict(timing) for name, timing in times.items()},
        "dense_way": way,
        "error": error,
        "bytes": work.bytes,
        "flops": work.flops,
        "dense_flops": whole.flops,
        "dense_roofline_ms": 1e3 * roof.seconds(whole),
        "union_of_16_tokens": union,
        "roofline_ms": 1e3 * roof.seconds(work),
        "roofline_share": 1e3 * roof.seconds(work) / (times["attention"].median or 1.0),
        "times_dense": ratio(times["dense"], times["all"]),
        "attention_times_dense": ratio(times["dense"], times["attention"]),
        "attention_times_flex": ratio(times["flex"], times["attention"]),
    }


def measure_flex(clock: Clock, case: Case, tensors: Any, routed: Routed, out: torch.Tensor, compiled: bool) -> Timing:
    if compiled:
        torch._dynamo.reset()  # a case is another shape: its recompilations are not to add up to a limit
    made: list[Callable[[], torch.Tensor]] = []

    def make() -> Callable[[], object]:
        made.append(flex_side(case, tensors, routed.routes, compiled))
        other = made[0]()
        rows = zip(other, out, strict=True)  # one at a time: these are GB
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in rows)
        if not difference <= 2 * ERROR[case.dtype]:
            raise ValueError(f"its results differ by {difference:.1e} of the largest value")
        return made[0]

    return rival(clock, case, make)


def goals(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, bool | None]]:
    """(goal, what was measured, met; None where nothing was measured). The worst case of a goal decides."""
    for text, key, phase, context, least in (
        ("decode at 128k: attention at least 20 times as fast as dense", "attention_times_dense", "decode", 131072, 20.0),
        ("decode at 128k: attention at 60 % of the memory roofline", "roofline_share", "decode", 131072, 0.6),
        ("prefill at 128k: all at least 6 times as fast as dense", "times_dense", "prefill", 131072, 6.0),
        ("prefill at 4k: all takes at most 1.2 times as long as dense", "times_dense", "prefill", 4096, 1 / 1.2),
        ("decode at 4k: all takes at most 1.2 times as long as dense", "times_dense", "decode", 4096, 1 / 1.2),
    ):
        found = [row[key] for row in rows if row["context"] == context and row["phase"] == phase and row[key] is not None]
        if found:
            unit = "" if key == "roofline_share" else " times as fast"
            yield text, f"{min(found):.2f} to {max(found):.2f}{unit} in {len(found)} cases", min(found) >= least
        else:
            yield text, "not measured", None


def _show(timing: dict[str, Any]) -> str:
    if timing["median"] is None:
        return timing["note"]
    return f"{timing['median']:.3g} ({timing['low']:.3g}-{timing['high']:.3g})"


def table_line(row: dict[str, Any]) -> str:
    """One case, in two lines."""
    times = row["times_ms"]
    heads = "/".join(map(str, row["heads"]))
    faster = "" if row["times_dense"] is None else f", {row['times_dense']:.2f} times as fast as"
    flex = "" if row["attention_times_flex"] is None else f" ({row['attention_times_flex']:.2f} times the attention)"
    return (
        f"{row['phase']:<7} {heads:>5} x {row['width']}  {row['context']:>7,} tokens  B {row['batch']}  correlation "
        f"{row['correlation']:<4g} {row['dtype'].removeprefix('torch.')}: all {_show(times['all'])} ms{faster} dense "
        f"{_show(times['dense'])} [{row['dense_way']}]; FlexAttention {_show(times['flex'])}{flex}\n"
        f"        level 1 {_show(times['coarse'])}, level 2 {_show(times['fine'])}, attention {_show(times['attention'])} = "
        f"{row['roofline_share']:.0%} of the roofline ({row['bytes'] / 1e6:,.1f} MB, {row['flops'] / 1e9:,.1f} GFLOP; dense "
        f"{row['dense_flops'] / 1e9:,.1f} GFLOP); 16 tokens keep {row['union_of_16_tokens']:.1f} times one's blocks"
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for phase, geometry, context, batch, correlation in itertools.product(
        options.phases, options.geometries, options.contexts, options.batches, options.correlations
    ):
        if phase == "decode" and correlation != options.correlations[0]:
            continue  # one token has no neighbours
        heads, kv_heads, width = geometry
        yield Case(
            phase,
            (heads, kv_heads),
            width,
            context,
            batch,
            correlation,
            getattr(torch, options.dtype),
            options.block_size,
            options.coarse_topk,
            options.topk,
            options.route_dim or heads * width,
        )


def _count(text: str) -> int:
    return int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)


def _list(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part) for part in text.split(",")]


def _geometry(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("/"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=_list(_count), default="4k,8k,32k,128k", help="tokens, as in 8k,128k")
    parser.add_argument("--batches", type=_list(int), default="1,8")
    parser.add_argument("--geometries", type=_list(_geometry), default="32/8/128,16/2/128", help="heads/kv heads/head dim")
    parser.add_argument("--phases", type=_list(str), default="decode,prefill")
    parser.add_argument("--correlations", type=_list(float), default="0,0.95", help="between neighbouring tokens (prefill)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--coarse-topk", type=int, default=32, help="K1")
    parser.add_argument("--topk", type=int, default=16, help="K2")
    parser.add_argument("--route-dim", type=int, default=0, help="width of level 1's vectors (0: all heads together)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed runs for each side of a case")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out, whose compiler takes most of the time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write every number there too")
    options = parser.parse_args(arguments)
    if not set(options.phases) <= {"decode", "prefill"}:
        parser.error(f"--phases takes decode and prefill, not {','.join(options.phases)}")
    for context in options.contexts:
        if context % options.block_size:
            parser.error(f"--contexts: {context} tokens are no multiple of --block-size {options.block_size}")
    return options


def what_is_missing(device: torch.device) -> str:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU; run this on a machine that has one (nvidia-smi lists it)"
    if importlib.util.find_spec("triton") is None or gpu_kernels.kernels_for(device.type) is None:
        return f"there are no kernels for {device.type}: PyTorch's CUDA builds bring Triton; unset {gpu_kernels.VARIABLE}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and the goals; 2 where nothing can be measured."""
    options = parse(arguments)
    device = torch.device(options.device)
    problem = what_is_missing(device)
    if problem:
        print(f"gpu-bench: {problem}", file=sys.stderr)
        return 2
    clock = Clock(device, options.seconds)
    name = torch.cuda.get_device_name(device) if clock.cuda else "CPU, in Triton's interpreter"
    roof = find_roofline(name, clock.seconds, device)
    print(
        f"{name}; PyTorch {torch.__version__}; {roof.bandwidth / 1e9:,.0f} GB/s, {roof.flops / 1e12:,.1f} Tflop/s "
        f"({roof.source})"
    )
    rows: list[dict[str, Any]] = []
    known: dict[Any, tuple[str, Timing]] = {}
    for case in cases(options):
        key = (case.phase, case.heads, case.context, case.batch)
        try:
            row = run_case(clock, roof, case, known.get(key), not options.no_flex)
        except torch.OutOfMemoryError:
            print(f"{case.phase} {case.heads} {case.context:,} tokens B {case.batch}: out of memory", flush=True)
            continue
        finally:
            release(clock)
        known[key] = (row["dense_way"], Timing(**row["times_ms"]["dense"]))
        rows.append(row)
        print(table_line(row), flush=True)
    verdicts = list(goals(rows))
    for text, shown, met in verdicts:
        print(f"{'met' if met else 'missed' if met is False else '-':<7} {text}: {shown}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        told = {"device": name, "torch": torch.__version__, "roofline": asdict(roof), "rows": rows}
        told["goals"] = [{"goal": text, "measured": shown, "met": met} for text, shown, met in verdicts]
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
