"""What smaller weights cost and bring: ``python examples/heldout_loss.py BUNDLE [BUNDLE ...]``, with bundles of one checkpoint.

For each bundle its size, the held-out loss of the example model's text at 512 and 2,048 tokens of context (through the runtime,
every token fed on its own as decode does), and its decode speed at these contexts: the median of steps that the bundles take in
turns. Needs no PyTorch; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import corpus
import numpy as np
from tokenizers import Tokenizer

from bilevel.errors import BilevelError
from bilevel.runtime.backend.onnx import OnnxSession

LENGTHS = (512, 2048)
TIMED_STEPS = 100
TEXT = Path(__file__).parent / "model" / "heldout.txt"


def loss(session: OnnxSession, windows: np.ndarray) -> float:
    """Mean cross entropy (nats per token) over windows int64 [n, L + 1]; all windows are one batch."""
    rows, length = windows.shape[0], windows.shape[1] - 1
    caches = session.allocate(rows, session.bundle.round_up(length))
    total = 0.0
    for step in range(length):
        past = np.full(rows, step, np.int32)
        logits = caches.run(windows[:, step : step + 1], past, np.ones(rows, np.int32)).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        total += float((np.log(np.exp(logits).sum(1)) - logits[np.arange(rows), windows[:, step + 1]]).sum())
    return total / (rows * length)


def step_seconds(sessions: list[OnnxSession], tokens: np.ndarray) -> list[float]:
    """Median seconds of one decode step behind ``tokens`` [L] for each session; the sessions take turns."""
    length, one = len(tokens), np.ones(1, np.int32)
    prompt = tokens[None].astype(np.int64)
    opened = [session.allocate(1, session.bundle.round_up(length + 1)) for session in sessions]
    for caches in opened:
        for first in range(0, length, 512):
            chunk = prompt[:, first : first + 512]
            caches.run(chunk, one * first, one * chunk.shape[1])
    seconds: list[list[float]] = [[] for _ in opened]
    for _ in range(TIMED_STEPS):
        for caches, times in zip(opened, seconds, strict=True):
            started = time.perf_counter()
            caches.run(prompt[:, :1], one * length, one)
            times.append(time.perf_counter() - started)
    return [float(np.median(times)) for times in seconds]


def measure(bundles: list[Path], text: str) -> dict[str, Any]:
    """The report, by bundle."""
    sessions = [OnnxSession.open(bundle) for bundle in bundles]
    tokens = corpus.encode(Tokenizer.from_file(str(bundles[0] / "tokenizer.json")), corpus.split_documents(text))
    report: dict[str, Any] = {}
    for bundle, session in zip(bundles, sessions, strict=True):
        report[str(bundle)] = {
            "weights": session.bundle.weights["format"],
            "bytes": {name: record.num_bytes for name, record in session.bundle.files.items() if name.startswith("model.")},
        }
    for length in LENGTHS:
        speeds = step_seconds(sessions, tokens[:length])
        for bundle, session, seconds in zip(bundles, sessions, speeds, strict=True):
            value = loss(session, corpus.cut(tokens, length))
            report[str(bundle)][str(length)] = {
                "nats_per_token": round(value, 4),
                "decode_tokens_per_second": round(1 / seconds, 1),
            }
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Held-out loss, size and decode speed of bundles of one checkpoint.")
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--text", type=Path, default=TEXT, help="held-out text (default: the example model's)")
    options = parser.parse_args(arguments)
    try:
        report = measure(options.bundles, options.text.read_text(encoding="utf-8"))
    except (BilevelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
