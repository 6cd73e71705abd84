"""``bilevel quality BUNDLE|CHECKPOINT``: what routing costs in quality, on this model and this device."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bilevel.bundle.manifest import MANIFEST
from bilevel.errors import RequestError, require
from bilevel.runtime.backend.select import add_backend_options
from bilevel.runtime.quality.exams import TASKS
from bilevel.runtime.quality.floors import FLOORS, check_floors, parse_floor
from bilevel.runtime.quality.measure import Request, measure
from bilevel.runtime.quality.model import SIDES

# These need PyTorch: loaded by their names, as commands are.
MASS_SESSION, SUBJECT = "bilevel.export.quality.session", "bilevel.export.quality.subject"
MERGE, TUNED = "bilevel.export.route.merge", "tuned.safetensors"
QUICK_FACTS = 8
EPILOG = """\
Questions are drawn from a seed, put in the bundle's chat template, and answered by the device's own runtime. An answer is right
where greedy decoding gives exactly its tokens; beside that stands how surprised the model is by each of them, in nats.

tasks:
{tasks}
sides:
{sides}
floors, each with the least value that passes:
{floors}

  bilevel quality my-bundle                                     tables
  bilevel quality my-bundle --quick --floor needles=0.9         a quick look; exit status 1 where too few facts are found
  bilevel quality my-bundle --lengths 1k,4k --json q.json --html q.html
  bilevel quality my-bundle --checkpoint my-checkpoint          also the choice by true attention mass, in PyTorch
  bilevel quality my-checkpoint --adapter my-adapter            a checkpoint: exported, measured, true mass included (PyTorch)

Exit status: 0 no floor is missed, 1 one is, 2 it could not be measured.
"""


def _rows(texts: dict[str, str]) -> str:
    return "\n".join(f"  {name:14}{text}" for name, text in texts.items())


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG.format(tasks=_rows(TASKS), sides=_rows(SIDES), floors=_rows(FLOORS))
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, help="folder written by bilevel export, or what it takes; with a tokenizer"
    )
    parser.add_argument(
        "--against",
        metavar="DENSE",
        type=Path,
        help="a bundle or checkpoint to compare with (default: the bundle's own dense twin)",
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", type=Path, help="the bundle's checkpoint: also measure the choice by true mass (PyTorch)"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", type=Path, help="what bilevel route learned for the checkpoint that is named"
    )
    parser.add_argument(
        "--lengths", metavar="N,N", type=_lengths, default=(), help="tokens of a text, as in 1k,4k (default: 1k,2k,4k)"
    )
    parser.add_argument("--tasks", metavar="A,B", default=",".join(TASKS), help="which tasks (default: %(default)s)")
    parser.add_argument("--facts", metavar="N", type=int, help="questions for each task and length (default: 24, quick: 8)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="draws the questions (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer questions, two lengths, less loss")
    parser.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text to hide facts in (default: Python's help topics)")
    parser.add_argument(
        "--floor", metavar="NAME=VALUE", action="append", default=[], help="least value that passes; may be repeated"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the whole report as JSON")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one page with pictures")
    add_backend_options(parser)
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: one per core (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of sizes and hashes")


def _lengths(text: str) -> tuple[int, ...]:
    """``1k,4096`` as numbers."""
    lengths = []
    for part in text.split(","):
        digits = part.strip().lower()
        factor = 1024 if digits.endswith("k") else 1
        digits = digits.removesuffix("k")
        if not digits.isdecimal() or not int(digits):
            raise argparse.ArgumentTypeError(f"{part!r} is no number of tokens; write for example 1k,4096")
        lengths.append(int(digits) * factor)
    return tuple(lengths)


def main(args: argparse.Namespace) -> int:
    """Measure and report; 1 where a floor is missed."""
    request = _request(args)
    for path in (args.json, args.html):
        _check_place(path)
    for name in ("onnxruntime", "tokenizers", "rich"):
        require(name)
    console = require("rich.console").Console(stderr=True)
    with ExitStack() as folders, console.status("starting") as status:
        request = _opened(request, args.adapter, folders, status.update)
        mass = importlib.import_module(MASS_SESSION).open_session if request.checkpoint is not None else None
        report = measure(request, _progress(status.update), mass)
    # The files first: whatever becomes of the terminal, long work is not lost.
    if args.json is not None:
        _write(args.json, report.to_json(indent=1) + "\n")
    if args.html is not None:
        from bilevel.runtime.quality.page import render_page

        _write(args.html, render_page(report))
    from bilevel.runtime.quality.terminal import print_report

    print_report(report)
    return 0 if report.passed else 1


def _request(args: argparse.Namespace) -> Request:
    """What was asked, checked as far as it can be before anything is opened."""
    if args.adapter is not None and args.checkpoint is None and _is_bundle(args.bundle):
        raise RequestError(f"--adapter {args.adapter} belongs to a checkpoint; name the bundle's with --checkpoint DIR")
    if args.checkpoint is not None and not _is_bundle(args.bundle):
        raise RequestError(f"{args.bundle} is a checkpoint itself; leave out --checkpoint {args.checkpoint}")
    tasks = tuple(dict.fromkeys(name.strip() for name in args.tasks.split(",")))
    for name in tasks:
        if name not in TASKS:
            raise RequestError(f"there is no task {name!r}; take {', '.join(TASKS)}")
    facts = args.facts if args.facts is not None else QUICK_FACTS if args.quick else Request.facts
    for name, value, least in (("facts", facts, 1), ("seed", args.seed, 0), ("threads", args.threads, 0)):
        if value < least:
            raise RequestError(f"--{name} {value} must be at least {least}")
    floors = tuple(map(parse_floor, args.floor))
    check_floors(floors, tasks)
    return Request(
        bundle=args.bundle,
        against=args.against,
        checkpoint=args.checkpoint,
        lengths=args.lengths,
        tasks=tasks,
        facts=facts,
        seed=args.seed,
        quick=args.quick,
        text=args.text,
        floors=floors,
        backend=args.backend,
        library=args.library,
        threads=args.threads,
        verify=not args.no_verify,
    )


def _is_bundle(path: Path) -> bool:
    """Whether a path is to be opened as a bundle, if only to say what it lacks: what neither it nor a checkpoint is, too."""
    if path.is_dir():
        return (path / MANIFEST).exists() or not (path / "config.json").exists()
    return not path.is_file() and path.parent.exists()  # else a GGUF file, or organisation/name on the Hub


def _opened(request: Request, adapter: Path | None, folders: ExitStack, on_stage: Callable[[str], None]) -> Request:
    """The request with bundles in the place of checkpoints, and the adapter joined; ``folders`` holds what was made for it."""
    names = dict(request.names)
    joined = f" --adapter {adapter}" if adapter is not None else ""
    if request.checkpoint is not None and adapter is not None:
        checkpoint = folders.enter_context(importlib.import_module(MERGE).merged(adapter, request.checkpoint))
        names[checkpoint] = f"{request.checkpoint}{joined}"
        request = dataclasses.replace(request, checkpoint=checkpoint)
    exported = None if _is_bundle(request.bundle) else importlib.import_module(SUBJECT).exported
    against = request.against
    if exported is not None:
        if against is None and adapter is not None and (adapter / TUNED).exists():
            against = (
                request.bundle
            )  # updates change the weights, so that their own dense twin is not the model there was before
        bundle, checkpoint = folders.enter_context(exported(request.bundle, adapter, on_stage))
        names[bundle] = names[checkpoint] = f"{request.bundle}{joined}"
        request = dataclasses.replace(request, bundle=bundle, checkpoint=checkpoint)
    if against is not None and not _is_bundle(against):
        exported = importlib.import_module(SUBJECT).exported
        dense, _ = folders.enter_context(exported(against, None, on_stage))
        names[dense] = str(against)
        against = dense
    request = dataclasses.replace(request, against=against)
    return dataclasses.replace(request, names=names)


def _check_place(path: Path | None) -> None:
    """Raise RequestError where a file could not be written, before the long work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise RequestError(f"{path} cannot be written: " + ("it is a folder" if path.is_dir() else "its folder is not there"))


def _write(path: Path, text: str) -> None:
    """Write in one step."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _progress(show: Callable[[str], Any]) -> Callable[[str, float, float], None]:
    """Tells what is done and about how long the rest will take."""
    start = time.monotonic()

    def update(what: str, done: float, total: float) -> None:
        elapsed = time.monotonic() - start
        left = f", about {remaining(elapsed, done, total)} left" if done else ""
        show(f"{what} ({done / total:.0%}{left})")

    return update


def remaining(elapsed: float, done: float, total: float) -> str:
    """What is left, at the pace so far, in words."""
    seconds = elapsed * (total - done) / done
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
