"""Two-level expert routing and the chosen experts' work, vectorised and trainable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.operators.precision import wide
from bilevel.operators.reference import dequantise, gated, sqrt_softplus

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
    norm_floor: float = 0.0,
    zero_fill: int = 0,
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
        dropped = torch.where(grouped > -torch.inf, 0.0, -torch.inf) if zero_fill else -torch.inf
        inside = torch.where(kept[..., None], grouped, dropped).flatten(1)
        best, ids = _best(inside, top_k)
        chosen = best > -torch.inf
    ids = torch.where(chosen, ids, -1).to(torch.int32)
    return ids, _weights(scores, ids, normalize, scale, norm_floor)


def _scores(logits: Tensor, score_func: str) -> Tensor:
    if score_func == "sqrtsoftplus":
        return sqrt_softplus(logits)
    return torch.sigmoid(logits) if score_func == "sigmoid" else torch.softmax(logits, dim=-1)


def _weights(scores: Tensor, ids: Tensor, normalize: int, scale: float, norm_floor: float) -> Tensor:
    weights = torch.where(ids >= 0, scores.gather(1, ids.clamp(min=0).long()), 0.0)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20).clamp(min=norm_floor)
    return weights * scale


def weights_of(
    logits: Tensor, ids: Tensor, *, score_func: str, normalize: int, scale: float, norm_floor: float = 0.0
) -> Tensor:
    """The weights [T, k] that ``expert_route`` gives to the experts ``ids`` int32 [T, k] (-1: none), had it chosen them."""
    return _weights(_scores(logits, score_func), ids, normalize, scale, norm_floor)


def routed_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_scale: float = 1.0,
    limit: float = 0.0,
    up_shift: float = 0.0,
) -> Tensor:
    """The chosen experts' SwiGLU, weighted (see ``bilevel.operators.reference.routed_experts``).

    Work grows with the chosen (token, expert) pairs: they are sorted by expert, and each expert runs once over its own.
    PyTorch's grouped products do so without a loop over experts where they take the type: on a CPU, up to fp32.
    """
    contract.ROUTED_EXPERTS.bind_shapes([x.shape, ids.shape, weights.shape, gate_up.shape, down.shape])
    activation = functools.partial(gated, gate_scale=gate_scale, limit=limit, up_shift=up_shift)
    if x.device.type != "cpu" or x.dtype == torch.float64 or not _fits(x, gate_up, down):
        return _summed(x, ids, weights, down.shape[0], lambda expert: (gate_up[expert], down[expert]), activation)
    num_experts, kept = down.shape[0], ids.shape[1]
    expert = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).flatten().long()
    order = torch.sort(expert, stable=True).indices
    ends = torch.bincount(expert, minlength=num_experts + 1)[:num_experts].cumsum(0)
    order = order[: int(ends[-1])]  # the rest chose nobody
    if not len(order):
        return torch.zeros_like(x)
    token = order // kept
    offsets = ends.to(torch.int32)
    gate, up = F.grouped_mm(x.index_select(0, token), gate_up.mT, offs=offsets).chunk(2, dim=-1)
    y = wide(F.grouped_mm(activation(gate, up), down.mT, offs=offsets)) * weights.flatten()[order, None]
    return wide(torch.zeros_like(x)).index_add(0, token, y).to(x.dtype)


def _fits(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the grouped products take these: their rows must lie at multiples of 16 bytes."""
    return all(width * x.element_size() % 16 == 0 for width in (gate_up.shape[2], down.shape[2], gate_up.shape[1]))


def _summed(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    matrices: Callable[[int], tuple[Tensor, Tensor]],
    activation: Callable[[Tensor, Tensor], Tensor] = gated,
) -> Tensor:
    """The weighted sum, [T, d]. matrices: expert -> its gate_up [2f, d] and down [d, f], asked for those that some token
    chose. activation: of gate and up."""
    out = wide(torch.zeros_like(x))
    for expert in range(num_experts):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        if not len(token):
            continue
        gate_up, down = matrices(expert)
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        y = wide(F.linear(activation(gate, up), down)) * weights[token, slot, None]
        out = out.index_add(0, token, y)
    return out.to(x.dtype)


def check_packed_shapes(sizes: Mapping[str, int], bits: int, block_size: int) -> None:
    """Raise ContractError unless the packed rows are as long as the widths d and f = R/2 ask for. sizes: by the contract's
    symbols."""
    name = contract.ROUTED_EXPERTS_QUANTIZED.name
    if sizes["R"] % 2:
        raise ContractError(
            f"{name}: gate_up_codes has R={sizes['R']} rows, but gate and up have as many each; give an even number"
        )
    for letter, width in (("d", sizes["d"]), ("f", sizes["R"] // 2)):
        blocks = -(-width // block_size)
        expected = {f"S{letter}": blocks, f"P{letter}": blocks * block_size * bits // 8}
        for symbol, size in expected.items():
            if sizes[symbol] != size:
                raise ContractError(
                    f"{name}: {symbol}={sizes[symbol]}, but {letter}={width} in {bits} bits and blocks of {block_size} "
                    f"takes {size}; pad every row to whole blocks"
                )


def routed_experts_quantized(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor,
    down_codes: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor,
    *,
    bits: int,
    block_size: int,
) -> Tensor:
    """The same over packed weights (see ``bilevel.operators.reference.routed_experts_quantized``), unpacked expert by
    expert."""
    width = gate_up_codes.shape[1] // 2

    def matrices(expert: int) -> tuple[Tensor, Tensor]:
        gate_up = gate_up_codes[expert], gate_up_scales[expert], gate_up_zeros[expert]
        down = down_codes[expert], down_scales[expert], down_zeros[expert]
        pairs = (dequantise(*gate_up, x.shape[1], bits, block_size), dequantise(*down, width, bits, block_size))
        return pairs[0].to(x.dtype), pairs[1].to(x.dtype)

    return _summed(x, ids, weights, down_codes.shape[0], matrices)
