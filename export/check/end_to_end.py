"""End to end: the shipped graph as a device runs it, against PyTorch, on the same text.

Next token: both sides read the same text with their own choices; every position's distribution is compared. Greedy text: the
device generates, PyTorch reads what came out and says at every token whether it would have chosen it; that is the same question
as comparing two generations up to their first difference, and it goes on behind it.

Intervals: text is no independent sample, so runs of ``BOOTSTRAP_BLOCK`` tokens are drawn with replacement (block bootstrap,
Künsch 1989, Annals of Statistics 17(3)); the interval is the middle 95 % of ``BOOTSTRAP_DRAWS`` means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bilevel.export.check.graph_parts import GraphParts, infer
from bilevel.export.check.judge import ALLOWED_FACTOR, COMPUTATION_LIMIT, Array
from bilevel.export.check.layered import LayeredModel, Text
from bilevel.export.check.shipped import ShippedGraph
from bilevel.export.report.judgements import EndToEnd, Greedy, Invariant, TeacherForced
from bilevel.model import hidden_name
from bilevel.state import Trace

KL_LIMIT = 1e-4  # nats a token, mean; fp32 without a differing route stays below 1e-9
DISAGREEMENT_LIMIT = 0.01  # share of tokens whose best successor differs
BOOTSTRAP_BLOCK, BOOTSTRAP_DRAWS = 32, 1000
METHOD = f"middle 95 % of {BOOTSTRAP_DRAWS} means over runs of {BOOTSTRAP_BLOCK} tokens drawn with replacement (seed 0)"
_PIECE = 512  # positions whose logits are in memory at a time


def log_softmax(logits: Array) -> Array:
    """fp64 log-probabilities of logits [N, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def divergence(expected: Array, got: Array) -> Array:
    """KL(expected || got) of every row of logits [rows, vocab], in nats."""
    p, q = log_softmax(expected), log_softmax(got)
    return np.asarray(np.maximum((np.exp(p) * (p - q)).sum(-1), 0))


def bootstrap(values: Array) -> tuple[float, float]:
    """(low, high) of the mean of ``values``, one per token in the text's order."""
    size = min(BOOTSTRAP_BLOCK, len(values))
    starts = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAP_DRAWS, -(-len(values) // size)))
    # The text is closed to a ring, so that its ends are drawn as often as the rest.
    sums = np.concatenate([[0.0], np.cumsum([*values, *values[:size]], dtype=np.float64)])
    means = ((sums[starts + size] - sums[starts]) / size).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class Head:
    """Logits of hidden states on the device's side, by position: the graph computes those of a row's last token only."""

    def __init__(self, parts: GraphParts) -> None:
        self._parts, self._part = parts, parts.head()
        self._input = hidden_name(parts.config.num_hidden_layers)

    def logits(self, hidden: Array) -> Array:
        """[N, vocab] of hidden states [N, d]."""
        count = len(hidden)
        feeds = {self._input: hidden[:, None].astype(np.float32), "new_len": np.ones(count, np.int32)}
        feeds |= {"input_ids": np.zeros((count, 1), np.int64), "past_len": np.zeros(count, np.int32)}
        with self._parts.runner(self._part, next(iter(self._parts.executions))) as runner:
            return np.asarray(infer(runner, self._part, feeds)["logits"])


def flat(hidden: Sequence[Any], text: Text) -> Array:
    """[N, d]: the valid positions' hidden states of every call, row by row in the text's order."""
    rows: list[list[Array]] = [[] for _ in text.ids]
    for call, states in zip(text.calls, hidden, strict=True):
        array = (
            states.float().numpy() if isinstance(states, torch.Tensor) and states.dtype != torch.float64 else np.asarray(states)
        )
        for row, count in enumerate(call.new):
            rows[row].append(array[row, :count])
    return np.concatenate([piece for row in rows for piece in row])


class Reference:
    """PyTorch's hidden states of one text: of the bundle's precision and, where that is lower than fp32, of fp64 as well.

    precision: "float32", or whatever else numbers are rounded to, packed caches among it: then fp64 is the reference, and what
    PyTorch itself errs by against it the measure.
    """

    def __init__(
        self,
        plain: LayeredModel,
        exact: LayeredModel,
        text: Text,
        precision: str,
        *,
        hidden: Sequence[Any] | None = None,
        obeyed: Sequence[Sequence[Trace]] | None = None,
    ) -> None:
        """hidden: what ``plain`` gives, where it is known already. obeyed: choices to obey (``LayeredModel.hidden``)."""
        self.text, self.plain_model, self.model = text, plain, exact if precision != "float32" else plain
        own = flat(hidden if hidden is not None else plain.hidden(text, obeyed), text)
        self.plain = own if precision != "float32" else None
        self.hidden = own if self.plain is None else flat(exact.hidden(text, obeyed), text)

    def pieces(self, places: Array, device: Head, hidden: Array) -> Any:
        """(reference, device, plain or None) logits of the positions ``places``, some at a time."""
        for first in range(0, len(places), _PIECE):
            piece = places[first : first + _PIECE]
            expected = self.model.head(torch.from_numpy(self.hidden[piece])).double().numpy()
            plain = None if self.plain is None else self.plain_model.head(torch.from_numpy(self.plain[piece])).float().numpy()
            yield expected, device.logits(hidden[piece]), plain


def teacher_forced(reference: Reference, device: Head, hidden: Array) -> TeacherForced:
    """Every position's next-token distribution. hidden: the device's hidden states, as ``reference.hidden``."""
    kl, same, floor_kl, floor_same = [], [], [], []
    for expected, got, plain in reference.pieces(np.arange(len(hidden)), device, hidden):
        kl.append(divergence(expected, got))
        same.append(expected.argmax(-1) == got.argmax(-1))
        if plain is not None:
            floor_kl.append(divergence(expected, plain))
            floor_same.append(expected.argmax(-1) == plain.argmax(-1))
    values, equal = np.concatenate(kl), np.concatenate(same)
    floor = float(np.concatenate(floor_kl).mean()) if floor_kl else None
    limit = max(KL_LIMIT, ALLOWED_FACTOR * (floor or 0.0))
    most = max(DISAGREEMENT_LIMIT, ALLOWED_FACTOR * float(1 - np.concatenate(floor_same).mean()) if floor_same else 0.0)
    return TeacherForced(
        tokens=len(values),
        kl_mean=float(values.mean()),
        kl_interval=bootstrap(values),
        kl_max=float(values.max()),
        top1_agreement=float(equal.mean()),
        top1_interval=bootstrap(equal),
        floor_kl=floor,
        kl_same_choices=None,
        limit=limit,
        passed=bool(values.mean() <= limit and (~equal).sum() <= max(most * len(equal), 0 if floor is None else 1)),
    )


def next_token(
    device: ShippedGraph,
    head: Head,
    text: Text,
    models: tuple[LayeredModel, LayeredModel],
    precision: str,
    *,
    hidden: Sequence[Any],
    excused: bool,
) -> TeacherForced:
    """The report's ``teacher_forced``. models: PyTorch in the bundle's precision and in fp64; hidden: what the first one gives.

    excused: whether selection excused differences. A block turned over at a near-tie may rightly move the distributions by more
    than the limit; what then decides is the device against PyTorch that obeys the device's choices on this text.
    """
    device_hidden, routes = device.read(text)
    states = flat(device_hidden, text)
    result = teacher_forced(Reference(*models, text, precision, hidden=hidden), head, states)
    if excused and not result.passed:
        same = teacher_forced(Reference(*models, text, precision, obeyed=device.choices(routes)), head, states)
        return replace(result, kl_same_choices=same.kl_mean, passed=same.passed)
    return result


def greedy_prompts(ids: Array, tokens: int, block_size: int, longest: int) -> tuple[list[Array], int]:
    """(prompts of different lengths from all over the text, tokens to generate behind each), about ``tokens`` in all."""
    count = max(1, min(128, tokens // 4, longest // 2))
    rows = max(1, min(32, -(-tokens // count)))
    room = max(1, min(4 * block_size, longest - count, len(ids) // 2))
    lengths = np.linspace(max(1, min(room, block_size // 2)), room, rows).astype(int)
    starts = np.linspace(0, len(ids) - room, rows).astype(int)
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)], count


def greedy(
    models: tuple[LayeredModel, LayeredModel],
    device: ShippedGraph,
    head: Head,
    prompts: Sequence[Array],
    count: int,
    longest: int,
    precision: str,
    *,
    excused: bool,
) -> Greedy:
    """Generate ``count`` tokens behind each prompt on the device; PyTorch reads them and says where it would go on otherwise.

    models, excused: as in :func:`next_token`; a token that PyTorch chooses too once it obeys the device's choices is excused.
    """
    generated = device.continue_greedily(prompts, count, longest)
    lengths = np.array([len(prompt) + count for prompt in prompts])
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt, more in zip(ids, prompts, generated, strict=True):
        row[: len(prompt) + count] = [*prompt, *more]
    text = Text.cut(ids, lengths, [], device.config.routing.block_size, longest)
    starts = np.cumsum(lengths) - lengths
    places = np.concatenate([start + len(p) - 1 + np.arange(count) for start, p in zip(starts, prompts, strict=True)])
    chosen = np.concatenate(generated)
    equal, near, own = _agreement(Reference(*models, text, precision), head, places, chosen)
    if excused and not (equal | near).all():
        obeyed = device.choices(device.read(text)[1])
        same, close, _ = _agreement(Reference(*models, text, precision, obeyed=obeyed), head, places, chosen)
        near |= (same | close) & ~equal
    allowed = 0.0 if own is None else max(DISAGREEMENT_LIMIT, ALLOWED_FACTOR * (1 - own))
    return Greedy(
        rows=len(prompts),
        tokens=len(equal),
        agreed=int(equal.sum()),
        agreement=float(equal.mean()),
        interval=bootstrap(equal),
        floor=own,
        limit=1 - allowed,
        excused=int(near.sum()),
        passed=bool((~(equal | near)).sum() <= allowed * len(equal)),
    )


def _agreement(reference: Reference, head: Head, places: Array, chosen: Array) -> tuple[Array, Array, float | None]:
    """(which tokens PyTorch would choose too, which others it misses by a near-tie, how often PyTorch of the precision agrees
    with fp64) of the tokens ``chosen`` behind the positions ``places``."""
    equal, near, floor = [], [], []
    pieces = reference.pieces(places, head, reference.hidden)
    for first, (expected, _, other) in zip(range(0, len(places), _PIECE), pieces, strict=True):
        tokens, best = chosen[first : first + _PIECE], expected.argmax(-1)
        gap = expected.max(-1) - np.take_along_axis(expected, tokens[:, None], 1)[:, 0]
        tolerance = COMPUTATION_LIMIT * np.abs(expected).max()
        if other is not None:
            floor.append(other.argmax(-1) == best)
            # Either of the two logits may be off by twice what PyTorch's are in this precision.
            tolerance = 2 * ALLOWED_FACTOR * np.abs(other - expected).max()
        equal.append(best == tokens)
        near.append((best != tokens) & (gap <= tolerance))
    own = float(np.concatenate(floor).mean()) if floor else None
    return np.concatenate(equal), np.concatenate(near), own


def could_not_run(message: str) -> tuple[EndToEnd, list[Invariant]]:
    """(end to end, invariants) of a graph that fails while it runs; that it computes otherwise is known by then."""
    none = (0.0, 0.0)
    forced = TeacherForced(0, math.inf, none, math.inf, 0.0, none, None, None, KL_LIMIT, False)
    text = Greedy(0, 0, 0, 0.0, none, None, 1.0, 0, False)
    return EndToEnd(forced, text, METHOD), [Invariant("the graph runs on its own", False, message)]
