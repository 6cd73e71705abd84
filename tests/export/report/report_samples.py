"""Reports as ``bilevel check`` makes them, without running it: six models, passing and failing. The numbers are invented."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from bilevel.export.report.judgements import (
    Activations,
    Effect,
    Greedy,
    Invariant,
    RouteChange,
    RouterResult,
    StructureDifference,
    TensorResult,
)
from bilevel.export.report.model import Failure, Report, SmallestInput, Verdicts, Word
from tests.export.report.report_build import INVARIANTS, build

Item = TypeVar("Item", RouterResult, TensorResult, Invariant)


def changed(items: Iterable[Item], name: str, /, **changes: Any) -> tuple[Item, ...]:
    """The items, the one of this name changed."""
    return tuple(replace(item, **changes) if item.name == name else item for item in items)


def _marked(rng: random.Random, words: tuple[Word, ...], count: int, mark: Callable[[Word], Word]) -> tuple[Word, ...]:
    """The words, ``count`` of those behind the first 64 marked."""
    places = set(rng.sample(range(64, len(words)), count))
    return tuple(mark(word) if place in places else word for place, word in enumerate(words))


def passing() -> Report:
    """fp32, six layers, experts in 2 and 4, everything equal."""
    return build()


WRONG_ROUTER = {
    "exact_rate": 0.8513,
    "jaccard": 0.91147,
    "unexcused": 406,
    "passed": False,
    "example": "bodies, tokens 33..33 row 0: PyTorch alone keeps [2], the graph alone [1]; their scores differ by up to "
    "0.418, 2.31e-06 allowed",
}
FAILURE = Failure(
    name="layer 3 level 2",
    layer=3,
    operator="FineRoute",
    execution="bodies",
    judgement="selection",
    message="with equal operands and candidates the graph keeps other blocks than PyTorch, with margins far above rounding",
    nodes=("layer_3/route/Sub_41", "layer_3/FineRoute"),
    input=SmallestInput(
        token_ids=(281, 17, 904, 33, 12, 1187, 260, 5, 71, 88, 4031) * 6,
        text="import importlib\nimport importlib.machinery\n" * 6,
        calls=(33, 33),
        row_position=65,
    ),
    difference="PyTorch keeps blocks [0, 2], the graph [0, 1]; their scores differ by 0.418, 2.31e-06 allowed",
    outliers="",
)


def failing() -> Report:
    """A block index of layer 3 is off by one: its choice is wrong, and every tensor after it; the logits are not finite."""
    report, rng = build(seed=1), random.Random(1)
    start = next(router.order for router in report.selection if router.name == FAILURE.name)
    computation = tuple(
        replace(tensor, error=math.inf if tensor.part == "logits" else rng.uniform(0.02, 0.6), passed=False)
        if tensor.order > start
        else tensor
        for tensor in report.computation
    )
    forced, greedy = report.end_to_end.teacher_forced, report.end_to_end.greedy
    forced = replace(forced, kl_mean=0.182, kl_interval=(0.149, 0.224), kl_max=4.1, passed=False)
    return replace(
        report,
        passed=False,
        verdicts=Verdicts(True, False, False, False, False),
        selection=changed(report.selection, FAILURE.name, **WRONG_ROUTER),
        computation=computation,
        end_to_end=replace(
            report.end_to_end,
            teacher_forced=replace(forced, top1_agreement=0.861, top1_interval=(0.848, 0.874)),
            greedy=replace(greedy, agreed=91, agreement=91 / 256, interval=(0.27, 0.45), excused=1, passed=False),
        ),
        invariants=changed(
            report.invariants, "any cut into calls", passed=False, detail="cuts of 1 and 33 tokens: error 0.31, 1e-04 allowed"
        ),
        words=_marked(
            rng,
            report.words,
            58,
            lambda word: replace(word, state="wrong", wrong=(FAILURE.name,), margin=10 ** rng.gauss(-1.5, 0.5)),
        ),
        failure=FAILURE,
    )


def lower_precision() -> Report:
    """fp16: near-ties flip and are excused, errors lie near PyTorch's own."""
    report, rng = build(precision="float16", seed=2), random.Random(2)

    def flipped(router: RouterResult) -> RouterResult:
        rows, ties = rng.randrange(0, 9), rng.randrange(0, 3)
        equal, jaccard = 1 - rows / router.rows, 1 - rows / 3 / router.rows
        margins = replace(router.margins, ties=ties)
        return replace(router, excused=2 * rows, exact_rate=equal, jaccard=jaccard, margins=margins)

    selection = tuple(map(flipped, report.selection))
    names = [router.name for router in selection if router.excused]

    def excused(word: Word) -> Word:
        routers = tuple(rng.sample(names, rng.choice([1, 1, 2])))
        return replace(word, state="excused", excused=routers, margin=10 ** rng.gauss(-4, 0.4))

    forced, greedy = report.end_to_end.teacher_forced, report.end_to_end.greedy
    return replace(
        report,
        selection=selection,
        words=_marked(rng, report.words, 37, excused),
        end_to_end=replace(
            report.end_to_end,
            teacher_forced=replace(forced, top1_agreement=0.9976, top1_interval=(0.9958, 0.9988)),
            greedy=replace(greedy, agreed=249, agreement=249 / 256, interval=(0.94, 0.99), excused=1),
        ),
    )


def small_weights() -> Report:
    """int4 weights: judged against PyTorch with the same rounding; the effect against the checkpoint is reported."""
    report, rng = build(seed=3), random.Random(3)
    routes = tuple(
        RouteChange(router.name, router.rows, 1.0, 1.0)
        if router.level == 1
        else RouteChange(router.name, router.rows, rng.uniform(0.943, 0.985), rng.uniform(0.97, 0.993))
        for router in report.selection
    )
    return replace(
        report,
        weights="int4",
        verdicts=replace(report.verdicts, activations=True),
        activations=Activations(512, 3.1e-4, 2.7e-4, 5.4e-4, True),
        effect=Effect(512, 0.0121, 0.936, 4.1869, 4.1907, routes),
    )


def deep(layers: int = 48) -> Report:
    """Many layers, experts in every second one, 4,096 words."""
    return build(layers, tuple(range(1, layers, 2)), tokens=4096, seed=4)


def dense() -> Report:
    """No routers: nothing to choose, everything to compute."""
    report = build(4, (), preset="dense", seed=5)
    return replace(report, invariants=INVARIANTS[:2], words=tuple(replace(word, margin=None) for word in report.words))


def unreadable_structure() -> Report:
    """A graph that lacks nodes: nothing else could be judged."""
    report = build(seed=6)
    forced = replace(report.end_to_end.teacher_forced, kl_mean=math.nan, kl_interval=(math.nan, math.nan), kl_max=math.inf)
    return replace(
        report,
        passed=False,
        verdicts=Verdicts(False, False, False, False, False),
        structure=(
            StructureDifference("layer 2 experts", "ExpertRoute", None, "no node", "one node"),
            StructureDifference("layer 3 level 2", "FineRoute", "topk", 3, 4),
        ),
        selection=(),
        computation=(),
        words=(),
        invariants=(),
        end_to_end=replace(
            report.end_to_end,
            teacher_forced=replace(forced, passed=False),
            greedy=Greedy(0, 0, 0, 0.0, (0.0, 0.0), None, 0.95, 0, False),
        ),
    )


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
    fixed = ("level", "precision", "weights", "state", "operator", "part", "model_sha256", "checkpoint_sha256", "judgement")

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poison(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        return f"{value} {HOSTILE}" if isinstance(value, str) and key not in fixed else value

    return Report.from_json(json.dumps(poison(failing().to_dict())))


ALL: dict[str, Callable[[], Report]] = {**SAMPLES, "hostile": hostile}
