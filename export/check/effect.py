"""A bundle with int8 or int4 weights or caches: what the rounding of activations adds, and what all rounding changed.

Such a bundle computes with other numbers than its checkpoint, so other routes than the checkpoint's are no fault by themselves.
Three things are kept apart:

  the export      PyTorch over the checkpoint's weights, rounded here as the export rounds them (from the checkpoint, not read
                  out of the file), against the file computing with fp32 activations: the same limits as for an fp32 bundle.
  activations     ONNX Runtime rounds activations to 8 bits inside every quantised product. The shipped file may be at most
                  twice as far from that reference (KL) as PyTorch itself is when it rounds its activations alike
                  (design section 9).
  the effect      routes, next token and loss of the shipped file against the checkpoint as trained: reported, not judged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bilevel.checkpoint import Checkpoint
from bilevel.export.check.choices import as_set
from bilevel.export.check.compare import numpy
from bilevel.export.check.end_to_end import KL_LIMIT, Head, divergence, flat, log_softmax
from bilevel.export.check.graph_parts import GraphParts
from bilevel.export.check.judge import ALLOWED_FACTOR, Array, Selection, count_equal
from bilevel.export.check.layered import LayeredModel, Text
from bilevel.export.check.rounding import round_activations
from bilevel.export.check.shipped import ShippedGraph
from bilevel.export.check.structure import expected_nodes
from bilevel.export.report.judgements import Activations, Effect, RouteChange


def judge_rounding(
    checkpoint: Checkpoint,
    weights: str,
    caches: str,
    shipped: ShippedGraph,
    parts: GraphParts,
    ids: Array,
    sizes: Sequence[int],
    longest: int,
) -> tuple[Activations | None, Effect]:
    """(activations, None where weights are fp32; effect) on ``ids`` [L] read in calls of the given sizes.

    shipped: rounds its activations.
    """
    text = Text.cut(ids[None], np.array([len(ids)]), sizes, checkpoint.config.routing.block_size, longest)
    hidden, routes = shipped.read(text)
    head = Head(parts)
    got = head.logits(flat(hidden, text))
    before, choices = _trained(LayeredModel(checkpoint), text)
    effect = _effect(before, got, ids, _routes(checkpoint, choices, routes))
    return (None if weights == "fp32" else _activations(checkpoint, weights, caches, text, got)), effect


def _activations(checkpoint: Checkpoint, weights: str, caches: str, text: Text, got: Array) -> Activations:
    """Logits [L, vocab] of the shipped file against PyTorch with and without rounded activations."""
    rounded = LayeredModel(checkpoint, weights=weights, caches=caches)
    emulated = LayeredModel(checkpoint, weights=weights, caches=caches, prepare=round_activations)
    reference, own = (model.head(torch.from_numpy(flat(model.hidden(text), text))).numpy() for model in (rounded, emulated))
    kl, own_kl = float(divergence(reference, got).mean()), float(divergence(reference, own).mean())
    limit = max(KL_LIMIT, ALLOWED_FACTOR * own_kl)
    return Activations(len(got), kl, own_kl, limit, kl <= limit)


def _trained(model: LayeredModel, text: Text) -> tuple[Array, list[list[Array]]]:
    """The logits of the checkpoint as it was trained, and the choices of every router, call by call."""
    passages = model.words(text)
    choices = [[numpy(passage.step.candidates) for passage in passages]] if model.config.routing.is_two_level else []
    for index in range(model.config.num_hidden_layers):
        passages = model.layer(index, passages, text)
        for kind in ("routes", "expert_ids"):
            if getattr(passages[0].trace, kind):
                choices.append([numpy(getattr(passage.trace, kind)[0]) for passage in passages])
    hidden = flat([passage.x for passage in passages], text)
    return model.head(torch.from_numpy(hidden)).numpy(), choices


def _effect(before: Array, got: Array, ids: Array, routes: tuple[RouteChange, ...]) -> Effect:
    """Logits [L, vocab] of the checkpoint and of the shipped file behind each of the tokens ``ids`` [L]."""
    losses = [-np.take_along_axis(log_softmax(logits[:-1]), ids[1:, None], 1).mean() for logits in (before, got)]
    same_best = float((before.argmax(-1) == got.argmax(-1)).mean())
    return Effect(len(got), float(divergence(before, got).mean()), same_best, float(losses[0]), float(losses[1]), routes)


def _routes(checkpoint: Checkpoint, before: list[list[Array]], after: dict[str, list[Array]]) -> tuple[RouteChange, ...]:
    """Per router: choices compared, share of equal sets, mean Jaccard. Both lists are in graph order."""
    routers = [name for name, op, _ in expected_nodes(checkpoint.config) if op in ("CoarseRoute", "FineRoute", "ExpertRoute")]
    changes = []
    for name, ours, theirs in zip(routers, before, after.values(), strict=True):
        stats = Selection(name)
        for one, two in zip(ours, theirs, strict=True):
            options = int(max(one.max(), two.max(), 0)) + 1
            count_equal(stats, *(as_set(x, options).reshape(-1, options) for x in (one, two)))
        changes.append(RouteChange(name, stats.rows, stats.exact / stats.rows, stats.jaccard_sum / stats.rows))
    return tuple(changes)
