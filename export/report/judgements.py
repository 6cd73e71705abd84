"""What ``bilevel check`` reports of each judgement: every number, and what it means.

Rates lie in 0..1; losses and KL are in nats a token; layers count from 0. A margin is the distance between the last kept and
the first dropped score over the larger of their magnitudes, so that it has no unit. None (null in JSON) means "not applicable"
or, where something was measured, "not finite".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bilevel.bundle.records import Count, Rate, Record, limits

Level = Literal[1, 2, "experts"]
Measure = Annotated[float | None, limits(minimum=0)]
Value = Annotated[Any, limits(type=("string", "number", "boolean", "array", "null"))]

Name = Annotated[str, "the router's or tensor's name, with its layer"]
Layer = Annotated[Count | None, "the layer; null for what belongs to no layer: the embedding, level 1, the logits"]
Order = Annotated[Count, "place in the graph, counted over routers and tensors alike: a fault starts at the lowest that fails"]
Bound = Annotated[float | None, "null: not finite"]
Limit = Annotated[float | None, "the largest that passes; null: PyTorch's own is not finite either"]
SameBest = Annotated[Rate, "share of the predictions with the same best token"]
SameSets = Annotated[Rate, "share of the rows with equal sets"]
Jaccard = Annotated[Rate, "mean over the rows of the sets' intersection over their union"]
Predictions = Annotated[Count, "predictions compared"]
Choices = Annotated[Count, "choices compared"]


@dataclass(frozen=True)
class StructureDifference(Record):
    """One difference between the graph's nodes or attributes and the model's."""

    name: Name
    operator: Annotated[str, "the node's operator"]
    attribute: Annotated[str | None, "the attribute that differs; null where the number of such nodes does"]
    graph: Annotated[Value, "what the graph has"]
    model: Annotated[Value, "what the model means"]


@dataclass(frozen=True)
class Margins(Record):
    """How far the cut was from going the other way: a histogram over the rows of log10 of the relative margin."""

    edges: Annotated[
        tuple[Annotated[float, "log10 of a relative margin"], ...], "edges of the bins, ascending, one more than bins"
    ]
    counts: Annotated[tuple[Annotated[Count, "rows"], ...], "rows in each bin"]
    fragile: Annotated[Count, "rows whose margin is below their own tolerance"]
    ties: Annotated[Count, "rows whose margin is exactly 0; they are in no bin"]


@dataclass(frozen=True)
class Tolerance(Record):
    """How much of the relative margin rounding may take; null where no row had a choice."""

    median: Annotated[Measure, "over the rows"]
    largest: Annotated[Measure, "of any row"]


@dataclass(frozen=True)
class RouterResult(Record):
    """One router: its choices on both sides, PyTorch's choices forced into everything before it."""

    name: Name
    layer: Layer
    level: Annotated[Level, "1 and 2 choose blocks, experts chooses experts"]
    order: Order
    operator: Annotated[str, "the router's operator", limits(enum=("CoarseRoute", "FineRoute", "ExpertRoute"))]
    rows: Choices
    exact_rate: SameSets
    jaccard: Jaccard
    excused: Annotated[Count, "blocks or experts chosen by one side only, within rounding of the cut"]
    unexcused: Annotated[Count, "those that rounding cannot explain"]
    smallest_margin: Annotated[float | None, "of any row; null: no row had a choice"]
    margins: Margins
    tolerance: Tolerance
    example: Annotated[str, "the first unexcused difference in words, or empty"]
    passed: Annotated[bool, "no unexcused difference"]


@dataclass(frozen=True)
class TensorResult(Record):
    """One tensor on both sides, computed from equal choices."""

    name: Name
    layer: Layer
    part: Annotated[str, "the name without the layer"]
    order: Order
    operator: Annotated[str | None, "the routed operator that made it; null for ordinary nodes"]
    error: Annotated[Measure, "largest absolute difference over the reference's largest magnitude; null: not finite"]
    floor: Annotated[Measure, "the error of PyTorch in this precision against fp64; null: not finite"]
    limit: Annotated[Limit, limits(minimum=0)]
    worst: Annotated[str | None, "the execution that erred most"]
    passed: Annotated[bool, "the error is within the limit"]


@dataclass(frozen=True)
class TeacherForced(Record):
    """The distribution of the next token, the text given."""

    tokens: Predictions
    kl_mean: Annotated[float | None, "mean KL(PyTorch || graph); null: not finite"]
    kl_interval: Annotated[tuple[Bound, Bound], "confidence interval of kl_mean"]
    kl_max: Annotated[float | None, "the largest KL of any token; null: not finite"]
    top1_agreement: SameBest
    top1_interval: Annotated[tuple[Bound, Bound], "confidence interval of top1_agreement"]
    floor_kl: Annotated[float | None, "kl_mean of PyTorch in this precision against fp64; null where it was not measured"]
    kl_same_choices: Annotated[
        float | None,
        "kl_mean against PyTorch that obeys the device's choices; measured where excused ones move kl_mean beyond the limit",
    ]
    limit: Limit
    passed: Annotated[bool, "within the limits"]


@dataclass(frozen=True)
class Greedy(Record):
    """Text generated greedily on both sides."""

    rows: Annotated[Count, "prompts"]
    tokens: Annotated[Count, "tokens generated, over all prompts"]
    agreed: Annotated[Count, "tokens that PyTorch would have chosen too, over all prompts"]
    agreement: Annotated[Rate, "agreed over tokens"]
    interval: Annotated[tuple[Bound, Bound], "confidence interval of agreement"]
    floor: Annotated[float | None, "agreement of PyTorch in this precision with fp64; null where it was not measured"]
    limit: Annotated[float | None, "the least agreement that passes"]
    excused: Annotated[Count, "tokens that differ at a near-tie of the logits"]
    passed: Annotated[bool, "within the limit"]


@dataclass(frozen=True)
class EndToEnd(Record):
    """The shipped graph on its own."""

    teacher_forced: TeacherForced
    greedy: Greedy
    method: Annotated[str, "how the intervals are made"]

    @property
    def passed(self) -> bool:
        return self.teacher_forced.passed and self.greedy.passed


@dataclass(frozen=True)
class Invariant(Record):
    """A law that holds whatever the weights are."""

    name: Annotated[str, "the law"]
    passed: Annotated[bool, "it holds"]
    detail: Annotated[str, "what was done, and what came out"]


@dataclass(frozen=True)
class Activations(Record):
    """What rounding the activations to 8 bits costs; the reference is PyTorch with the same rounded weights."""

    tokens: Predictions
    kl_mean: Annotated[float | None, "of the shipped file; null: not finite"]
    pytorch_kl_mean: Annotated[float | None, "of PyTorch with activations rounded alike"]
    limit: Limit
    passed: Annotated[bool, "within the limit"]


@dataclass(frozen=True)
class RouteChange(Record):
    """One router's choices before and after the weights were rounded."""

    name: Name
    rows: Choices
    exact_rate: SameSets
    jaccard: Jaccard


@dataclass(frozen=True)
class Effect(Record):
    """The shipped file against the checkpoint as it was trained; not judged."""

    tokens: Predictions
    kl_mean: Annotated[float | None, "null: not finite"]
    top1_agreement: SameBest
    loss_before: Annotated[float | None, "the checkpoint's; null: not finite"]
    loss_after: Annotated[float | None, "the shipped file's; null: not finite"]
    routes: Annotated[tuple[RouteChange, ...], "one entry per router"]
