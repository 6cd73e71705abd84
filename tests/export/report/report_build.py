"""A report of a model of any shape in which everything holds. The numbers are invented."""

from __future__ import annotations

import random
import re

from bilevel.export.report.judgements import (
    EndToEnd,
    Greedy,
    Invariant,
    Level,
    Margins,
    RouterResult,
    TeacherForced,
    TensorResult,
    Tolerance,
)
from bilevel.export.report.model import JudgedText, ModelShape, Report, Verdicts, Word
from tests import ROOT

HELD_OUT = ROOT / "examples" / "model" / "heldout.txt"
LIMIT = 1e-4
_BINS = 30
_CALLS = (33, 1, 1, 29, 64, 5, 379)
_ROWS = 1365


def _router(rng: random.Random, name: str, level: Level, layer: int | None, order: int, tolerance: float) -> RouterResult:
    """A router whose margins spread over some decades around 3 %."""
    edges = [round(-7.5 + 8 * i / _BINS, 6) for i in range(_BINS + 1)]
    centre, spread = (-1.2, 0.75) if level == "experts" else (-1.6, 0.85)
    logs = [min(max(rng.gauss(centre, spread), edges[0]), 0.2) for _ in range(_ROWS)]
    counts = [0] * _BINS
    for value in logs:
        counts[min(int((value - edges[0]) / (8 / _BINS)), _BINS - 1)] += 1
    return RouterResult(
        name,
        layer,
        level,
        order,
        operator={1: "CoarseRoute", 2: "FineRoute", "experts": "ExpertRoute"}[level],
        rows=_ROWS,
        exact_rate=1.0,
        jaccard=1.0,
        excused=0,
        unexcused=0,
        smallest_margin=10 ** min(logs),
        margins=Margins(tuple(edges), tuple(counts), sum(10**v < tolerance for v in logs), 0),
        tolerance=Tolerance(tolerance * 0.6, tolerance * 4),
        example="",
        passed=True,
    )


def _tensor(rng: random.Random, layer: int | None, part: str, order: int, lower: bool) -> TensorResult:
    """A tensor whose error grows with the layers; lower: of a precision below fp32, limited by PyTorch's own error."""
    operators = {"attention": "RoutedAttention", "expert output": "RoutedExperts", "experts weights": "ExpertRoute"}
    floor = (4e-4 if lower else 2.5e-7) * (1 + 0.35 * (layer or 0)) * rng.uniform(0.5, 1.5)
    error = (floor if lower else 3e-7 * (1 + 0.35 * (layer or 0))) * rng.uniform(0.4, 1.3)
    name, worst = part if layer is None else f"layer {layer} {part}", rng.choice(["bodies", "CPU kernels"])
    return TensorResult(name, layer, part, order, operators.get(part), error, floor, 2 * floor if lower else LIMIT, worst, True)


def _results(
    rng: random.Random, layers: int, experts: tuple[int, ...], preset: str, lower: bool
) -> tuple[tuple[RouterResult, ...], tuple[TensorResult, ...]]:
    """Routers and tensors of a whole model in graph order."""
    routers: list[RouterResult] = []
    tensors: list[TensorResult] = []

    def compute(layer: int | None, *parts: str) -> None:
        for part in parts:
            tensors.append(_tensor(rng, layer, part, len(routers) + len(tensors), lower))

    def choose(name: str, level: Level, layer: int | None) -> None:
        routers.append(_router(rng, name, level, layer, len(routers) + len(tensors), 2e-3 if lower else 4e-6))

    compute(None, "embedding")
    if preset == "two_level":
        compute(None, "level 1 query", "level 1 block keys")
        choose("level 1", 1, None)
    for layer in range(layers):
        if preset == "dense":
            compute(layer, "keys", "values")
        else:
            compute(layer, "level 2 query", "keys", "values", "level 2 block keys")
            choose(f"layer {layer} level 2", 2, layer)
            compute(layer, "attention")
        if layer in experts:
            compute(layer, "experts logits")
            choose(f"layer {layer} experts", "experts", layer)
            compute(layer, "experts weights", "expert output")
        compute(layer, "output")
    compute(None, "logits")
    return tuple(routers), tuple(tensors)


def _words(rng: random.Random, tokens: int) -> tuple[Word, ...]:
    """The held-out text in pieces about as large as a tokenizer's."""
    text = HELD_OUT.read_text(encoding="utf-8")
    pieces: list[str] = re.findall(r" ?\w{1,6}|\n+|[ \t]+|[^\w\s]{1,2}", text[: tokens * 8])[:tokens]
    return tuple(Word(piece, "same", (), (), 10 ** rng.gauss(-2.6, 0.6) if i > 40 else None) for i, piece in enumerate(pieces))


def _end_to_end(kl: float, floor: float | None, limit: float) -> EndToEnd:
    forced = TeacherForced(4096, kl, (kl * 0.82, kl * 1.21), kl * 40, 1.0, (0.9991, 1.0), floor, None, limit, True)
    greedy = Greedy(8, 256, 256, 1.0, (0.986, 1.0), None if floor is None else 0.98, 0.95, 0, True)
    return EndToEnd(forced, greedy, "95 % bootstrap intervals, 1000 resamples of blocks of 64 consecutive tokens")


INVARIANTS = (
    Invariant("all blocks kept equals dense", True, "topk=16 of 16 blocks: error 4.1e-07, 1e-04 allowed"),
    Invariant("any cut into calls", True, "6 cuts of 512 tokens: error 8.8e-07, 1e-04 allowed"),
    Invariant("the future moves no earlier route", True, "24 later tokens changed: 0 of 4392 routes moved"),
    Invariant(
        "order and repetition of routes", True, "shuffled and repeated indices in 6 layers: the output is equal bit by bit"
    ),
)


def build(
    layers: int = 6,
    experts: tuple[int, ...] = (2, 4),
    *,
    preset: str = "two_level",
    precision: str = "float32",
    tokens: int = 512,
    seed: int = 0,
) -> Report:
    """A report of a model of this shape in which everything holds."""
    rng, lower = random.Random(seed), precision != "float32"
    selection, computation = _results(rng, layers, experts, preset, lower)
    return Report(
        passed=True,
        verdicts=Verdicts(True, True, True, True, True),
        bundle="build/example-bundle",
        against="examples/model",
        model_sha256="6f1c2a9e0b7d4853" * 4,
        checkpoint_sha256="b03e5d77a1942c68" * 4,
        precision=precision,
        weights="fp32",
        backend="ONNX Runtime 1.32.0 on CPU, PyTorch 2.13.0",
        executions=("bodies",) if preset == "dense" else ("bodies", "CPU kernels"),
        model=ModelShape(layers, experts, preset, 32, 8 if preset == "two_level" else None, 4),
        data=JudgedText("examples/model/heldout.txt", tokens, 2, _CALLS),
        structure=(),
        selection=selection,
        computation=computation,
        end_to_end=_end_to_end(*((2.4e-5, 2.1e-5, 4.2e-5) if lower else (2.8e-13, None, 1e-4))),
        invariants=INVARIANTS,
        words=_words(rng, tokens),
        failure=None,
        seconds=41.3,
    )
