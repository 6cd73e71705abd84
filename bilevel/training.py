"""Training two-level routing: the losses, the schedule and the evaluation. ``examples/train.py`` is a trainer built on them.

Top-k passes no gradient, so the two parts that only ever choose learn from the parts that compute:

    level 1's projection    follows level 2's block scores        :func:`level1_distillation`
    the group centroids     follow the experts' logits            :func:`group_distillation`

Both losses see detached word embeddings and detached teachers: they move nothing but the router that they teach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ops
from bilevel.errors import ConfigError
from bilevel.expert_layers import ExpertMLP
from bilevel.model import CausalLM
from bilevel.operators.precision import wide
from bilevel.operators.routing import block_mask, block_scores
from bilevel.state import Trace
from bilevel.word_router import unit


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors on the losses beside cross entropy."""

    level1: float = 1.0
    group: float = 0.1
    balance: float = 0.02


def training_loss(
    model: CausalLM, input_ids: Tensor, targets: Tensor, weights: LossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of every loss that the model's configuration calls for, and its (detached) parts by name.

    input_ids, targets: int64 [B, L], targets one token ahead. The parts are scalars: cross_entropy, level1, group, balance.
    """
    trace = Trace()
    logits = model(input_ids, trace)
    parts = {"cross_entropy": F.cross_entropy(wide(logits.flatten(0, 1)), targets.flatten())}
    factors = {"cross_entropy": 1.0, "level1": weights.level1, "group": weights.group, "balance": weights.balance}
    if model.config.routing.is_two_level and model.config.routing.route_dim:
        parts["level1"] = level1_distillation(model, input_ids, trace)
    if model.config.experts is not None:
        if model.config.experts.has_centroids:
            parts["group"] = group_distillation(model, input_ids, trace)
        balances = [load_balance(logits, ids) for logits, ids in zip(trace.expert_logits, trace.expert_ids, strict=True)]
        parts["balance"] = torch.stack(balances).mean()
    total = torch.stack([factors[name] * part for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def free_blocks(length: int, num_blocks: int, model: CausalLM, device: torch.device | None = None) -> Tensor:
    """bool [L, N]: the blocks that position t may choose, that is complete ones that are not kept in any case."""
    routing = model.config.routing
    position = torch.arange(length, device=device)[:, None]
    block = torch.arange(num_blocks, device=device)
    own = position // routing.block_size
    complete = (block + 1) * routing.block_size <= position + 1
    return complete & (block <= own - routing.local_blocks) & (block >= routing.init_blocks)


def level1_distillation(
    model: CausalLM, input_ids: Tensor, trace: Trace, *, temperature: float = 0.1, teacher_temperature: float = 0.5
) -> Tensor:
    """KL(level 2 || level 1) over the free blocks, averaged over the positions that have at least two; a scalar.

    input_ids: [B, L]. trace: that of the same text; query [B, Hr, L, Dr] and block_key [B, Hkv, N, Dr] of every routed
    layer teach.
    A top-k sees the order of a row of scores and not their scale, so each layer's and selection head's row is standardised
    before its softmax; the target is the mean of these softmaxes, the share of all choosers that want a block.
    ``temperature`` divides level 1's scores, which are cosines. Design: "trained by distillation from level 2's choice".
    """
    length, num_blocks = input_ids.shape[1], trace.block_key[0].shape[2]
    free = free_blocks(length, num_blocks, model, input_ids.device)
    contested = free.sum(-1) >= 2
    free = free[contested]
    if not len(free):
        return torch.zeros((), device=input_ids.device)
    with torch.no_grad():
        votes = [
            _standardised(block_scores(query[:, :, contested], key, model.config.num_selection_heads), free)
            .div(teacher_temperature)
            .softmax(-1)
            .mean(1)
            for query, key in zip(trace.query, trace.block_key, strict=True)
        ]
        target = torch.stack(votes).mean(0)
    seen = Trace()
    embed = nn.Embedding.from_pretrained(model.model.embed_tokens.weight.detach())
    past_len = torch.zeros(len(input_ids), dtype=torch.int32, device=input_ids.device)
    model.model.word_router(input_ids, past_len, torch.full_like(past_len, length), embed, None, seen)
    assert seen.word_query is not None and seen.word_block_key is not None
    scores = block_scores(seen.word_query[:, :, contested], seen.word_block_key, 1)[:, 0]
    student = (scores / temperature).masked_fill(~free, -torch.inf).log_softmax(-1)
    return _divergence(target, student.masked_fill(~free, 0.0))


def _standardised(scores: Tensor, free: Tensor) -> Tensor:
    """Scores [..., L, N] with mean 0 and variance 1 over each row's free blocks [L, N]; -inf elsewhere."""
    count = free.sum(-1, keepdim=True)
    centred = torch.where(free, scores - torch.where(free, scores, 0.0).sum(-1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return (centred / (spread + 1e-6)).masked_fill(~free, -torch.inf)


def _divergence(target: Tensor, log_student: Tensor) -> Tensor:
    """KL divergence over the last axis, averaged over all others; 0 log 0 is 0."""
    return (torch.xlogy(target, target) - target * log_student).sum(-1).mean()


def group_distillation(model: CausalLM, input_ids: Tensor, trace: Trace, *, temperature: float = 0.1) -> Tensor:
    """KL(group mass of the expert logits || the word's prior), averaged over expert layers and tokens; a scalar.

    A group's mass is the softmax over all experts' logits [T, E], summed over its members. The prior is the softmax of the
    cosines between the word embedding and the group's centroid, divided by ``temperature``; only the centroids learn.
    """
    words = unit(model.model.embed_tokens.weight.detach()[input_ids.flatten()])
    mlps = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, ExpertMLP)]
    losses = []
    for mlp, logits in zip(mlps, trace.expert_logits, strict=True):
        if mlp.gate.by_table:
            continue
        centroid = mlp.gate.group_centroid
        mass = logits.detach().softmax(-1).unflatten(1, (len(centroid), -1)).sum(-1)
        prior = F.linear(words, unit(centroid)) / temperature
        losses.append(_divergence(mass, prior.log_softmax(-1)))
    return torch.stack(losses).mean()


def load_balance(logits: Tensor, ids: Tensor) -> Tensor:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, equation 4, without its factor alpha); 1 when balanced.

    logits: fp32 [T, E]. ids: int32 [T, k], the chosen experts. E times the sum over experts of (share of the choices) times
    (mean probability); with k > 1 the shares are of all T*k choices.
    """
    num_experts = logits.shape[1]
    share = expert_load(ids, num_experts)
    return num_experts * (share * logits.softmax(-1).mean(0)).sum()


def expert_load(ids: Tensor, num_experts: int) -> Tensor:
    """fp32 [E]: each expert's share of the choices in ids [T, k]; -1 is no choice."""
    counts = torch.bincount(ids[ids >= 0].long(), minlength=num_experts).float()
    return counts / counts.sum().clamp(min=1)


def learning_rate(step: int, num_steps: int, *, peak: float, warmup: int = 50, floor: float = 0.05) -> float:
    """Linear warm-up to ``peak`` in ``warmup`` steps, then half a cosine down to ``floor * peak`` at the last step."""
    if not 0 <= step < num_steps:
        raise ConfigError(f"step={step} is outside the schedule of {num_steps} steps; lengthen the schedule")
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def initialise(model: CausalLM) -> None:
    """Start every layer as the identity: what attention, MLP and experts add to the stream begins at zero.

    A small model on few tokens learns markedly faster so (nanochat and modded-nanogpt do the same).
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            nn.init.zeros_(parameter)
        elif name.endswith("gate_up_proj"):
            nn.init.normal_(parameter, std=(3 * parameter.shape[-1]) ** -0.5)  # as nn.Linear's own
    nn.init.normal_(model.model.embed_tokens.weight, std=0.05)


def make_optimizer(model: CausalLM, *, peak: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); norms, biases and the group centroids (whose length means nothing) do not decay."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.dim() < 2 or name.endswith("group_centroid") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def train_step(
    model: CausalLM, optimizer: torch.optim.Optimizer, input_ids: Tensor, targets: Tensor, *, lr: float, weights: LossWeights
) -> dict[str, float]:
    """One update with gradients clipped to norm 1; returns the losses by name, and the norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    total, parts = training_loss(model, input_ids, targets, weights)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {**{name: part.item() for name, part in parts.items()}, "gradient_norm": norm.item()}


@torch.no_grad()
def heldout_loss(model: CausalLM, windows: Tensor, *, batch_size: int = 4) -> tuple[float, int]:
    """Mean cross entropy (nats per token) and the number of predicted tokens. windows: int64 [n, L + 1]."""
    total = 0.0
    for batch in windows.split(batch_size):
        logits = model(batch[:, :-1])
        total += F.cross_entropy(wide(logits.flatten(0, 1)), batch[:, 1:].flatten(), reduction="sum").item()
    count = windows.shape[0] * (windows.shape[1] - 1)
    return total / count, count


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Shares of level 2's unrestricted choices that level 1's candidates contained, in one layer.

    all: every choice. free: without the blocks that are kept in any case. contested: the free ones at positions where level 1
    had to leave a block out; elsewhere it cannot miss. chance: what random candidates would reach on ``contested``.
    A share of no choices at all is NaN.
    """

    all: float
    free: float
    contested: float
    chance: float


@torch.no_grad()
def candidate_recall(model: CausalLM, windows: Tensor, *, batch_size: int = 4) -> list[Recall]:
    """One :class:`Recall` per routed layer over texts int64 [n, L]. Unrestricted: the top K2 of all visible blocks."""
    if not model.config.routing.is_two_level:
        raise ConfigError(f"the preset {model.config.routing.preset!r} has no level 1, so no recall; give a two_level model")
    hits, choices = torch.zeros(2, len(model.config.routed_layers), 4, dtype=torch.float64)
    for batch in windows.split(batch_size):
        trace = Trace()
        model(batch, trace)
        assert trace.candidates is not None
        offered = block_mask(trace.candidates, trace.block_key[0].shape[2])
        for layer, (query, key) in enumerate(zip(trace.query, trace.block_key, strict=True)):
            new_hits, new_choices = _count_recall(model, _unrestricted(model, query, key), offered)
            hits[layer] += new_hits
            choices[layer] += new_choices
    return [Recall(all=row[0], free=row[1], contested=row[2], chance=row[3]) for row in (hits / choices).tolist()]


def _unrestricted(model: CausalLM, query: Tensor, key: Tensor) -> Tensor:
    """bool [B, Hs, L, N]: level 2's choice among every visible block."""
    routing = model.config.routing
    past_len = torch.zeros(len(query), dtype=torch.int32, device=query.device)
    routes = ops.coarse_route(
        query,
        key,
        past_len,
        torch.full_like(past_len, query.shape[2]),
        block_size=routing.block_size,
        topk=routing.topk,
        num_selection_heads=model.config.num_selection_heads,
        init_blocks=routing.init_blocks,
        local_blocks=routing.local_blocks,
        causal=1,
    )
    return block_mask(routes, key.shape[2])


def _count_recall(model: CausalLM, chosen: Tensor, offered: Tensor) -> tuple[Tensor, Tensor]:
    """Hits and choices, fp64 [4] each, in the order of :class:`Recall`. chosen [B, Hs, L, N], offered [B, 1, L, N]."""
    free = free_blocks(chosen.shape[2], chosen.shape[3], model, chosen.device)
    free_choices = chosen & free
    contested = (free & ~offered).any(-1, keepdim=True)
    odds = (free & offered).sum(-1, keepdim=True).double() / free.sum(-1, keepdim=True).clamp(min=1)
    sets = (chosen, free_choices, free_choices & contested)
    hits = [(each & offered).sum() for each in sets] + [(sets[2] * odds).sum()]
    choices = [each.sum() for each in sets] + [sets[2].sum()]
    return torch.stack([x.double() for x in hits]), torch.stack([x.double() for x in choices])


@torch.no_grad()
def expert_loads(model: CausalLM, windows: Tensor, *, batch_size: int = 4) -> dict[int, list[float]]:
    """Each expert's share of the choices over texts int64 [n, L], by index of the expert layer."""
    experts = model.config.experts
    if experts is None:
        raise ConfigError('the model has no expert layers, so no expert load; give one whose config.json has "experts"')
    traces = []
    for batch in windows.split(batch_size):
        traces.append(Trace())
        model(batch, traces[-1])
    layers = sorted(experts.layers)
    chosen = [torch.cat([trace.expert_ids[i] for trace in traces]) for i in range(len(layers))]
    return {layer: expert_load(ids, experts.num_experts).tolist() for layer, ids in zip(layers, chosen, strict=True)}
