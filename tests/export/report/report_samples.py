"""Reports as ``bilevel check`` makes them, without running it: six models, passing and failing. The numbers are invented."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

from tests import ROOT

Report = dict[str, Any]
HELD_OUT = ROOT / "examples" / "model" / "heldout.txt"
LIMIT = 1e-4
_BINS = 30
_CALLS = [33, 1, 1, 29, 64, 5, 379]


def _selection(rng: random.Random, name: str, level: Any, layer: int | None, order: int, rows: int, tolerance: float) -> Report:
    """A router whose margins spread over some decades around 3 %."""
    edges = [round(-7.5 + 8 * i / _BINS, 6) for i in range(_BINS + 1)]
    centre, spread = (-1.2, 0.75) if level == "experts" else (-1.6, 0.85)
    logs = [min(max(rng.gauss(centre, spread), edges[0]), 0.2) for _ in range(rows)]
    counts = [0] * _BINS
    for value in logs:
        counts[min(int((value - edges[0]) / (8 / _BINS)), _BINS - 1)] += 1
    return {
        "name": name,
        "layer": layer,
        "level": level,
        "order": order,
        "operator": "ExpertRoute" if level == "experts" else "CoarseRoute" if level == 1 else "FineRoute",
        "rows": rows,
        "exact_rate": 1.0,
        "jaccard": 1.0,
        "excused": 0,
        "unexcused": 0,
        "smallest_margin": 10 ** min(logs),
        "margins": {"edges": edges, "counts": counts, "fragile": sum(10**v < tolerance for v in logs), "ties": 0},
        "tolerance": {"median": tolerance * 0.6, "largest": tolerance * 4},
        "example": "",
        "passed": True,
    }


def _computation(
    rng: random.Random, layer: int | None, part: str, order: int, floor: float | None, limit: float | None, scale: float
) -> Report:
    operators = {"attention": "RoutedAttention", "expert output": "RoutedExperts", "experts weights": "ExpertRoute"}
    own = None if floor is None else floor * scale * rng.uniform(0.5, 1.5)
    error = (own if limit is None and own else 3e-7 * scale) * rng.uniform(0.4, 1.3)
    return {
        "name": part if layer is None else f"layer {layer} {part}",
        "layer": layer,
        "part": part,
        "order": order,
        "operator": operators.get(part),
        "error": error,
        "floor": own,
        "limit": limit if limit is not None else 2 * (own or LIMIT),
        "worst": rng.choice(["bodies", "CPU kernels"]),
        "passed": True,
    }


def _judgements(
    rng: random.Random, layers: int, experts: tuple[int, ...], preset: str, rows: int, floor: float, lower: bool
) -> tuple[list[Report], list[Report]]:
    """Routers and tensors of a whole model in graph order."""
    selection: list[Report] = []
    computation: list[Report] = []
    tolerance = 2e-3 if lower else 4e-6

    def tensor(layer: int | None, part: str) -> None:
        scale = 1 + (0 if layer is None else layer) * 0.35
        order = len(selection) + len(computation)
        computation.append(_computation(rng, layer, part, order, floor, None if lower else LIMIT, scale))

    def router(name: str, level: Any, layer: int | None) -> None:
        order = len(selection) + len(computation)
        selection.append(_selection(rng, name, level, layer, order, rows, tolerance))

    tensor(None, "embedding")
    if preset == "two_level":
        tensor(None, "level 1 query")
        tensor(None, "level 1 block keys")
        router("level 1", 1, None)
    for layer in range(layers):
        routed = preset != "dense"
        for part in ("level 2 query", "keys", "values", "level 2 block keys") if routed else ("keys", "values"):
            tensor(layer, part)
        if routed:
            router(f"layer {layer} level 2", 2, layer)
            tensor(layer, "attention")
        if layer in experts:
            tensor(layer, "experts logits")
            router(f"layer {layer} experts", "experts", layer)
            tensor(layer, "experts weights")
            tensor(layer, "expert output")
        tensor(layer, "output")
    tensor(None, "logits")
    return selection, computation


def _words(rng: random.Random, tokens: int) -> list[Report]:
    """The held-out text in pieces about as large as a tokenizer's."""
    text = HELD_OUT.read_text(encoding="utf-8")
    pieces: list[str] = re.findall(r" ?\w{1,6}|\n+|[ \t]+|[^\w\s]{1,2}", text[: tokens * 8])[:tokens]
    return [
        {"text": piece, "state": "same", "excused": [], "wrong": [], "margin": 10 ** rng.gauss(-2.6, 0.6) if i > 40 else None}
        for i, piece in enumerate(pieces)
    ]


def _end_to_end(kl: float, floor: float | None, limit: float) -> Report:
    return {
        "teacher_forced": {
            "tokens": 4096,
            "kl_mean": kl,
            "kl_interval": [kl * 0.82, kl * 1.21],
            "kl_max": kl * 40,
            "top1_agreement": 1.0,
            "top1_interval": [0.9991, 1.0],
            "floor_kl": floor,
            "kl_same_choices": None,
            "limit": limit,
            "passed": True,
        },
        "greedy": {
            "rows": 8,
            "tokens": 256,
            "agreed": 256,
            "agreement": 1.0,
            "interval": [0.986, 1.0],
            "floor": None if floor is None else 0.98,
            "limit": 0.95,
            "excused": 0,
            "passed": True,
        },
        "method": "95 % bootstrap intervals, 1000 resamples of blocks of 64 consecutive tokens",
    }


def _invariants() -> list[Report]:
    return [
        {
            "name": "all blocks kept equals dense",
            "passed": True,
            "detail": "topk=16 of 16 blocks: error 4.1e-07, 1e-04 allowed",
        },
        {"name": "any cut into calls", "passed": True, "detail": "6 cuts of 512 tokens: error 8.8e-07, 1e-04 allowed"},
        {
            "name": "the future moves no earlier route",
            "passed": True,
            "detail": "24 later tokens changed: 0 of 4392 routes moved",
        },
        {
            "name": "order and repetition of routes",
            "passed": True,
            "detail": "shuffled and repeated indices in 6 layers: the output is equal bit by bit",
        },
    ]


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
    selection, computation = _judgements(rng, layers, experts, preset, 1365, 4e-4 if lower else 2.5e-7, lower)
    return {
        "schema": 2,
        "passed": True,
        "verdicts": dict.fromkeys(("structure", "selection", "computation", "end_to_end", "invariants"), True),
        "bundle": "build/example-bundle",
        "against": "examples/model",
        "model_sha256": "6f1c2a9e0b7d4853" * 4,
        "checkpoint_sha256": "b03e5d77a1942c68" * 4,
        "precision": precision,
        "weights": "fp32",
        "backend": "ONNX Runtime 1.32.0 on CPU, PyTorch 2.13.0",
        "executions": ["bodies"] if preset == "dense" else ["bodies", "CPU kernels"],
        "model": {
            "layers": layers,
            "expert_layers": list(experts),
            "preset": preset,
            "block_size": 32,
            "coarse_topk": 8 if preset == "two_level" else None,
            "topk": 4,
        },
        "data": {"source": "examples/model/heldout.txt", "tokens": tokens, "rows": 2, "calls": list(_CALLS)},
        "structure": [],
        "selection": selection,
        "computation": computation,
        "end_to_end": _end_to_end(*((2.4e-5, 2.1e-5, 4.2e-5) if lower else (2.8e-13, None, 1e-4))),
        "invariants": _invariants(),
        "words": _words(rng, tokens),
        "failure": None,
        "seconds": 41.3,
    }


def _mark_word(word: Report, state: str, router: str, margin: float) -> None:
    word["state"], word["margin"] = state, margin
    word[state].append(router)


def passing() -> Report:
    """fp32, six layers, experts in 2 and 4, everything equal."""
    return build()


def failing() -> Report:
    """A block index of layer 3 is off by one: its choice is wrong, and every tensor after it."""
    report, rng = build(seed=1), random.Random(1)
    report["passed"] = False
    report["verdicts"] |= {"selection": False, "computation": False, "end_to_end": False, "invariants": False}
    router = next(entry for entry in report["selection"] if entry["name"] == "layer 3 level 2")
    router |= {
        "exact_rate": 0.8513,
        "jaccard": 0.91147,
        "unexcused": 406,
        "passed": False,
        "example": "bodies, tokens 33..33 row 0: PyTorch alone keeps [2], the graph alone [1]; their scores differ by up to "
        "0.418, 2.31e-06 allowed",
    }
    for entry in report["computation"]:
        if entry["order"] > router["order"]:
            entry["error"] = rng.uniform(0.02, 0.6)
            entry["passed"] = False
    report["computation"][-1]["error"] = math.inf
    report["end_to_end"]["teacher_forced"] |= {
        "kl_mean": 0.182,
        "kl_interval": [0.149, 0.224],
        "kl_max": 4.1,
        "top1_agreement": 0.861,
        "top1_interval": [0.848, 0.874],
        "passed": False,
    }
    report["end_to_end"]["greedy"] |= {
        "agreed": 91,
        "agreement": 91 / 256,
        "interval": [0.27, 0.45],
        "excused": 1,
        "passed": False,
    }
    report["invariants"][1] |= {"passed": False, "detail": "cuts of 1 and 33 tokens: error 0.31, 1e-04 allowed"}
    for word in rng.sample(report["words"][64:], 58):
        _mark_word(word, "wrong", "layer 3 level 2", 10 ** rng.gauss(-1.5, 0.5))
    report["failure"] = {
        "name": "layer 3 level 2",
        "layer": 3,
        "operator": "FineRoute",
        "execution": "bodies",
        "judgement": "selection",
        "message": "with equal operands and candidates the graph keeps other blocks than PyTorch, with margins far above rounding",
        "nodes": ["layer_3/route/Sub_41", "layer_3/FineRoute"],
        "input": {
            "token_ids": [281, 17, 904, 33, 12, 1187, 260, 5, 71, 88, 4031] * 6,
            "text": "import importlib\nimport importlib.machinery\n" * 6,
            "calls": [33, 33],
            "row_position": 65,
        },
        "outliers": "",
        "difference": "PyTorch keeps blocks [0, 2], the graph [0, 1]; their scores differ by 0.418, 2.31e-06 allowed",
    }
    return report


def lower_precision() -> Report:
    """fp16: near-ties flip and are excused, errors lie near PyTorch's own."""
    report, rng = build(precision="float16", seed=2), random.Random(2)
    for entry in report["selection"]:
        entry["excused"] = 2 * rng.randrange(0, 9)
        entry["exact_rate"] = 1 - entry["excused"] / 2 / entry["rows"]
        entry["jaccard"] = 1 - entry["excused"] / 6 / entry["rows"]
        entry["margins"]["ties"] = rng.randrange(0, 3)
    names = [entry["name"] for entry in report["selection"] if entry["excused"]]
    for word in rng.sample(report["words"][64:], 37):
        for name in rng.sample(names, rng.choice([1, 1, 2])):
            _mark_word(word, "excused", name, 10 ** rng.gauss(-4, 0.4))
    report["end_to_end"]["teacher_forced"] |= {"top1_agreement": 0.9976, "top1_interval": [0.9958, 0.9988]}
    report["end_to_end"]["greedy"] |= {"agreed": 249, "agreement": 249 / 256, "interval": [0.94, 0.99], "excused": 1}
    return report


def small_weights() -> Report:
    """int4 weights: judged against PyTorch with the same rounding; the effect against the checkpoint is reported."""
    report, rng = build(seed=3), random.Random(3)
    report["weights"] = "int4"
    report["verdicts"]["activations"] = True
    report["activations"] = {"tokens": 512, "kl_mean": 3.1e-4, "pytorch_kl_mean": 2.7e-4, "limit": 5.4e-4, "passed": True}
    routes = [
        {
            "name": entry["name"],
            "rows": entry["rows"],
            "exact_rate": 1.0 if entry["level"] == 1 else rng.uniform(0.943, 0.985),
            "jaccard": 1.0 if entry["level"] == 1 else rng.uniform(0.97, 0.993),
        }
        for entry in report["selection"]
    ]
    report["effect"] = {
        "tokens": 512,
        "kl_mean": 0.0121,
        "top1_agreement": 0.936,
        "loss_before": 4.1869,
        "loss_after": 4.1907,
        "routes": routes,
    }
    return report


def deep(layers: int = 48) -> Report:
    """Many layers, experts in every second one, 4,096 words."""
    return build(layers, tuple(range(1, layers, 2)), tokens=4096, seed=4)


def dense() -> Report:
    """No routers: nothing to choose, everything to compute."""
    report = build(4, (), preset="dense", seed=5)
    report["invariants"] = report["invariants"][:2]
    for word in report["words"]:
        word["margin"] = None
    return report


def unreadable_structure() -> Report:
    """A graph that lacks nodes: nothing else could be judged."""
    report = build(seed=6)
    report |= {"passed": False, "selection": [], "computation": [], "words": [], "invariants": []}
    report["verdicts"] = dict.fromkeys(report["verdicts"], False)
    report["structure"] = [
        {"name": "layer 2 experts", "operator": "ExpertRoute", "attribute": None, "graph": "no node", "model": "one node"},
        {"name": "layer 3 level 2", "operator": "FineRoute", "attribute": "topk", "graph": 3, "model": 4},
    ]
    ends = report["end_to_end"]
    ends["teacher_forced"] |= {"kl_mean": math.nan, "kl_interval": [None, None], "kl_max": None, "passed": False}
    ends["greedy"] |= {"rows": 0, "tokens": 0, "agreed": 0, "agreement": 0.0, "interval": [0.0, 0.0], "passed": False}
    return report


SAMPLES: dict[str, Callable[[], Report]] = {
    "passing": passing,
    "failing": failing,
    "lower_precision": lower_precision,
    "small_weights": small_weights,
    "deep": deep,
    "dense": dense,
    "unreadable_structure": unreadable_structure,
}

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}\x1b[31m\u202e[bold]"


def hostile() -> Report:
    """Every free text of a failing report is an attack on whoever shows it."""
    report = failing()

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poison(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        fixed = ("level", "precision", "weights", "state", "operator", "part", "model_sha256", "checkpoint_sha256", "judgement")
        return f"{value} {HOSTILE}" if isinstance(value, str) and key not in fixed else value

    return {**poison(report), "data": poison(report["data"])}


ALL: dict[str, Callable[[], Report]] = {**SAMPLES, "hostile": hostile}


def as_read(report: Report) -> Report:
    """The report as ``report.json`` gives it back."""
    from bilevel.export.report.folder import report_json

    return dict(json.loads(report_json(report)))
