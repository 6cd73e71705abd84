"""Two-level expert routing and the chosen experts' work, vectorised and trainable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.operators.precision import wide

_FLOAT_MAX = torch.finfo(torch.float32).max


def _rank(scores: Tensor) -> Tensor:
    """Scores as the selection sees them: NaN is -inf, +inf is the largest finite number."""
    return torch.where(scores.isnan(), -torch.inf, scores.clamp(max=_FLOAT_MAX))


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best of the last axis by (score descending, index ascending), as (scores, indices)."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True)
    return order.values[..., :count], order.indices[..., :count]


def check_expert_shapes(num_experts: int, num_groups: int, top_k: int, topk_group: int) -> None:
    """Raise ContractError unless the groups divide the experts and the kept groups can hold top_k of them."""
    if num_experts % num_groups:
        raise ContractError(f"ExpertRoute: {num_experts} experts are not divisible into {num_groups} groups")
    if topk_group > num_groups:
        raise ContractError(f"ExpertRoute: topk_group={topk_group} exceeds the {num_groups} groups there are")
    room = topk_group * (num_experts // num_groups)
    if top_k > room:
        raise ContractError(f"ExpertRoute: top_k={top_k} exceeds the {room} experts that {topk_group} groups hold")


def expert_route(
    logits: Tensor,
    group_logits: Tensor,
    select_bias: Tensor,
    *,
    top_k: int,
    topk_group: int,
    score_func: str,
    group_score: str,
    normalize: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Groups first, then experts inside them (see ``bilevel.operators.reference.expert_route``); gradients reach the logits."""
    num_experts, num_groups = logits.shape[1], group_logits.shape[1]
    check_expert_shapes(num_experts, num_groups, top_k, topk_group)
    scores = _scores(logits, score_func)
    with torch.no_grad():
        choice = _rank(scores + select_bias)
        grouped = choice.unflatten(1, (num_groups, num_experts // num_groups))
        if group_score == "external":
            group = _rank(group_logits)
        elif group_score == "max":
            group = grouped.amax(-1)
        else:
            group = _rank(_best(grouped, 2)[0].sum(-1))
        best_group, index = _best(group, topk_group)
        kept = torch.zeros_like(group, dtype=torch.bool).scatter(1, index, best_group > -torch.inf)
        inside = torch.where(kept[..., None], grouped, -torch.inf).flatten(1)
        best, ids = _best(inside, top_k)
        chosen = best > -torch.inf
    ids = torch.where(chosen, ids, -1).to(torch.int32)
    return ids, _weights(scores, ids, normalize, scale)


def _scores(logits: Tensor, score_func: str) -> Tensor:
    return torch.sigmoid(logits) if score_func == "sigmoid" else torch.softmax(logits, dim=-1)


def _weights(scores: Tensor, ids: Tensor, normalize: int, scale: float) -> Tensor:
    weights = torch.where(ids >= 0, scores.gather(1, ids.clamp(min=0).long()), 0.0)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


def weights_of(logits: Tensor, ids: Tensor, *, score_func: str, normalize: int, scale: float) -> Tensor:
    """The weights [T, k] that ``expert_route`` gives to the experts ``ids`` int32 [T, k] (-1: none), had it chosen them."""
    return _weights(_scores(logits, score_func), ids, normalize, scale)


def routed_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The chosen experts' SwiGLU, weighted (see ``bilevel.operators.reference.routed_experts``).

    Work grows with the chosen (token, expert) pairs: each expert runs once over the tokens that chose it.
    """
    contract.ROUTED_EXPERTS.bind_shapes([x.shape, ids.shape, weights.shape, gate_up.shape, down.shape])
    out = wide(torch.zeros_like(x))
    for expert in range(down.shape[0]):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        if not len(token):
            continue
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = wide(F.linear(F.silu(gate) * up, down[expert])) * weights[token, slot, None]
        out = out.index_add(0, token, y)
    return out.to(x.dtype)
