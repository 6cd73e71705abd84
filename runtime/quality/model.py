"""The report of ``bilevel quality``: what ``--json`` writes and the page shows. ``REPORT_SCHEMA`` follows from the fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from bilevel.bundle.records import Count, Positive, Rate, Record, Schema, json_schema, limits

SCHEMA_VERSION = 1
ROUTED, DENSE, WINDOW, MASS = "routed", "dense", "window", "mass"
SIDES = {
    ROUTED: "the bundle",
    DENSE: "the same weights with ordinary attention, or what --against names",
    WINDOW: "the bundle with its first blocks and its most recent ones in the place of the choice, as many as it may read",
    MASS: "the bundle's checkpoint, choosing the blocks that dense attention there gives most weight",
}

SideName = Annotated[str, "one of the sides", limits(enum=tuple(SIDES))]
TaskName = Annotated[str, "needles, pairs, copy or loss"]
Length = Annotated[Positive, "tokens that a text may have, question and answer included"]
Low = Annotated[float, "lower end"]
Bounds = Annotated[tuple[Low, Low], "interval of 95 %"]


@dataclass(frozen=True)
class SideInfo(Record):
    """One of the models that were compared."""

    name: SideName
    what: Annotated[str, "what it is"]
    folder: Annotated[str, "the bundle's or checkpoint's folder, as given"]
    backend: Annotated[str, "what ran it"]
    device: Annotated[str, "where it ran"]
    seconds: Annotated[float, "how long it took", limits(minimum=0)]


@dataclass(frozen=True)
class Plan(Record):
    """What was asked."""

    seed: Annotated[Count, "the same seed, text and tokenizer give the same questions"]
    tasks: tuple[TaskName, ...]
    lengths: tuple[Length, ...]
    facts: Annotated[Positive, "questions for each task and length"]
    loss_texts: Annotated[Count, "texts whose loss was measured"]
    text: Annotated[str, "where the text is from"]
    text_sha256: Annotated[str, "its SHA-256"]
    wording: Annotated[str, "how questions were put"]
    python: Annotated[str, "the Python that drew the questions"]


@dataclass(frozen=True)
class Answer(Record):
    """One question and how every side answered it."""

    task: TaskName
    length: Length
    text: Annotated[Count, "which of the texts of this task and length"]
    depth: Annotated[Rate, "where in the text the answer stands; 0 is the beginning"]
    tokens: Annotated[Positive, "tokens of the answer"]
    sides: Annotated[tuple[SideName, ...], "whose answers follow, in this order"]
    exact: Annotated[tuple[bool, ...], "greedy decoding gives exactly the answer's tokens"]
    right: Annotated[tuple[Rate, ...], "share of the answer's tokens that are best, given the right ones before"]
    nats: Annotated[tuple[float | None, ...], "mean surprise of the answer's tokens; null where it is infinite"]


@dataclass(frozen=True)
class Score(Record):
    """One side's answers to one task at one length."""

    side: SideName
    exact: Annotated[Count, "answers that are exactly right"]
    exact_rate: Rate
    exact_interval: Annotated[Bounds, "Wilson's"]
    right: Annotated[Rate, "share of tokens that are best, given the right ones before; mean over answers"]
    nats: Annotated[float | None, "mean surprise of a token of an answer"]
    nats_interval: Annotated[Bounds | None, "bootstrap over questions; null for fewer than two"]
    nats_above: Annotated[float | None, "nats more than dense; null where dense was not measured"]
    nats_above_interval: Annotated[Bounds | None, "paired bootstrap over questions"]


@dataclass(frozen=True)
class TaskResult(Record):
    """One task at one length."""

    task: TaskName
    length: Length
    questions: Positive
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class LossPlace(Record):
    """The loss around one position."""

    position: Annotated[Positive, "tokens read up to the end of the stretch"]
    tokens: Annotated[Positive, "tokens scored there, all texts together"]
    nats: Annotated[tuple[float | None, ...], "mean loss of each side, in the order of LossResult.sides"]


@dataclass(frozen=True)
class LossResult(Record):
    """The loss on plain text, and on the tokens for which the far text matters: dense beats sink + window by more than 0.1."""

    length: Length
    sides: tuple[SideName, ...]
    tokens: Positive
    nats: Annotated[tuple[float | None, ...], "mean loss of each side"]
    above: Annotated[tuple[float | None, ...], "nats more than dense, of each side; null without dense"]
    above_intervals: Annotated[tuple[Bounds | None, ...], "paired bootstrap over stretches of text"]
    places: tuple[LossPlace, ...]
    far_tokens: Annotated[Count | None, "tokens for which the far text matters; null without dense and window"]
    far_nats: Annotated[tuple[float | None, ...], "mean loss of each side on them"]
    recovered: Annotated[float | None, "of the nats that the window loses on them, the share that routing does not"]
    recovered_interval: Annotated[Bounds | None, "paired bootstrap over stretches of text"]


@dataclass(frozen=True)
class Reading(Record):
    """What the bundle read when it answered, at one length."""

    length: Length
    tokens: Annotated[float, "tokens that a head read, mean over layers, heads and questions"]
    context: Annotated[float, "tokens that there were"]
    share: Rate


@dataclass(frozen=True)
class LayerRecall(Record):
    """How often a layer read the blocks in which the answer stood, where it had a choice."""

    layer: Count
    heads: Annotated[Rate, "mean over heads"]
    any_head: Annotated[Rate, "at least one head"]
    mass: (
        Annotated[Rate, "of the attention that the best free choice holds, what the layer's holds; with --checkpoint only"]
        | None
    ) = None


@dataclass(frozen=True)
class Recall(Record):
    """How often the routes held the blocks in which the answer stood, over questions whose blocks were not kept anyway."""

    questions: Annotated[Count, "questions that left a choice"]
    candidates: Annotated[Rate | None, "level 1; null without one"]
    heads: Annotated[Rate | None, "level 2, mean over routed layers and heads; null without questions"]
    chance: Annotated[Rate | None, "what choosing blindly would hold"]
    layers: tuple[LayerRecall, ...]


@dataclass(frozen=True)
class Floor(Record):
    """What was asked for by --floor."""

    name: str
    asked: float
    value: Annotated[float | None, "null where it is not defined, which misses the floor"]
    interval: Bounds | None
    passed: bool
    words: Annotated[str, "what the value is made of"]


@dataclass(frozen=True)
class Note(Record):
    """What was not measured."""

    name: str
    reason: Annotated[str, "why, in a sentence"]


@dataclass(frozen=True, kw_only=True)
class QualityReport(Record):
    """What routing costs on one model."""

    schema: Annotated[int, "version of this schema", limits(const=SCHEMA_VERSION)] = SCHEMA_VERSION
    passed: Annotated[bool, "no floor is missed"]
    bundle: Annotated[str, "the bundle's folder, as given"]
    bilevel: Annotated[str, "this package's version"]
    machine: Annotated[str, "processor and system"]
    routing: Annotated[str, "the bundle's routing, in words"]
    plan: Plan
    sides: tuple[SideInfo, ...]
    tasks: tuple[TaskResult, ...]
    loss: LossResult | None
    reading: tuple[Reading, ...]
    recall: Recall | None
    floors: tuple[Floor, ...]
    not_measured: tuple[Note, ...]
    answers: Annotated[tuple[Answer, ...], "every question"]
    seconds: Annotated[float, "how long all of it took", limits(minimum=0)]

    def to_json(self, indent: int | None = None) -> str:
        """Standard JSON in ASCII."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


REPORT_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": f"Report of bilevel quality, version {SCHEMA_VERSION}",
    **json_schema(QualityReport),
}
