"""What a measurement must reach: ``--floor NAME=VALUE``, judged by the value measured; the interval stands beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bilevel.errors import RequestError
from bilevel.runtime.quality.exams import COPY, LOSS, NEEDLES, PAIRS
from bilevel.runtime.quality.model import DENSE, ROUTED, Answer, Floor, LossResult, Recall
from bilevel.runtime.quality.results import column
from bilevel.runtime.quality.statistics import ratio, ratio_interval

RECOVERED, RECALL = "recovered", "recall"
FLOORS = {
    NEEDLES: "hidden facts that the bundle answers exactly, for each that dense does, all lengths together",
    PAIRS: "the same of key-value pairs",
    COPY: "tokens of rare strings that the bundle continues rightly, for each that dense does",
    RECOVERED: "of the nats that sink + window loses where the far text matters, the share that the bundle does not lose",
    RECALL: "share of the answers' blocks that the routed layers read where they had a choice, mean over layers and heads",
}
_TASKS = {NEEDLES: (NEEDLES,), PAIRS: (PAIRS,), COPY: (COPY,), RECOVERED: (LOSS,), RECALL: (NEEDLES, PAIRS, COPY)}


@dataclass(frozen=True)
class AskedFloor:
    """A name of FLOORS and the least value."""

    name: str
    value: float


def parse_floor(text: str) -> AskedFloor:
    """``NAME=VALUE``. Raises RequestError."""
    name, _, number = text.partition("=")
    if name not in FLOORS:
        raise RequestError(f"there is no floor {name!r}; take {', '.join(FLOORS)}, as in --floor needles=0.9")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"--floor {text} needs a number, as in --floor {name}=0.9")
    return AskedFloor(name, value)


def check_floors(floors: Sequence[AskedFloor], tasks: Sequence[str]) -> None:
    """Raise RequestError for a floor of what is not measured."""
    for floor in floors:
        if not any(task in tasks for task in _TASKS[floor.name]):
            wanted = " or ".join(_TASKS[floor.name])
            raise RequestError(f"--floor {floor.name} takes the task {wanted}; add it to --tasks {','.join(tasks)}")


def judge(asked: AskedFloor, answers: Sequence[Answer], loss: LossResult | None, recall: Recall | None) -> Floor:
    """What became of a floor. A value that is not defined misses it, and the words say why."""
    value, interval, words = None, None, ""
    if asked.name in (NEEDLES, PAIRS, COPY):
        value, interval, words = _against_dense(asked.name, answers)
    elif asked.name == RECOVERED:
        if loss is None or loss.far_tokens is None:
            words = "not defined: it takes dense and sink + window beside the bundle"
        elif loss.recovered is None:
            words = "not defined: there is no token for which the far text matters"
        else:
            value, interval, words = loss.recovered, loss.recovered_interval, f"on {loss.far_tokens} of {loss.tokens} tokens"
    elif recall is None or recall.heads is None:
        words = "not defined: no question left the routes a choice"
    else:
        value, words = recall.heads, f"over {recall.questions} questions; choosing blindly would hold {recall.chance:.2f}"
    return Floor(asked.name, asked.value, value, interval, value is not None and value >= asked.value, words)


def _against_dense(task: str, answers: Sequence[Answer]) -> tuple[float | None, tuple[float, float] | None, str]:
    group = [answer for answer in answers if answer.task == task]
    if DENSE not in group[0].sides:
        return None, None, "not defined: dense was not measured"
    name = "right" if task == COPY else "exact"
    routed, dense = column(group, ROUTED, name), column(group, DENSE, name)
    value = ratio(routed, dense)
    if value is None:
        return None, None, f"not defined: dense answers none of {len(group)} rightly"
    if task == COPY:
        return (
            value,
            ratio_interval(routed, dense),
            f"{sum(routed) / len(group):.2f} of the tokens, dense {sum(dense) / len(group):.2f}",
        )
    return value, ratio_interval(routed, dense), f"{sum(routed):.0f} of {len(group)} exact, dense {sum(dense):.0f}"
