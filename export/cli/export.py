"""``bilevel export CHECKPOINT BUNDLE``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from bilevel.errors import require
from bilevel.export.decoder.source import checkpoint_folder
from bilevel.export.graph.precision import PRECISIONS, check_precision, stored_caches

EPILOG = """\
CHECKPOINT is a Hugging Face folder (config.json, weights, tokenizer.json) of a family in bilevel/families (Llama, Qwen,
Mistral, SmolLM, Granite, MiniCPM, Phi-3, OLMoE, GLM-4.5, Ling, ...) as it is, or with a "routing" section in its config.json.
It may also be a GGUF file of llama.cpp (see bilevel import), or a model's name on the Hugging Face Hub (organisation/name),
which is taken from the local cache or downloaded. BUNDLE is the folder to write. A key of config.json that is not known is
refused, since it may change the result; --ignore-key passes over it.

  bilevel export my-model my-bundle
  bilevel check my-bundle --against my-model
  bilevel run my-bundle "Once upon a time"

--weights int8 and int4 make matrix products and experts smaller (32 weights share a scale) and faster on a CPU, through
ONNX Runtime's MatMulNBits and our own kernels. Routers, expert gates and norms stay in fp32. bilevel check
then compares with PyTorch over the same rounded weights, and reports apart from that what the rounding changed.

--precision fp16 and bf16 store weights, activations and caches in 16 bits, for devices that compute in them (TensorRT takes the
graph as it is). Routers' scores and expert gates' logits stay fp32, and so do the sums inside softmax and norms. ONNX Runtime's
CPU provider runs fp16 by casting, slower than fp32, and bf16 not at all.

--kv int8 and int4 pack the keys and values that a row remembers: about a quarter, or a seventh, of the memory of long contexts.
Block keys are pooled from what was packed and stay fp32. bilevel check reports what that changes.

--adapter joins a dense CHECKPOINT with what bilevel route learned for it, or with the released gates of SeerAttention-R.

An export that is interrupted leaves an existing bundle as it was.
"""

UNTRAINED = (
    "warning: unless {checkpoint} was trained with the routing section of its config.json, it forgets what was said far above "
    "(SmolLM2-135M with 8 of 64 blocks in every layer: 1 to 3 of 32 hidden facts, dense 26); "
    "bilevel route {checkpoint} OUT chooses dense layers and keys that remember it"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Export a PyTorch checkpoint to a bundle: one ONNX file that runs with or without TensorRT plugins."
    parser.epilog = EPILOG
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the trained model, .gguf file, or name on the Hub"
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it exists")
    parser.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="tokens the runtime prefills per call (default 512)"
    )
    parser.add_argument(
        "--weights",
        default="fp32",
        metavar="FORMAT",
        help="fp32, int8 or int4 (default fp32); int8 and int4 need ONNX Runtime on the device, TensorRT cannot read them",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        metavar="TYPE",
        help="fp32, fp16 or bf16 (default fp32): the type of weights, activations and caches; not together with --weights",
    )
    parser.add_argument(
        "--kv",
        metavar="FORMAT",
        help="how keys and values are cached: int8 or int4, which need ONNX Runtime on the device, or as the model's own type "
        "(default), which fp32, fp16 and bf16 name",
    )
    parser.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="NAME",
        help="pass over this unknown key of config.json, which does not change the result; repeatable, recorded in the bundle",
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="folder of bilevel route --adapter, or of SeerAttention-R's gates, to join"
    )
    parser.add_argument(
        "--triton-repository",
        type=Path,
        metavar="DIR",
        help="also write a model repository of Triton Inference Server into DIR",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    caches = stored_caches(args.kv, args.precision)
    check_precision(args.precision, args.weights, caches)
    for name in ("torch", "onnx", "onnxscript", "safetensors"):
        require(name)
    from bilevel.export.decoder.bundle import check_target, export_bundle
    from bilevel.export.graph.quantise import describe
    from bilevel.export.route.merge import is_untrained, merged

    console = require("rich.console").Console(stderr=True)
    started = time.perf_counter()
    check_target(args.bundle, args.force)  # before a model is imported or downloaded
    with (
        console.status("starting") as status,
        checkpoint_folder(args.checkpoint, args.bundle, status.update) as checkpoint,
        merged(args.adapter, checkpoint, args.ignore_key) as routed,
    ):
        report = export_bundle(
            routed,
            args.bundle,
            force=args.force,
            prefill_chunk=args.prefill_chunk,
            weights=args.weights,
            precision=args.precision,
            caches=caches,
            ignore_keys=args.ignore_key,
            on_stage=status.update,
        )
        if args.adapter is None and is_untrained(routed):
            console.print(UNTRAINED.format(checkpoint=args.checkpoint), style="yellow", markup=False, soft_wrap=True)
        repository = None
        if args.triton_repository is not None:
            from bilevel.export.decoder.triton_repository import write_repository

            status.update("writing the model repository")
            repository = write_repository(report.path, args.triton_repository)
    seconds = time.perf_counter() - started
    if args.json:
        content = {"bundle": str(report.path), "bytes": report.size_bytes, "operators": report.operators}
        formats = {"precision": PRECISIONS[args.precision], "weights": report.weights, "caches": caches}
        place = {} if repository is None else {"triton_repository": str(repository)}
        print(json.dumps({**content, **formats, **place, "seconds": seconds}))
        return 0
    nodes = ", ".join(f"{count} {name}" for name, count in report.operators.items()) or "none (a dense model)"
    print(f"wrote {report.path} ({report.size_bytes / 1e6:.1f} MB) in {seconds:.1f} s")
    print(f"routed nodes: {nodes}")
    if args.precision != "fp32":
        print(f"weights, activations and caches: {PRECISIONS[args.precision]}")
    if args.weights != "fp32":
        print(f"weights: {describe(report.weights)}")
    if caches != "fp32":
        print(f"keys and values: cached in {caches}")
    if repository is not None:
        print(f"Triton Inference Server's model: {repository}")
    if args.checkpoint.is_file():
        print(f"next: bilevel import {args.checkpoint} my-checkpoint, and bilevel check {report.path} --against my-checkpoint")
    else:
        adapter = "" if args.adapter is None else f" --adapter {args.adapter}"
        print(f"next: bilevel check {report.path} --against {checkpoint}{adapter}")
    return 0
