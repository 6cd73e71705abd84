"""A report as tables for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from bilevel.errors import require
from bilevel.runtime.quality.model import LossResult, QualityReport, Recall, Score
from bilevel.runtime.quality.results import in_order
from bilevel.runtime.quality.words import LABELS, NAMES, number, signed, spread


def print_report(report: QualityReport) -> None:
    """Print all of it to stdout."""
    console = require("rich.console").Console(width=None if os.isatty(1) else 120, highlight=False)
    for block in _blocks(report):
        console.print(block, soft_wrap=isinstance(block, str), markup=False)


def _blocks(report: QualityReport) -> list[Any]:
    blocks: list[Any] = [f"{report.bundle}: {report.routing}"]
    blocks += [
        f"{NAMES[side.name]}: {side.what} ({side.backend} on {side.device}, {side.seconds:.0f} s)" for side in report.sides
    ]
    if report.tasks:
        blocks.append(_tasks(report))
    if report.loss is not None:
        blocks += _loss(report.loss)
    for reading in report.reading:
        words = f"of {reading.context:.0f} ({reading.share:.0%})"
        blocks.append(
            f"texts of {reading.length}: a head reads {reading.tokens:.0f} tokens {words}, mean over layers and heads"
        )
    if report.recall is not None:
        blocks += _recall(report.recall)
    blocks += [f"not measured: {NAMES.get(note.name, note.name)}: {note.reason}" for note in report.not_measured]
    for floor in report.floors:
        value = "-" if floor.value is None else f"{floor.value:.3f}{spread(floor.interval)}"
        mark = "holds" if floor.passed else "MISSED"
        blocks.append(f"floor {floor.name}={floor.asked:g} {mark}: {value}; {floor.words}")
    blocks.append(f"In brackets: intervals of 95 %. {report.machine}; {report.seconds:.0f} s; text: {report.plan.text}.")
    return blocks


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Any:
    table = require("rich.table").Table(title=title, title_justify="left", box=require("rich.box").SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _tasks(report: QualityReport) -> Any:
    rows = []
    for task in report.tasks:
        scores = {score.side: score for score in task.scores}
        for index, side in enumerate(in_order(tuple(scores))):
            head = [LABELS[task.task], str(task.length)] if index == 0 else ["", ""]
            rows.append([*head, NAMES[side], *_numbers(scores[side], task.questions)])
    columns = ("task", "length", "side", "exact", "tokens right", "nats a token", "above dense")
    return _table("Answers", columns, rows, left=3)


def _numbers(score: Score, questions: int) -> list[str]:
    low, high = score.exact_interval
    return [
        f"{score.exact} of {questions} ({100 * low:.0f} to {100 * high:.0f} %)",
        f"{100 * score.right:.0f} %",
        number(score.nats),
        "" if score.nats_above is None else f"{signed(score.nats_above)}{spread(score.nats_above_interval, has_sign=True)}",
    ]


def _loss(loss: LossResult) -> list[Any]:
    rows = []
    for side in in_order(loss.sides):
        index = loss.sides.index(side)
        above = loss.above[index]
        words = "" if above is None else f"{signed(above, 3)}{spread(loss.above_intervals[index], has_sign=True)}"
        rows.append([NAMES[side], number(loss.nats[index], 3), words, number(loss.far_nats[index])])
    title = f"Loss on plain text of {loss.length} tokens, nats a token"
    far = "where far text matters" if loss.far_tokens is None else f"on {loss.far_tokens} far tokens"
    blocks = [_table(title, ("side", f"{loss.tokens} tokens", "above dense", far), rows)]
    if loss.far_tokens is not None:
        words = "none" if loss.recovered is None else f"{loss.recovered:.0%}{spread(loss.recovered_interval)}"
        blocks.append(f"Far tokens: dense beats sink + window by more than 0.1 nat. Of that loss the routes recover {words}.")
    return blocks


def _recall(recall: Recall) -> list[Any]:
    if not recall.questions or recall.heads is None:
        return ["recall: no question left the routes a choice; give longer texts with --lengths"]
    text = f"recall of the answers' blocks, {recall.questions} questions: "
    if recall.candidates is not None:
        text += f"level 1 {recall.candidates:.0%}, "
    text += f"level 2 {recall.heads:.0%} of heads (blindly {number(recall.chance)})"
    best = sorted(recall.layers, key=lambda layer: -layer.heads)[:3]
    return [text + "; best in " + ", ".join(f"layer {layer.layer} {layer.heads:.0%}" for layer in best)]
