"""``bilevel check BUNDLE --against CHECKPOINT``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bilevel.plugins.errors import BundleError, CheckpointError, RequestError, require

EPILOG = """\
Three judgements, never one number:
  selection     which blocks and experts every router chose. A differing choice is excused only at a near-tie: its distance to
                the cut must lie within the rounding error that the data type and the operands allow.
  computation   with PyTorch's choices forced into the graph, every tensor must agree to 1e-4 of its largest magnitude.
  end to end    the shipped graph on its own: distribution of the next token, greedy text, any cut into calls.

A bundle with int8 or int4 weights is held to the same limits, against PyTorch over weights that are rounded alike and with
MatMulNBits computing in fp32. Two lines more:
  activations   the shipped file also rounds activations to 8 bits: it may lie at most twice as far (KL) from that PyTorch model
                as PyTorch itself does with activations so rounded.
  effect        routes, next token and loss of the shipped file against the checkpoint as it was trained; reported, not judged.

The verdict is recorded in the bundle. Exit status: 0 parity holds, 1 it fails, 2 the check could not run.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Prove that a bundle computes what its checkpoint computes in PyTorch, down to the routes."
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="exported bundle")
    parser.add_argument("--against", type=Path, required=True, metavar="CHECKPOINT", help="the checkpoint it came from")
    parser.add_argument(
        "--data", type=Path, metavar="TEXT", help="UTF-8 text to check on (default: CHECKPOINT/heldout.txt, else random tokens)"
    )
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="how many tokens to check on (default 512)")
    parser.add_argument("--summary", action="store_true", help="print one line per judgement instead of the tables")
    parser.add_argument("--json", action="store_true", help="print the whole report as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if not args.bundle.is_dir():
        raise BundleError(f"{args.bundle} is no folder; make a bundle with: bilevel export {args.against} {args.bundle}")
    if not args.against.is_dir():
        raise CheckpointError(f"{args.against} is no folder; give the checkpoint that the bundle was exported from")
    if args.summary and args.json:
        raise RequestError("--summary and --json exclude each other; give one of them")
    for name in ("torch", "onnx", "onnxruntime", "safetensors", "tokenizers"):
        require(name)
    from bilevel.export.check import check_bundle

    console = require("rich.console").Console(stderr=True)
    with console.status("starting") as status:
        report = check_bundle(
            args.bundle, args.against, data=args.data, tokens=args.tokens, on_stage=lambda stage: status.update(stage)
        )
    if args.json:
        print(json.dumps(report))
    elif args.summary:
        print_summary(report)
    else:
        print_report(report)
    return 0 if report["passed"] else 1


def _mark(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[bold red]FAIL[/bold red]"


def print_summary(report: dict[str, Any]) -> None:
    """One line per judgement."""
    selection, computation, ends = report["selection"], report["computation"], report["end_to_end"]
    rows, excused, wrong = (sum(entry[key] for entry in selection) for key in ("rows", "excused", "unexcused"))
    worst = max(computation, key=lambda entry: entry["error"] / entry["limit"])
    forced, greedy = ends["teacher_forced"], ends["greedy"]
    lines = [
        ("selection", f"{rows} choices of {len(selection)} routers: {wrong} wrong, {excused} excused at a near-tie", selection),
        ("computation", f"largest error {worst['error']:.1e} of the largest magnitude ({worst['name']})", computation),
        (
            "end to end",
            f"KL {forced['kl_mean']:.1e} nats a token, greedy text {greedy['agreed']} of {greedy['tokens']} tokens equal",
            list(ends.values()),
        ),
    ]
    console = require("rich.console").Console()
    _print_attributes(console, report["attributes"])
    for name, text, entries in lines:
        console.print(f"{name:12} {_mark(all(entry['passed'] for entry in entries))}  {text}", highlight=False, soft_wrap=True)
    _print_rounding(console, report)


def print_report(report: dict[str, Any]) -> None:
    """The report as terminal tables, worst news last."""
    console = require("rich.console").Console()
    table = require("rich.table").Table
    data = report["data"]
    console.print(
        f"{report['bundle']} against {report['against']}, {data['tokens']} tokens of {data['source']}", highlight=False
    )
    if report["selection"]:
        selection = table("router", "rows", "same set", "Jaccard", "excused", "wrong", "least margin", "", title="Selection")
        for entry in report["selection"]:
            margin = entry["smallest_margin"]
            selection.add_row(
                entry["name"],
                str(entry["rows"]),
                f"{entry['exact_rate']:.2%}",
                f"{entry['jaccard']:.5f}",
                str(entry["excused"]),
                str(entry["unexcused"]),
                "-" if margin is None else f"{margin:.1e}",
                _mark(entry["passed"]),
            )
        console.print(selection)
    computation = table("tensor", "largest error", "limit", "", title="Computation, PyTorch's choices forced")
    for entry in report["computation"]:
        computation.add_row(entry["name"], f"{entry['error']:.1e}", f"{entry['limit']:.0e}", _mark(entry["passed"]))
    console.print(computation)
    _print_ends(console, table, report["end_to_end"])
    if "effect" in report:
        _print_routes(console, table, report)
    _print_rounding(console, report)
    _print_attributes(console, report["attributes"])
    for entry in report["selection"]:
        if entry["example"]:
            console.print(f"{entry['name']}: {entry['example']}", highlight=False)
    verdict = "[green]parity holds[/green]" if report["passed"] else "[bold red]parity FAILS[/bold red]"
    console.print(f"{verdict} ({report['seconds']:.1f} s)", highlight=False)


def _print_attributes(console: Any, differing: list[dict[str, Any]]) -> None:
    for entry in differing:
        console.print(
            f"[bold red]FAIL[/bold red] {entry['name']}: the node says {entry['attribute']}={entry['graph']}, "
            f"the model means {entry['model']}",
            highlight=False,
        )


def _print_rounding(console: Any, report: dict[str, Any]) -> None:
    """The two lines on int8 or int4 weights; nothing for fp32."""
    if "effect" not in report:
        return
    activations, effect = report["activations"], report["effect"]
    kinds: dict[str, list[float]] = {"level 1": [], "level 2": [], "experts": []}
    for entry in effect["routes"]:
        kinds[next(kind for kind in kinds if entry["name"].endswith(kind))].append(entry["exact_rate"])
    routes = ", ".join(f"{kind} {min(rates):.1%}" for kind, rates in kinds.items() if rates) or "none"
    text = f"8 bits: KL {activations['kl_mean']:.1e} nats, {activations['limit']:.1e} allowed (twice PyTorch's own)"
    console.print(f"{'activations':12} {_mark(activations['passed'])}  {text}", highlight=False, soft_wrap=True)
    console.print(
        f"{'effect':12} of {report['weights']}  loss {effect['loss_before']:.4f} -> {effect['loss_after']:.4f} nats a token, "
        f"KL {effect['kl_mean']:.1e}, same best token {effect['top1_agreement']:.1%}, equal routes at least: {routes}",
        highlight=False,
        soft_wrap=True,
    )


def _print_routes(console: Any, table: Any, report: dict[str, Any]) -> None:
    routes = table(
        "router", "rows", "same set", "Jaccard", title=f"Effect of {report['weights']}: routes against the checkpoint"
    )
    for entry in report["effect"]["routes"]:
        routes.add_row(entry["name"], str(entry["rows"]), f"{entry['exact_rate']:.2%}", f"{entry['jaccard']:.5f}")
    if report["effect"]["routes"]:
        console.print(routes)


def _print_ends(console: Any, table: Any, ends: dict[str, dict[str, Any]]) -> None:
    forced, greedy, chunking = ends["teacher_forced"], ends["greedy"], ends["chunking"]
    rows = table("judgement", "result", "", title="End to end")
    rows.add_row(
        f"next token, {forced['tokens']} steps",
        f"KL {forced['kl_mean']:.1e} nats (max {forced['kl_max']:.1e}), same best token {forced['top1_agreement']:.2%}",
        _mark(forced["passed"]),
    )
    rows.add_row("greedy text", f"{greedy['agreed']} of {greedy['tokens']} tokens equal", _mark(greedy["passed"]))
    rows.add_row(
        "one call or many", f"error {chunking['error']:.1e} (limit {chunking['limit']:.0e})", _mark(chunking["passed"])
    )
    console.print(rows)
