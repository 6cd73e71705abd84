"""From the scores of tokens to the report's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle
from bilevel.runtime.quality import reader
from bilevel.runtime.quality.exams import LOSS, Exam
from bilevel.runtime.quality.model import (
    DENSE,
    MASS,
    ROUTED,
    WINDOW,
    Answer,
    LayerRecall,
    LossPlace,
    LossResult,
    Reading,
    Recall,
    Score,
    TaskResult,
)
from bilevel.runtime.quality.statistics import Interval, bootstrap, difference_interval, mean_interval, wilson

Outcome = list[list[reader.TokenScore]]  # of one exam: of every question, of every token of its answer
Outcomes = Mapping[str, Sequence[Outcome]]  # side -> of every exam
FAR = 0.1  # nats by which dense beats sink + window on a token for which the far text matters


def answers(exams: Sequence[Exam], outcomes: Outcomes) -> tuple[Answer, ...]:
    """Every question of every exam but those of the loss."""
    rows: list[Answer] = []
    texts: dict[tuple[str, int], int] = {}
    for index, exam in enumerate(exams):
        if exam.task == LOSS:
            continue
        text = texts[exam.task, exam.length] = texts.get((exam.task, exam.length), -1) + 1
        for place, question in enumerate(exam.questions):
            scores = [outcome[index][place] for outcome in outcomes.values()]
            rows.append(
                Answer(
                    exam.task,
                    exam.length,
                    text,
                    min(max(question.depth, 0.0), 1.0),
                    len(question.answer),
                    tuple(outcomes),
                    tuple(all(token.best for token in each) for each in scores),
                    tuple(_mean([float(token.best) for token in each]) for each in scores),
                    tuple(_mean([token.nats for token in each]) for each in scores),
                )
            )
    return tuple(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def task_results(exams: Sequence[Exam], outcomes: Outcomes) -> tuple[TaskResult, ...]:
    """Every task at every length."""
    groups: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers(exams, outcomes):
        groups.setdefault((answer.task, answer.length), []).append(answer)
    sides = tuple(outcomes)
    return tuple(
        TaskResult(task, length, len(group), tuple(_score(group, side, sides) for side in sides))
        for (task, length), group in groups.items()
    )


def column(group: Sequence[Answer], side: str, name: str) -> list[float]:
    """One side's values of a field of the answers; infinite where there is None."""
    return [
        math.inf if (value := getattr(answer, name)[answer.sides.index(side)]) is None else float(value) for answer in group
    ]


def _score(group: Sequence[Answer], side: str, sides: Sequence[str]) -> Score:
    exact, nats = int(sum(column(group, side, "exact"))), column(group, side, "nats")
    above: float | None = None
    above_interval: Interval | None = None
    if DENSE in sides and side != DENSE:
        dense = column(group, DENSE, "nats")
        above, above_interval = _mean(nats) - _mean(dense), difference_interval(nats, dense)
    return Score(
        side,
        exact,
        exact / len(group),
        wilson(exact, len(group)),
        _mean(column(group, side, "right")),
        _mean(nats),
        mean_interval(nats),
        above,
        above_interval,
    )


def loss_result(exams: Sequence[Exam], outcomes: Outcomes) -> LossResult | None:
    """The loss on plain text; None where none was read."""
    texts = [index for index, exam in enumerate(exams) if exam.task == LOSS]
    if not texts:
        return None
    sides = tuple(outcomes)
    # [texts, stretches, tokens, sides]: all texts are cut alike.
    nats = np.array(
        [
            [[[t.nats for t in outcomes[s][text][place]] for s in sides] for place in range(_places(exams, text))]
            for text in texts
        ]
    ).transpose(0, 1, 3, 2)
    rows = nats.reshape(-1, *nats.shape[2:])  # [stretches of all texts, tokens, sides]
    above: list[float | None] = [None] * len(sides)
    intervals: list[Interval | None] = [None] * len(sides)
    if DENSE in sides:
        dense = sides.index(DENSE)
        for index in range(len(sides)):
            if index != dense:
                above[index] = float((rows[..., index] - rows[..., dense]).mean())
                intervals[index] = difference_interval(rows.mean(1)[:, index], rows.mean(1)[:, dense])
    far = _far(rows, sides)
    questions = exams[texts[0]].questions
    places = [
        LossPlace(
            round(question.depth * exams[texts[0]].length), nats[:, place, :, 0].size, _plain(nats[:, place].mean((0, 1)))
        )
        for place, question in enumerate(questions)
    ]
    return LossResult(
        exams[texts[0]].length,
        sides,
        rows[..., 0].size,
        _plain(rows.mean((0, 1))),
        tuple(above),
        tuple(intervals),
        tuple(places),
        *far,
    )


def _places(exams: Sequence[Exam], text: int) -> int:
    return len(exams[text].questions)


def _plain(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _far(
    rows: NDArray[np.float64], sides: Sequence[str]
) -> tuple[int | None, tuple[float | None, ...], float | None, Interval | None]:
    """(tokens for which the far text matters, loss of each side on them, share of it that routing recovers, its interval)."""
    nothing = (None,) * len(sides)
    if DENSE not in sides or WINDOW not in sides:
        return None, nothing, None, None
    dense, window, routed = (rows[..., sides.index(side)] for side in (DENSE, WINDOW, ROUTED))
    is_far = window - dense > FAR
    if not is_far.any():
        return 0, nothing, None, None
    means = _plain(np.array([rows[..., index][is_far].mean() for index in range(len(sides))]))
    gained, lost = (np.where(is_far, window - other, 0.0).sum(1) for other in (routed, dense))
    interval = bootstrap(lambda drawn: drawn[..., 0].sum(1) / drawn[..., 1].sum(1), list(zip(gained, lost, strict=True)))
    return int(is_far.sum()), means, float(gained.sum() / lost.sum()), interval


def _readings(exams: Sequence[Exam], outcomes: Outcomes, index: int) -> list[reader.Reading]:
    return [token.reading for scores in outcomes[ROUTED][index] for token in scores if token.reading is not None]


def readings(exams: Sequence[Exam], outcomes: Outcomes) -> tuple[Reading, ...]:
    """Tokens read by the bundle, at every length; empty where it tells no routes."""
    lengths: dict[int, list[reader.Reading]] = {}
    for index, exam in enumerate(exams):
        lengths.setdefault(exam.length, []).extend(_readings(exams, outcomes, index))
    return tuple(
        Reading(length, _mean([r.tokens for r in each]), _mean([float(r.context) for r in each]), _share(each))
        for length, each in sorted(lengths.items())
        if each
    )


def _share(each: Sequence[reader.Reading]) -> float:
    return min(_mean([r.tokens / r.context for r in each]), 1.0)


def recall(
    exams: Sequence[Exam], outcomes: Outcomes, bundle: Bundle, mass_recall: Mapping[int, float] | None = None
) -> Recall | None:
    """How often the routes held the answers' blocks; None where the bundle tells no routes. mass_recall: by layer, if known."""
    if bundle.graph.routes is None or not any(_readings(exams, outcomes, index) for index in range(len(exams))):
        return None
    questions = [
        [token.reading for token in scores if token.reading is not None and token.reading.free]
        for index in range(len(exams))
        for scores in outcomes[ROUTED][index]
    ]
    questions = [each for each in questions if each]
    every = [each for question in questions for each in question]
    if not every:
        return Recall(0, None, None, None, ())
    layers = tuple(
        LayerRecall(
            layer,
            _mean([e.layers[layer] for e in every]),
            _mean([e.any_head[layer] for e in every]),
            (mass_recall or {}).get(layer),
        )
        for layer in reader.routed_layers(bundle)
    )
    candidates = [each.candidates for each in every if each.candidates is not None]
    routing = bundle.config["routing"]
    kept = int(routing["init_blocks"]) + max(int(routing["local_blocks"]), 1)
    blind = [(int(routing["topk"]) - kept) / ((e.context - 1) // bundle.block_size + 1 - kept) for e in every]
    return Recall(
        len(questions),
        _mean(candidates) if candidates else None,
        _mean([layer.heads for layer in layers]),
        min(max(_mean(blind), 0.0), 1.0),
        layers,
    )


SHOWN = (DENSE, ROUTED, WINDOW, MASS)


def in_order(sides: Sequence[str]) -> list[str]:
    """Sides as they are shown."""
    return [side for side in SHOWN if side in sides]
