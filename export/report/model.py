"""The report of ``bilevel check``: ``check_bundle`` makes a ``Report``, ``--json`` prints it, ``report.json`` holds it.

The fields say what they mean, here and in ``judgements.py``; ``REPORT_SCHEMA`` is the JSON Schema that follows from them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bilevel.bundle.records import Count, Positive, Record, Schema, json_schema, limits, read_record
from bilevel.errors import RequestError
from bilevel.export.report.judgements import (
    Activations,
    Effect,
    EndToEnd,
    Invariant,
    Layer,
    Name,
    RouterResult,
    StructureDifference,
    TensorResult,
)

SCHEMA_VERSION = 2
WEIGHTS = ("fp32", "int8", "int4")
CACHES = ("int8", "int4")
PRECISIONS = ("float32", "float16", "bfloat16")

CallSize = Annotated[Positive, "tokens of one call"]
Hash = Annotated[str, limits(pattern="^[0-9a-f]{64}$")]
WordState = Literal["same", "excused", "wrong"]
RouterName = Annotated[str, "a router's name"]


@dataclass(frozen=True)
class Verdicts(Record):
    """Whether each judgement holds."""

    structure: Annotated[bool, "the graph's routed nodes and their attributes are the model's"]
    selection: Annotated[bool, "no router differs without excuse"]
    computation: Annotated[bool, "every tensor is within its limit"]
    end_to_end: Annotated[bool, "the next token and the greedy text are within their limits"]
    invariants: Annotated[bool, "every law holds"]
    activations: Annotated[bool, "rounding activations costs no more than allowed; with int8 or int4 weights only"] | None = (
        None
    )

    @property
    def passed(self) -> bool:
        return all(self.to_dict().values())


@dataclass(frozen=True)
class ModelShape(Record):
    """The model's shape."""

    layers: Annotated[Positive, "Transformer layers"]
    expert_layers: Annotated[tuple[Annotated[Count, "a layer"], ...], "the layers with experts"]
    preset: Annotated[str, "the routing preset, such as two_level, moba or dense"]
    block_size: Annotated[Positive, "tokens of a block"]
    coarse_topk: Annotated[Count | None, "blocks that level 1 keeps; null without a level 1"]
    topk: Annotated[Count, "blocks that level 2 keeps"]


@dataclass(frozen=True)
class JudgedText(Record):
    """What was judged on."""

    source: Annotated[str, "the file, or how the tokens were made"]
    tokens: Annotated[Positive, "tokens of the text"]
    rows: Annotated[Positive, "rows of the batch"]
    calls: Annotated[tuple[CallSize, ...], "tokens of each call that the text is cut into"]


@dataclass(frozen=True)
class Word(Record):
    """One token of the judged text."""

    text: Annotated[str, "its text"]
    state: Annotated[WordState, "how its routes compare; the worst over all routers"]
    excused: Annotated[tuple[RouterName, ...], "routers that differ at a near-tie"]
    wrong: Annotated[tuple[RouterName, ...], "routers that differ without excuse"]
    margin: Annotated[float | None, "its smallest relative margin over all routers; null where it had no choice"]


@dataclass(frozen=True)
class SmallestInput(Record):
    """The smallest input that shows it."""

    token_ids: Annotated[tuple[Annotated[Count, "a token id"], ...], "of one row"]
    text: Annotated[str, "the same as text"]
    calls: Annotated[tuple[CallSize, ...], "tokens of each call"]
    row_position: Annotated[Count, "the position in the row where it shows"]


@dataclass(frozen=True)
class Failure(Record):
    """Where a failure starts: the first router, tensor or node that differs, and what to look at."""

    name: Name
    layer: Layer
    operator: Annotated[str | None, "the operator there"]
    execution: Annotated[str | None, "the execution that shows it"]
    judgement: Annotated[str, "the judgement that it fails"]
    message: Annotated[str, "what is wrong, in one sentence"]
    nodes: Annotated[
        tuple[Annotated[str, "a node's name"], ...], "the graph's nodes between the last right tensors and the wrong one"
    ]
    input: SmallestInput
    difference: Annotated[str, "what PyTorch has there and what the graph has"]
    outliers: Annotated[str, "Polygraphy's statistics and histogram of the differences; empty for a choice"]


@dataclass(frozen=True, kw_only=True)
class Report(Record):
    """Parity of an exported bundle with its PyTorch checkpoint."""

    schema: Annotated[int, "version of this schema", limits(const=SCHEMA_VERSION)] = SCHEMA_VERSION
    passed: Annotated[bool, "all verdicts hold"]
    verdicts: Verdicts
    bundle: Annotated[str, "the bundle's folder, as given"]
    against: Annotated[str, "the checkpoint's folder, as given"]
    model_sha256: Annotated[Hash, "of the bundle's graph file"]
    checkpoint_sha256: Annotated[Hash, "of the checkpoint's weight file or index"]
    precision: Annotated[str, "type of activations and of unrounded weights", limits(enum=PRECISIONS)]
    weights: Annotated[str, "how the weights of matrix products are stored", limits(enum=WEIGHTS)]
    caches: Annotated[str, "how keys and values are packed; only where they are", limits(enum=CACHES)] | None = None
    backend: Annotated[str, "what ran both sides, with versions"]
    executions: Annotated[
        tuple[Annotated[str, "for example: bodies, CPU kernels"], ...], "what ran the routed nodes", limits(minItems=1)
    ]
    model: ModelShape
    data: JudgedText
    structure: Annotated[tuple[StructureDifference, ...], "differences of nodes and attributes; empty when all is well"]
    selection: Annotated[tuple[RouterResult, ...], "one entry per router, in graph order"]
    computation: Annotated[tuple[TensorResult, ...], "one entry per tensor, in graph order"]
    end_to_end: EndToEnd
    invariants: Annotated[tuple[Invariant, ...], "one entry per law"]
    activations: Activations | None = None  # with int8 or int4 weights only
    effect: Effect | None = None  # with these, or with packed caches
    words: Annotated[tuple[Word, ...], "the judged text, one entry per token"]
    failure: Annotated[Failure | None, "where it starts; null when parity holds"]
    seconds: Annotated[float, "how long the check took", limits(minimum=0)]

    @property
    def rounded(self) -> str:
        """What is stored in fewer bits, in words: "int4 weights and int8 caches"."""
        weights = [] if self.weights == "fp32" else [f"{self.weights} weights"]
        return " and ".join([*weights, *([f"{self.caches} caches"] if self.caches else [])]) or "fp32 weights"

    def to_json(self, indent: int | None = None) -> str:
        """Standard JSON in ASCII."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that ``to_json`` wrote. Raises RequestError for any other text."""
        try:
            report = read_record(cls, json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"this is no report of bilevel check ({error!r}); make one with: bilevel check --json") from None
        if report.schema != SCHEMA_VERSION:
            raise RequestError(
                f"the report has version {report.schema}, this bilevel reads version {SCHEMA_VERSION}; make it again with: "
                "bilevel check --json"
            )
        return report

    def verdict(self) -> dict[str, Any]:
        """What ``bundle.json`` records of it."""
        recorded = ["passed", "verdicts", "model_sha256", "checkpoint_sha256", "precision", "weights", "backend", "executions"]
        recorded += ["caches"] if self.caches else []
        report, errors = self.to_dict(), [tensor.error for tensor in self.computation]
        return {name: report[name] for name in recorded} | {
            "data": {"source": self.data.source, "tokens": self.data.tokens, "rows": self.data.rows},
            "routes_excused": sum(router.excused for router in self.selection),
            "largest_error": None if None in errors else max(error for error in errors if error is not None),
            "kl_mean": self.end_to_end.teacher_forced.kl_mean,
        }


REPORT_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": f"Report of bilevel check, version {SCHEMA_VERSION}",
    **json_schema(Report),
    # Rounded weights bring two more sections, and one more verdict; packed caches one of the sections.
    "allOf": [
        {
            "if": {"properties": {"weights": {"const": "fp32"}}},
            "then": {"properties": {"activations": False, "verdicts": {"not": {"required": ["activations"]}}}},
            "else": {"required": ["activations", "effect"], "properties": {"verdicts": {"required": ["activations"]}}},
        },
        {
            "if": {"properties": {"weights": {"const": "fp32"}, "caches": False}},
            "then": {"properties": {"effect": False}},
            "else": {"required": ["effect"]},
        },
    ],
}
