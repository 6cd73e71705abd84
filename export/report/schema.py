"""REPORT_SCHEMA: the JSON Schema (draft 2020-12) of what ``bilevel check`` reports; ``folder.py`` says what it means."""

from __future__ import annotations

from typing import Any

SCHEMA_VERSION = 2
VERDICTS = ("structure", "selection", "computation", "end_to_end", "invariants")
WEIGHTS = ("fp32", "int8", "int4")
PRECISIONS = ("float32", "float16", "bfloat16")
_NOT_FINITE = "null: one side is not finite"

Schema = dict[str, Any]


def _object(description: str, fields: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    """An object that holds every field but the optional ones, and no other."""
    required = [name for name in fields if name not in optional]
    return {
        "type": "object",
        "description": description,
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }


def _list(description: str, items: Schema, **limits: int) -> Schema:
    return {"type": "array", "description": description, "items": items, **limits}


def _text(description: str, *choices: str) -> Schema:
    return {"type": "string", "description": description, **({"enum": list(choices)} if choices else {})}


def _optional_text(description: str) -> Schema:
    return {"type": ["string", "null"], "description": description}


def _flag(description: str) -> Schema:
    return {"type": "boolean", "description": description}


def _count(description: str, minimum: int = 0) -> Schema:
    return {"type": "integer", "description": description, "minimum": minimum}


def _optional_count(description: str) -> Schema:
    return {"type": ["integer", "null"], "description": description, "minimum": 0}


def _number(description: str, **limits: float) -> Schema:
    return {"type": "number", "description": description, **limits}


def _rate(description: str) -> Schema:
    return _number(description, minimum=0, maximum=1)


def _measured(description: str, **limits: float) -> Schema:
    """A number that is null where it does not apply or could not be computed."""
    return {"type": ["number", "null"], "description": description, **limits}


def _interval(description: str) -> Schema:
    return _list(description, _measured(_NOT_FINITE), minItems=2, maxItems=2)


_HASH = {"pattern": "^[0-9a-f]{64}$"}
_ANY = {"type": ["string", "number", "boolean", "array", "null"]}
_NAME = "the router's or tensor's name, with its layer"
_LAYER = "the layer, from 0; null for what belongs to no layer"
_ORDER = "place in the graph's order, shared by selection and computation; a fault starts at the lowest that fails"

_MODEL = _object(
    "the model's shape",
    {
        "layers": _count("Transformer layers", 1),
        "expert_layers": _list("the layers with experts, from 0", _count("a layer")),
        "preset": _text("the routing preset, such as two_level, moba or dense"),
        "block_size": _count("tokens of a block", 1),
        "coarse_topk": _optional_count("blocks that level 1 keeps; null without a level 1"),
        "topk": _count("blocks that level 2 keeps"),
    },
)
_DATA = _object(
    "what was judged on",
    {
        "source": _text("the file, or how the tokens were made"),
        "tokens": _count("tokens of the text", 1),
        "rows": _count("rows of the batch", 1),
        "calls": _list("tokens of each call that the text is cut into", _count("tokens of one call", 1)),
    },
)
_STRUCTURE = _object(
    "one difference between the graph's nodes or attributes and the model's",
    {
        "name": _text(_NAME),
        "operator": _text("the node's operator"),
        "attribute": _optional_text("the attribute that differs; null where the node itself does"),
        "graph": {**_ANY, "description": "what the graph has"},
        "model": {**_ANY, "description": "what the model means"},
    },
)
_MARGINS = _object(
    "how far the cut was from going the other way: a histogram over the rows of the base-10 logarithm of the relative margin",
    {
        "edges": _list("edges of the bins, ascending, one more than bins", _number("log10 of a relative margin")),
        "counts": _list("rows in each bin", _count("rows")),
        "fragile": _count("rows whose margin is below their own tolerance"),
        "ties": _count("rows whose margin is exactly 0; they are in no bin"),
    },
)
_TOLERANCE = _object(
    "how much of the relative margin rounding may take; null where no row had a choice",
    {"median": _measured("over the rows", minimum=0), "largest": _measured("of any row", minimum=0)},
)
_SELECTION = _object(
    "one router: its choices on both sides, PyTorch's choices forced into everything before it",
    {
        "name": _text(_NAME),
        "layer": _optional_count(_LAYER),
        "level": {"enum": [1, 2, "experts"], "description": "1 and 2 choose blocks, experts chooses experts"},
        "order": _count(_ORDER),
        "operator": _text("the router's operator", "CoarseRoute", "FineRoute", "ExpertRoute"),
        "rows": _count("choices compared"),
        "exact_rate": _rate("share of the rows with equal sets"),
        "jaccard": _rate("mean over the rows of the sets' intersection over their union"),
        "excused": _count("blocks or experts chosen by one side only, within rounding of the cut"),
        "unexcused": _count("those that rounding cannot explain"),
        "smallest_margin": _measured("least distance of a kept and a dropped score over the larger magnitude; null: no choice"),
        "margins": _MARGINS,
        "tolerance": {**_TOLERANCE, "type": ["object", "null"]},
        "example": _text("the first unexcused difference in words, or empty"),
        "passed": _flag("no unexcused difference"),
    },
)
_COMPUTATION = _object(
    "one tensor on both sides, computed from equal choices",
    {
        "name": _text(_NAME),
        "layer": _optional_count(_LAYER),
        "part": _text("the name without the layer"),
        "order": _count(_ORDER),
        "operator": _optional_text("the routed operator that made it; null for ordinary nodes"),
        "error": _measured(f"largest absolute difference over the reference's largest magnitude; {_NOT_FINITE}", minimum=0),
        "floor": _measured("the error of PyTorch in this precision against fp64; null where it was not measured", minimum=0),
        "limit": _number("the largest error that passes", minimum=0),
        "worst": _optional_text("the execution that erred most"),
        "passed": _flag("the error is within the limit"),
    },
)
_TEACHER_FORCED = _object(
    "the distribution of the next token, the text given",
    {
        "tokens": _count("predictions compared"),
        "kl_mean": _measured(f"mean KL(PyTorch || graph) in nats a token; {_NOT_FINITE}"),
        "kl_interval": _interval("confidence interval of kl_mean"),
        "kl_max": _measured(f"the largest of any token; {_NOT_FINITE}"),
        "top1_agreement": _rate("share of the predictions with the same best token"),
        "top1_interval": _interval("confidence interval of top1_agreement"),
        "floor_kl": _measured("kl_mean of PyTorch in this precision against fp64; null where it was not measured"),
        "kl_same_choices": _measured(
            "kl_mean against PyTorch that obeys the device's choices; measured where excused ones move kl_mean beyond the limit"
        ),
        "limit": _number("the largest kl_mean that passes"),
        "passed": _flag("within the limits"),
    },
)
_GREEDY = _object(
    "text generated greedily on both sides",
    {
        "rows": _count("prompts"),
        "tokens": _count("tokens generated, over all prompts"),
        "agreed": _count("tokens before the first difference, over all prompts"),
        "agreement": _rate("agreed over tokens"),
        "interval": _interval("confidence interval of agreement"),
        "floor": _measured("agreement of PyTorch in this precision with fp64; null where it was not measured"),
        "limit": _measured("the least agreement that passes"),
        "excused": _count("prompts whose first difference is a near-tie of the logits"),
        "passed": _flag("within the limit"),
    },
)
_END_TO_END = _object(
    "the shipped graph on its own",
    {"teacher_forced": _TEACHER_FORCED, "greedy": _GREEDY, "method": _text("how the intervals are made")},
)
_INVARIANT = _object(
    "a law that holds whatever the weights are",
    {"name": _text("the law"), "passed": _flag("it holds"), "detail": _text("what was done, and what came out")},
)
_ACTIVATIONS = _object(
    "what rounding the activations to 8 bits costs; the reference is PyTorch with the same rounded weights",
    {
        "tokens": _count("predictions compared"),
        "kl_mean": _measured(f"of the shipped file, nats a token; {_NOT_FINITE}"),
        "pytorch_kl_mean": _measured("of PyTorch with activations rounded alike"),
        "limit": _number("the largest kl_mean that passes"),
        "passed": _flag("within the limit"),
    },
)
_EFFECT = _object(
    "the shipped file against the checkpoint as it was trained; not judged",
    {
        "tokens": _count("predictions compared"),
        "kl_mean": _measured(f"nats a token; {_NOT_FINITE}"),
        "top1_agreement": _rate("share of the predictions with the same best token"),
        "loss_before": _measured(f"the checkpoint's, nats a token; {_NOT_FINITE}"),
        "loss_after": _measured(f"the shipped file's, nats a token; {_NOT_FINITE}"),
        "routes": _list(
            "one entry per router",
            _object(
                "one router's choices before and after",
                {
                    "name": _text(_NAME),
                    "rows": _count("choices compared"),
                    "exact_rate": _rate("share of the rows with equal sets"),
                    "jaccard": _rate("mean intersection over union"),
                },
            ),
        ),
    },
)
_WORD = _object(
    "one token of the judged text",
    {
        "text": _text("its text"),
        "state": _text("how its routes compare; the worst over all routers", "same", "excused", "wrong"),
        "excused": _list("routers that differ at a near-tie", _text("a router's name")),
        "wrong": _list("routers that differ without excuse", _text("a router's name")),
        "margin": _measured("its smallest relative margin over all routers; null where it had no choice"),
    },
)
_FAILURE = _object(
    "where it starts",
    {
        "name": _text(_NAME),
        "layer": _optional_count(_LAYER),
        "operator": _optional_text("the operator there"),
        "execution": _optional_text("the execution that shows it"),
        "judgement": _text("the judgement that it fails"),
        "message": _text("what is wrong, in one sentence"),
        "nodes": _list("the graph's nodes between the last right tensors and the wrong one", _text("a node's name")),
        "input": _object(
            "the smallest input that shows it",
            {
                "token_ids": _list("of one row", _count("a token id")),
                "text": _text("the same as text"),
                "calls": _list("tokens of each call", _count("tokens of one call", 1)),
                "row_position": _count("the position in the row where it shows"),
            },
        ),
        "difference": _text("what PyTorch has there and what the graph has"),
        "outliers": _text("Polygraphy's statistics and histogram of the differences; empty for a choice"),
    },
)

REPORT_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": f"Report of bilevel check, version {SCHEMA_VERSION}",
    **_object(
        "Parity of an exported bundle with its PyTorch checkpoint",
        {
            "schema": {"const": SCHEMA_VERSION, "description": "version of this schema"},
            "passed": _flag("all verdicts hold"),
            "verdicts": _object(
                "whether each judgement holds",
                {name: _flag(f"the judgement {name} holds") for name in (*VERDICTS, "activations")},
                optional=("activations",),
            ),
            "bundle": _text("the bundle's folder, as given"),
            "against": _text("the checkpoint's folder, as given"),
            "model_sha256": {**_text("of the bundle's graph file"), **_HASH},
            "checkpoint_sha256": {**_text("of the checkpoint's weight file or index"), **_HASH},
            "precision": _text("type of activations and of unrounded weights", *PRECISIONS),
            "weights": _text("how the weights of matrix products are stored", *WEIGHTS),
            "backend": _text("what ran both sides, with versions"),
            "executions": _list("what ran the routed nodes", _text("for example: bodies, CPU kernels"), minItems=1),
            "model": _MODEL,
            "data": _DATA,
            "structure": _list("differences of nodes and attributes; empty when all is well", _STRUCTURE),
            "selection": _list("one entry per router, in graph order", _SELECTION),
            "computation": _list("one entry per tensor, in graph order", _COMPUTATION),
            "end_to_end": _END_TO_END,
            "invariants": _list("one entry per law", _INVARIANT),
            "activations": _ACTIVATIONS,
            "effect": _EFFECT,
            "words": _list("the judged text, one entry per token", _WORD),
            "failure": {**_FAILURE, "type": ["object", "null"], "description": "where it starts; null when parity holds"},
            "seconds": _number("how long the check took", minimum=0),
        },
        optional=("activations", "effect"),
    ),
    # Rounded weights bring two more sections, and one more verdict.
    "if": {"properties": {"weights": {"const": "fp32"}}},
    "then": {
        "properties": {"activations": False, "effect": False, "verdicts": {"not": {"required": ["activations"]}}},
    },
    "else": {
        "required": ["activations", "effect"],
        "properties": {"verdicts": {"required": ["activations"]}},
    },
}
