"""``bilevel import MODEL.gguf CHECKPOINT``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from bilevel.errors import CheckpointError, require

EPILOG = """\
MODEL.gguf is a file of llama.cpp, of a model in parts the first (name-00001-of-00003.gguf). CHECKPOINT is the folder to
write, in Hugging Face's format: config.json, model.safetensors, tokenizer.json, tokenizer_config.json with the chat template,
and generation_config.json. The weights are those that llama.cpp computes with: dequantised, not rounded again.

  bilevel import model.gguf my-checkpoint
  bilevel export my-checkpoint my-bundle
  bilevel check my-bundle --against my-checkpoint

bilevel export model.gguf my-bundle does the first two in one go. An import that is interrupted leaves an existing folder as
it was.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Make a checkpoint from a GGUF file: weights, configuration, tokenizer and chat template."
    parser.epilog = EPILOG
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="file of llama.cpp")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace CHECKPOINT if it exists")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="type of the weights (default fp32, which is exact)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if not args.model.is_file():
        raise CheckpointError(f"{args.model} is no file; give the .gguf file to import")
    for name in ("gguf", "tokenizers"):
        require(name)
    from bilevel.export.gguf.convert import import_gguf

    console = require("rich.console").Console(stderr=True)
    started = time.perf_counter()
    with console.status("starting") as status:
        report = import_gguf(args.model, args.checkpoint, dtype=args.dtype, force=args.force, on_stage=status.update)
    seconds = time.perf_counter() - started
    if args.json:
        content = {
            "checkpoint": str(report.path),
            "bytes": report.size_bytes,
            "weights": report.num_weights,
            "types": report.kinds,
        }
        print(json.dumps({**content, "model_type": report.config["model_type"], "seconds": seconds}))
        return 0
    config = report.config
    stored = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    print(f"wrote {report.path} ({report.size_bytes / 1e6:.1f} MB) in {seconds:.1f} s")
    size = f"{config['num_hidden_layers']} layers, {report.num_weights / 1e6:.1f} million weights"
    print(f"{config['model_type']}: {size}, from tensors in {stored}")
    print(f"next: bilevel export {report.path} my-bundle")
    return 0
