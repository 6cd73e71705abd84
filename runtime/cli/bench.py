"""``bilevel bench``: speed and memory against context length, with the dense twin beside it."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bilevel.bundle.cache_rows import FORMATS as CACHE_FORMATS
from bilevel.bundle.format import load_bundle
from bilevel.bundle.manifest import WEIGHT_FORMATS
from bilevel.errors import MissingDependency, RequestError, require
from bilevel.runtime.bench.measure import Benchmark, WrongOutput
from bilevel.runtime.bench.plan import BenchPlan, choose_contexts, default_threads
from bilevel.runtime.bench.report import as_json, print_tables, save_plot

# Imported by name, as the commands are: the runtime itself needs nothing of the exporter.
GEOMETRY_MODULE = "bilevel.export.decoder.geometries"
GEOMETRIES = ("small", "tiny")
EPILOG = """\
  bilevel bench my-bundle                                  2k, 8k, 32k and 128k tokens, as far as model and memory reach
  bilevel bench my-bundle --contexts 1k,4k --plot cost.svg
  bilevel bench --geometry small                           no bundle: a model of 90 million random weights, exported once
  bilevel bench my-bundle --json > result.json

For each context length: time of a decoded token, time to the first token, peak memory of the process, share of the tokens that
are attended, time by part, and beside them the same of the dense twin (same weights, ordinary attention by ONNX Runtime's
GroupQueryAttention) and the least time that this machine allows (roofline: bytes and operations over measured ceilings).

How to get numbers worth keeping: nothing else running, --threads as the application will have them, more --decode-steps where
the middle half (in brackets) is wide. Decode runs on caches filled with random numbers; prefill really reads the prompt, which
takes the dense twin minutes beyond 8k, so it is measured up to --max-prefill.

Outputs are compared before anything is timed. Where weights or caches are rounded, right outputs may differ by more than fixed
limits on caches of random numbers; what bilevel check said of the same file then decides, if it was asked. Exit status: 0
measured, 1 outputs are not right (no numbers), 2 bad input. The last line on stdout is one JSON object with everything.
"""


def parse_length(text: str) -> int:
    """2048, 2k or 2K: tokens. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 2048 or 2k")
    return int(match[1]) * (1024 if match[2] else 1)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, nargs="?", help="folder written by bilevel export")
    parser.add_argument(
        "--geometry", choices=GEOMETRIES, help="in place of BUNDLE: random weights of a known size, kept in the cache folder"
    )
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, help="with --geometry: how the weights are stored (default: fp32)")
    parser.add_argument("--kv", choices=CACHE_FORMATS, help="with --geometry: how keys and values are cached (default: fp32)")
    parser.add_argument(
        "--contexts", type=_lengths, metavar="2k,8k,...", help="tokens cached (default: 2k,8k,32k,128k as memory allows)"
    )
    parser.add_argument("--decode-steps", type=int, default=64, metavar="N", help="timed steps per side (default: %(default)s)")
    parser.add_argument(
        "--prefill", action=argparse.BooleanOptionalAction, default=True, help="measure the time to the first token"
    )
    parser.add_argument(
        "--max-prefill", type=parse_length, metavar="N", help="longest prompt whose reading is measured (default: 8k)"
    )
    parser.add_argument("--prefill-runs", type=int, default=3, metavar="N", help="times it is read (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: one per core (default: %(default)s)")
    parser.add_argument("--no-twin", action="store_true", help="measure the bundle alone")
    parser.add_argument("--no-profile", action="store_true", help="skip the time by part")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="cost against context length, as FILE.png or FILE.svg")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of sizes and hashes")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")


def main(args: argparse.Namespace) -> int:
    """Measure; 1 when a side's outputs are not right."""
    _check(args)
    console = require("rich.console").Console(stderr=True)
    with console.status("starting") as status:

        def show(stage: str) -> None:
            status.update(stage) if console.is_terminal else console.print(stage, highlight=False, soft_wrap=True)

        bundle = args.bundle or geometry_bundle(args.geometry, args.weights or "fp32", show, args.kv or "fp32")
        plan, skipped = _plan(args, bundle)
        benchmark = Benchmark(plan, show)
        try:
            cases = benchmark.run()
        except WrongOutput as error:
            print(f"bilevel bench: refused: {error}", file=sys.stderr)
            return 1
    assert benchmark.ceilings is not None
    if args.plot is not None:
        save_plot(args.plot, cases, _title(args, plan))
    if not args.json:
        print_tables(plan, cases, benchmark.ceilings, skipped)
    print(json.dumps(as_json(plan, cases, benchmark.ceilings, skipped, args.geometry)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is opened."""
    if (args.bundle is None) == (args.geometry is None):
        raise RequestError("give either a BUNDLE or --geometry, for example: bilevel bench --geometry small")
    if args.weights is not None and args.geometry is None:
        raise RequestError(f"--weights {args.weights} goes with --geometry; a bundle has the weights it was exported with")
    if args.kv is not None and args.geometry is None:
        raise RequestError(f"--kv {args.kv} goes with --geometry; a bundle has the caches it was exported with")
    if not args.prefill and args.max_prefill is not None:
        raise RequestError(f"--max-prefill {args.max_prefill} contradicts --no-prefill; leave one of them out")
    for name, least in (("decode_steps", 1), ("prefill_runs", 1), ("threads", 0)):
        if getattr(args, name) < least:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".svg"):
            raise RequestError(f"--plot {args.plot} must end in .png or .svg")
        if not args.plot.parent.is_dir():
            raise RequestError(f"--plot {args.plot}: the folder {args.plot.parent} does not exist; create it first")
        require("matplotlib")


def _plan(args: argparse.Namespace, path: Path) -> tuple[BenchPlan, dict[int, str]]:
    """The plan, and the default contexts that are left out with the reason."""
    bundle = load_bundle(path, verify=not args.no_verify)
    if not args.no_twin and bundle.twin is None:
        if (bundle.config.get("routing") or {"preset": "dense"})["preset"] == "dense":
            raise RequestError(f"{path} holds a dense model, which has no dense twin; measure it alone with --no-twin")
        if bundle.precision == "bfloat16":
            raise RequestError(
                f"{path} is in bfloat16, for which ONNX Runtime's GroupQueryAttention has no CPU kernel, "
                "so it has no dense twin; to measure on a CPU, export with --precision fp16 or fp32"
            )
        bundle.dense_twin()  # raises with the remedy
    threads = args.threads or default_threads()
    max_prefill = (args.max_prefill or 8192) if args.prefill else 0
    options = (args.decode_steps, args.prefill_runs, max_prefill, threads, not args.no_twin, not args.no_profile)
    contexts, skipped = choose_contexts(BenchPlan(bundle, (), *options), args.contexts)
    return BenchPlan(bundle, contexts, *options), skipped


def _title(args: argparse.Namespace, plan: BenchPlan) -> str:
    name = f"geometry {args.geometry}" if args.geometry else args.bundle.name
    kind = plan.bundle.weights["format"] if plan.bundle.precision == "float32" else plan.bundle.precision
    if plan.bundle.caches != "fp32":
        kind += f" weights, {plan.bundle.caches} caches"
        return f"{name}, {kind}, {plan.threads} threads"
    return f"{name}, {kind} weights, {plan.threads} threads"


def geometry_bundle(name: str, weights: str, on_stage: Callable[[str], None], caches: str = "fp32") -> Path:
    """The bundle of a known geometry in the user's cache folder, exported there on first use. Raises MissingDependency.

    Another exporter may write another graph, so its sources are part of the name, and the bundles of earlier ones are removed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bilevel" / "geometries"
    kind = f"{name}-{weights}" if caches == "fp32" else f"{name}-{weights}-kv.{caches}"
    bundle = cache / f"{kind}-{_exporter_digest()}"
    if (bundle / "bundle.json").is_file():
        return bundle
    try:
        importlib.import_module(GEOMETRY_MODULE).make_bundle(name, bundle, weights, on_stage, caches)
    except (MissingDependency, ModuleNotFoundError) as error:
        raise MissingDependency(
            f"--geometry {name} exports a model, which takes the exporter ({error}); install it with "
            "pip install 'bilevel[cpu,export]', or give a BUNDLE"
        ) from None
    for old in cache.glob(f"{kind}-*"):
        if old != bundle and "-kv." not in old.name.removeprefix(kind):
            shutil.rmtree(old, ignore_errors=True)
    return bundle


def _exporter_digest() -> str:
    """12 hexadecimal digits that change with the sources of the model and of the exporter."""
    digest = hashlib.sha256()
    for package in ("bilevel", "bilevel.plugins", "bilevel.export"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for source in sorted(Path(folder).glob("*.py")):
                digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
