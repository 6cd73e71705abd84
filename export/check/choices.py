"""What the routers chose among, rebuilt in fp64 from the operands that each side really had."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bilevel.contract import ALWAYS_KEPT, EXPERT_ROUTE, SCORED
from bilevel.export.check.judge import SMALLEST_NORMAL, UNIT_ROUNDOFF, Array, ScoredChoices, dot_bound
from bilevel.operators.reference import sqrt_softplus


def as_set(indices: Array, size: int) -> Array:
    """Indices [..., K] as bool [..., size]; what is out of range is dropped."""
    mask = np.zeros((*indices.shape[:-1], size + 1), dtype=bool)
    inside = (indices >= 0) & (indices < size)
    np.put_along_axis(mask, np.where(inside, indices, size).astype(np.int64), True, axis=-1)
    return mask[..., :size]


def is_proper(routes: Array) -> Array:
    """bool [...]: whether routes [..., K] are ascending and unique with -1 in the unused tail."""
    before, after = routes[..., :-1], routes[..., 1:]
    ordered = np.where(after < 0, after == -1, (before < after) & (before >= 0))
    return np.asarray(ordered.all(-1) & (routes[..., 0] >= -1))


def block_choice(
    query: Array,
    unit_key: Array,
    routes: Array,
    candidates: Array | None,
    past_len: Array,
    new_len: Array,
    attributes: dict[str, Any],
) -> ScoredChoices:
    """Choices of CoarseRoute or FineRoute, one row per (valid token, selection head).

    query [B, Hr, L, Dr], unit_key [B, Hk, U, Dr], routes [B, Hs, L, K], candidates [B, Hc, L, K1] or None, as in the contract.
    """
    heads, keys = query.shape[1], unit_key.shape[1]
    batch, selection, length, _ = routes.shape
    units, width = unit_key.shape[2:]
    score = np.zeros((batch, selection, length, units))
    magnitude = np.zeros_like(score)
    for r in range(heads):
        q, k = query[:, r].astype(np.float64), unit_key[:, r * keys // heads].astype(np.float64).swapaxes(1, 2)
        score[:, r * selection // heads] += q @ k
        magnitude[:, r * selection // heads] += np.abs(q) @ np.abs(k)
    size = attributes["block_size"]
    position = (past_len[:, None] + np.arange(length))[:, None, :, None]
    valid = (past_len + new_len)[:, None, None, None]
    horizon = np.where(attributes["causal"] == 1, position + 1, valid)
    block, own = np.arange(units), position // size
    forced = (block <= own) & (block > own - attributes["local_blocks"]) | (block < attributes["init_blocks"])
    competes = np.broadcast_to(~forced & ((block + 1) * size <= horizon), score.shape)
    if candidates is not None:
        proposed = as_set(candidates, units)
        competes = competes & proposed[:, np.arange(selection) * proposed.shape[1] // selection]
    rows = np.broadcast_to(position < valid, (batch, selection, length, 1))[..., 0]
    bound = dot_bound(magnitude, width * heads // selection)
    return ScoredChoices(score[rows], bound[rows], as_set(routes, units)[rows], competes[rows])


def given_choice(scores: Array, routes: Array, past_len: Array, new_len: Array, attributes: dict[str, Any]) -> ScoredChoices:
    """Choices of SelectBlocks, one row per (valid token, selection head).

    scores [B, Hs, L, U], routes [B, Hs, L, K], as in the contract. Given scores carry no rounding of the selection's own: equal
    ones must be ordered equally, and what moved them is measured. What competes has a score that can be kept.
    """
    batch, selection, length, units = scores.shape
    size = attributes["block_size"]
    position = (past_len[:, None] + np.arange(length))[:, None, :, None]
    valid = (past_len + new_len)[:, None, None, None]
    horizon = np.where(attributes["causal"] == 1, position + 1, valid)
    block, own = np.arange(units), position // size
    forced = (block <= own) & (block > own - attributes["local_blocks"]) | (block < attributes["init_blocks"])
    if attributes["partial_block"] == ALWAYS_KEPT:
        forced = forced | (block == horizon // size) & (horizon % size > 0)
    needed = 1 if attributes["partial_block"] == SCORED else size
    wide = scores.astype(np.float64)
    score = np.where(np.isnan(wide), -np.inf, np.minimum(wide, float(np.finfo(np.float32).max)))
    competes = ~forced & (block * size + needed <= horizon) & (score > -np.inf)
    score = np.where(competes, score, 0.0)
    rows = np.broadcast_to(position < valid, (batch, selection, length, 1))[..., 0]
    return ScoredChoices(score[rows], np.zeros_like(score[rows]), as_set(routes, units)[rows], competes[rows])


def _expert_scores(logits: Array, score_func: str) -> Array:
    """fp64 scores [T, E] of fp64 logits."""
    if score_func == "sigmoid":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-logits)))
    if score_func == "sqrtsoftplus":
        return sqrt_softplus(torch.from_numpy(logits)).numpy()
    with np.errstate(invalid="ignore"):  # a row that holds inf is NaN
        shifted = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _score_bound(logits: Array, score_func: str) -> Array:
    """What rounding may move the scores [T, E] by, as a share of each: exp, the division and a softmax's sum lose a few units
    in the last place, a softmax also what the distance to its largest logit was rounded by. A gate's scores may be tiny and
    still have an order, so nothing here is absolute but what lies below the smallest normal number."""
    if score_func != "softmax":
        return np.full_like(logits, 8 * UNIT_ROUNDOFF)
    with np.errstate(invalid="ignore"):
        distance = np.abs(logits - logits.max(1, keepdims=True))
    distance[np.isposinf(distance)] = 0  # such a score is exactly 0
    return np.asarray((logits.shape[1] + 8 + distance) * UNIT_ROUNDOFF)


def expert_weights(logits: Array, ids: Array, attributes: dict[str, Any]) -> Array:
    """fp64 weights [T, k] of the experts ``ids`` [T, k] (-1: none), from the logits [T, E] alone."""
    attributes = EXPERT_ROUTE.with_defaults(attributes)
    scores = _expert_scores(logits.astype(np.float64), attributes["score_func"])
    weights = np.where(ids >= 0, np.take_along_axis(scores, np.maximum(ids, 0).astype(np.int64), 1), 0.0)
    if attributes["normalize"]:
        with np.errstate(invalid="ignore"):  # infinite scores
            weights = weights / np.maximum(weights.sum(1, keepdims=True) + 1e-20, attributes["norm_floor"])
    return np.asarray(weights * attributes["scale"])


def expert_choices(
    logits: Array, group_logits: Array, bias: Array, ids: Array, attributes: dict[str, Any]
) -> tuple[ScoredChoices, ScoredChoices]:
    """Choices of ExpertRoute, (groups, experts), one row per token. A token's experts compete inside its kept groups, those of
    the other groups with 0 where they join."""
    attributes = EXPERT_ROUTE.with_defaults(attributes)
    logits, group_logits = logits.astype(np.float64), group_logits.astype(np.float64)
    tokens, experts = logits.shape
    groups = group_logits.shape[1]
    size = experts // groups
    scores = _expert_scores(logits, attributes["score_func"])
    choice = np.where(np.isnan(scores), -np.inf, scores + bias)
    bound = _score_bound(logits, attributes["score_func"]) * scores + UNIT_ROUNDOFF * np.abs(scores + bias) + SMALLEST_NORMAL
    by_group = np.sort(choice.reshape(tokens, groups, size), axis=2)
    group = {
        "external": group_logits,
        "max": by_group[..., -1],
        "top2_sum": by_group[..., -2:].sum(2),
    }[attributes["group_score"]]
    # Given ones are the operands themselves; the others are at most two of the choices, added.
    group_bound = 2 * bound.reshape(tokens, groups, size).max(2) + UNIT_ROUNDOFF * np.abs(group)
    if attributes["group_score"] == "external":
        group_bound = np.zeros_like(group)
    order = np.argsort(-group, axis=1, kind="stable")[:, : attributes["topk_group"]]
    kept_groups = np.zeros((tokens, groups), dtype=bool)
    np.put_along_axis(kept_groups, order, True, axis=1)
    kept_groups &= group > -np.inf
    inside = np.repeat(kept_groups, size, axis=1)
    if attributes["zero_fill"]:
        joins = ~inside & (choice > -np.inf)
        choice, bound, inside = np.where(joins, 0.0, choice), np.where(joins, 0.0, bound), inside | joins
    everything = np.ones((tokens, groups), dtype=bool)
    return ScoredChoices(group, group_bound, kept_groups, everything), ScoredChoices(
        choice, bound, as_set(ids, experts), inside
    )
