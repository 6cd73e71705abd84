"""``bilevel route CHECKPOINT OUT``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilevel.errors import CheckpointError, RequestError, require

_TELL_SECONDS = 10.0  # between lines of a log, where there is no terminal

EPILOG = """\
A dense model reads every earlier word at every step. This command finds out which blocks of words it can leave unread:

  --method bounds   trains nothing. A block's key is the least and the greatest key of its words in every channel, or their
                    mean. Minutes.
  --method gate     trains a small gate in every layer to know which blocks the frozen model attends to (SeerAttention-R).
                    Hours on a CPU; the better choice where few blocks are read.

Both then calibrate: facts are hidden in a long text, and the layers that find them again stay dense, one after the other, as
long as that is worth more than blocks for all others. --share is what a word reads of a context of --context tokens, over all
layers and dense ones included; the number of blocks does not grow with the text, so a smaller share of longer texts is read.

--words puts the word-embedding layer in front of both: it needs no training, and proposes the blocks that share a word's recent
words, rare ones before frequent ones. The layers then choose among its proposals.

OUT is a checkpoint folder, ready for export. With --adapter it holds only what was found and learned, a few megabytes, which
bilevel export CHECKPOINT --adapter OUT BUNDLE joins with the model.

--tune goes on from there: the dense model and the routed one read the same texts of 2,048 tokens, and low-rank updates of the
projections of queries and keys follow the difference between what the two say. They are merged when a checkpoint is written.

The text is Python's standard library, in which facts, lists and copied passages are hidden in many phrasings; --text names
your own instead. Text like what the model is for makes better gates. One part in eight is kept to calibrate and judge.

  bilevel route my-model my-routed-model                               calibration alone
  bilevel route my-model my-adapter --method gate --adapter            gates, a few MB
  bilevel route my-model my-routed-model --method gate --text notes/   on your own text
  bilevel route my-model other --adapter --from my-adapter --share 0.13   the same gates for another budget
  bilevel route my-model tuned --adapter --from my-adapter --tune 60      and a model that is used to them

A run with --method gate or --tune keeps its progress in OUT.work; the same command goes on after a kill, and comes to the same
result as without one, on the same machine and number of threads. With --method gate a row of 4,096 tokens takes 45 MB there (30
layers of 9 heads of 64, blocks of 16).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Turn a dense checkpoint into a routed one, by calibration alone or with gates that are trained."
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the dense model, with tokenizer.json")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--method", choices=("bounds", "gate"), help="how blocks are chosen (default bounds)")
    parser.add_argument(
        "--adapter", action="store_true", help="write only what was found and learned, not the whole checkpoint"
    )
    parser.add_argument(
        "--text", type=Path, action="append", default=[], metavar="PATH", help="a file or folder of text; repeatable"
    )
    parser.add_argument(
        "--share",
        type=float,
        metavar="S",
        help="the most that is read of the context, 0 to 1 (default 0.25, or as with --from)",
    )
    parser.add_argument(
        "--context", type=int, default=4096, metavar="N", help="tokens of the texts to calibrate on (default 4096)"
    )
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens per block (default: calibrated, gates: 16)")
    parser.add_argument(
        "--words",
        type=float,
        metavar="S",
        help="put level 1 in front, which proposes at most this share of the context's blocks by their words alone, as in 0.5",
    )
    parser.add_argument(
        "--key", choices=("mean", "bounds"), help="with --method bounds: this kind of keys (default: calibrated)"
    )
    parser.add_argument(
        "--dense-layers", metavar="LIST", help="layers that stay dense, as in 7,17,18, or none (default: calibrated)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="with --method gate: texts that the teacher reads (default 400)")
    parser.add_argument(
        "--passes", type=int, metavar="N", help="with --method gate: how often the gates learn from each (default 6)"
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="ADAPTER",
        help="start from this adapter's gates and words: nothing is trained, and calibrated only where an option asks for it",
    )
    parser.add_argument(
        "--tune",
        type=int,
        default=0,
        metavar="N",
        help="then teach the routed model to say what the dense one says: N low-rank updates of queries and keys (default 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn by chance (default 0)")
    parser.add_argument(
        "--save-seconds",
        type=float,
        metavar="S",
        help="most seconds of training or tuning that a kill may lose (default 45)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    dense_layers = _check(args)
    for name in ("torch", "safetensors", "tokenizers", "rich"):
        require(name)
    from bilevel.config_json import load_config
    from bilevel.export.route.merge import check_target, write_result
    from bilevel.export.route.run import route, summary
    from bilevel.export.route.source import Options
    from bilevel.export.route.work import Work

    check_target(args.out, args.force, args.checkpoint)
    given = {name: getattr(args, name) for name in ("rows", "passes", "save_seconds") if getattr(args, name) is not None}
    options = Options(
        method=args.method or Options.method,
        text=tuple(args.text),
        share=args.share,
        context=args.context,
        block_size=args.block_size,
        words=args.words,
        dense_layers=dense_layers,
        key=args.key,
        seed=args.seed,
        **given,
        start=args.start,
        tune=args.tune,
    )
    work = args.out.with_name(f"{args.out.name}.work")
    with _progress() as report:
        adapter = route(args.checkpoint, work, options, report)
        write_result(adapter, args.checkpoint, args.out, as_adapter=args.adapter)
    if args.method == "gate" or args.tune:
        Work.remove(work)
    told = summary(adapter, load_config(args.checkpoint))
    print(json.dumps({"out": str(args.out), **told}) if args.json else _text(args, told))
    return 0


def _check(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The layers that are to stay dense; refuses values that cannot be meant. Raises RequestError, CheckpointError."""
    if not args.checkpoint.is_dir():
        raise CheckpointError(
            f"{args.checkpoint} is no folder; give a checkpoint (config.json, model.safetensors, tokenizer.json)"
        )
    if args.share is not None and not 0 < args.share <= 1:
        raise RequestError(f"--share {args.share} must be more than 0 and at most 1, as in 0.25")
    if args.words is not None and not 0 < args.words <= 1:
        raise RequestError(f"--words {args.words} must be more than 0 and at most 1, as in 0.5")
    for name in ("context", "block_size", "rows", "passes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.tune < 0:
        raise RequestError(f"--tune {args.tune} must be a number of texts, or 0 for none")
    if args.start is not None and (args.method is not None or args.key is not None):
        raise RequestError("--from takes the keys of the adapter that it names; leave out --method and --key")
    for name in ("rows", "passes"):
        if getattr(args, name) is not None and args.method != "gate":
            raise RequestError(f"--{name} {getattr(args, name)} belongs to the training of --method gate; leave it out")
    if args.save_seconds is not None and (args.save_seconds < 0 or (args.method != "gate" and not args.tune)):
        raise RequestError(f"--save-seconds {args.save_seconds} must be 0 or more, beside --method gate or --tune")
    if args.method == "gate" and args.key is not None:
        raise RequestError(f"--key {args.key} belongs to --method bounds; leave it out")
    if args.dense_layers is None:
        return None
    try:
        return () if args.dense_layers == "none" else tuple(sorted({int(part) for part in args.dense_layers.split(",")}))
    except ValueError:
        raise RequestError(
            f"--dense-layers {args.dense_layers} must be layers with commas between, as in 7,17,18, or none"
        ) from None


def _text(args: argparse.Namespace, told: dict[str, Any]) -> str:
    from bilevel.export.route.facts import Score

    routing = told["routing"]
    layers = ", ".join(map(str, routing["dense_layers"])) or "none"
    source = f"{args.checkpoint} --adapter {args.out}" if args.adapter else str(args.out)
    chosen = (
        f"{routing['key']} keys, {routing['topk']} blocks of {routing['block_size']} tokens, dense layers: {layers}; "
        f"{100 * told['share']:.1f} % of {told['context']} tokens are read"
    )
    return "\n".join(
        [
            f"wrote {args.out} in {told['seconds']:.0f} s",
            chosen,
            f"dense:  {Score(**told['dense'])}",
            f"routed: {Score(**told['routed'])}",
            f"next: bilevel export {source} my-bundle",
        ]
    )


@contextmanager
def _progress() -> Iterator[Any]:
    """Reports a run's stages, and its long parts with a bar and the time that remains."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from bilevel.export.route.source import Report

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, speed_estimate_period=300, transient=True) as progress:
        task = progress.add_task("starting", total=None, note="")
        current, told = "", -_TELL_SECONDS

        def stage(text: str) -> None:
            nonlocal current, told
            current = ""
            progress.update(task, description=text, total=None, note="")
            if not console.is_terminal and time.monotonic() - told >= _TELL_SECONDS:
                told = time.monotonic()
                console.print(text, highlight=False)

        def advance(what: str, done: int, total: int, note: str) -> None:
            nonlocal current
            if what != current:
                current = what
                progress.reset(task, description=what, total=total, completed=done, note=note)
            progress.update(task, completed=done, note=note)
            if not console.is_terminal and (done == total or done % max(1, total // 20) == 0):
                console.print(f"{what} {done} of {total} {note}", highlight=False)

        yield Report(stage, advance)
