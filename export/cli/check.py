"""``bilevel check BUNDLE --against CHECKPOINT``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bilevel.errors import BundleError, CheckpointError, RequestError, require
from bilevel.export.graph.precision import PRECISIONS

EPILOG = """\
Three judgements, never one number, and the invariants:
  selection     which blocks and experts every router chose. A differing choice is excused only at a near-tie: its distance to
                the cut must lie within the rounding error that the data type and the operands allow.
  computation   every part of the graph, fed PyTorch's hidden state and choices, against PyTorch in fp64: fp32 to 1e-4 of the
                largest magnitude; fp16 and bf16 to twice the error that plain PyTorch makes in that precision.
  end to end    the shipped graph on its own: distribution of the next token and greedy text, with intervals.
  invariants    any cut into calls, all blocks kept equals dense, the future moves no earlier route, order and repetition of
                routes.

A bundle with int8 or int4 weights is held to the same limits, against PyTorch over weights that are rounded alike and with
MatMulNBits computing in fp32. Two lines more:
  activations   the shipped file also rounds activations to 8 bits: it may lie at most twice as far (KL) from that PyTorch model
                as PyTorch itself does with activations so rounded.
  effect        routes, next token and loss of the shipped file against the checkpoint as it was trained; reported, not judged.

Where something fails, the report names the first layer and operator and the smallest input that shows it. PyTorch and the graph
are compared part by part, so that memory holds one part of the model at a time.

  bilevel check my-bundle --against my-checkpoint                    tables
  bilevel check my-bundle --against my-checkpoint --report parity    also a page, parity/index.html, and report.json
  bilevel check my-bundle --against my-checkpoint --tokens 512       a quick look
  bilevel check my-bundle --against my-checkpoint --adapter DIR      a bundle of bilevel export --adapter

The verdict is recorded in the bundle. Exit status: 0 parity holds, 1 it fails, 2 the check could not run.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Prove that a bundle computes what its checkpoint computes in PyTorch, down to the routes."
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="exported bundle")
    parser.add_argument("--against", type=Path, required=True, metavar="CHECKPOINT", help="the checkpoint it came from")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter that it was exported with")
    parser.add_argument(
        "--data", type=Path, metavar="TEXT", help="UTF-8 text to check on (default: CHECKPOINT/heldout.txt, else random tokens)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of the first of two rows (default: rows of up to 2560, 4096 tokens in all)",
    )
    parser.add_argument(
        "--backend",
        choices=("all", "portable", "kernels"),
        default="all",
        help="what runs the routed operators: their portable bodies, the CPU kernels, or both (default)",
    )
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="refuse a bundle of another precision")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write index.html and report.json there")
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
    for name in ("torch", "onnx", "onnxruntime", "safetensors", "tokenizers", "polygraphy", "jinja2"):
        require(name)
    from bilevel.bundle.manifest import open_manifest
    from bilevel.export.check.parity import check_bundle
    from bilevel.export.report.write import check_report_folder, write_report
    from bilevel.export.route.merge import merged

    if args.report is not None:
        check_report_folder(args.report)
    ignored = open_manifest(args.bundle).get("ignored_keys", list, default=[]) if args.adapter is not None else []
    console = require("rich.console").Console(stderr=True)
    with console.status("starting") as status, merged(args.adapter, args.against, ignored) as checkpoint:
        report = check_bundle(
            args.bundle,
            checkpoint,
            data=args.data,
            tokens=args.tokens,
            backend=args.backend,
            precision=PRECISIONS[args.precision] if args.precision else None,
            on_stage=lambda stage: status.update(stage),
            on_remark=lambda remark: console.print(remark, style="yellow", markup=False, highlight=False, soft_wrap=True),
        )
    if args.report is not None:
        page = write_report(report, args.report)
        console.print(f"report written to {page}", highlight=False, soft_wrap=True)
    if args.json:
        print(report.to_json())
    else:
        from bilevel.export.report.terminal import print_report, print_summary

        (print_summary if args.summary else print_report)(report)
    return 0 if report.passed else 1
