"""Training the gates of all layers from the teacher's files (SeerAttention-R, arXiv 2506.08889: the model frozen, its attention
weights' block maxima the target)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.export.route.gates import GateStack


@dataclass(frozen=True)
class Measure:
    """How well scores choose, averaged over layers, heads and words. Shares of what the best choice of as many blocks gets.

    recall: of the words' attention peaks. needle: how often the block that an answer stands in is chosen, weighted by its
    peak. needle_heads: the same per layer and head, [Y, Hkv].
    """

    recall: float
    needle: float
    needle_heads: Tensor


def free_blocks(rows: Tensor, num_blocks: int, config: ModelConfig) -> Tensor:
    """bool [S, N]: complete blocks that the words at positions ``rows`` [S] may choose and that are not kept anyway."""
    routing = config.routing
    block = torch.arange(num_blocks, device=rows.device)
    own = torch.div(rows, routing.block_size, rounding_mode="floor")[:, None]
    return (block <= own - max(routing.local_blocks, 1)) & (block >= routing.init_blocks)


def loss(scores: Tensor, peak: Tensor, free: Tensor, *, power: float) -> Tensor:
    """Cross entropy between a word's free blocks' peaks and the softmax of their scores; a scalar.

    scores, peak: [Y, Hkv, S, N]. A word counts by its free peaks' sum to the power ``power``: 0: all the same, 1: as its
    attention to far blocks.
    """
    target = torch.where(free, peak, 0.0)
    total = target.sum(-1, keepdim=True)
    weight = total.clamp(min=1e-6).pow(power - 1)
    log_p = scores.masked_fill(~free, -torch.inf).log_softmax(-1).masked_fill(~free, 0.0)
    return -(weight * target * log_p).sum((-2, -1)).mean() / (weight * total).sum((-2, -1)).mean().detach()


def step(gates: GateStack, lesson: dict[str, Tensor], *, power: float) -> Tensor:
    """The loss of one row's lesson."""
    scores, peak, free = _scored(gates, lesson)
    return loss(scores, peak, free, power=power)


def _scored(gates: GateStack, lesson: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    index = list(gates.layers)
    query, pooled, peak = (lesson[name][index].float() for name in ("query", "pooled", "peak"))
    free = free_blocks(lesson["rows"], pooled.shape[2], gates.config)
    return gates(query, pooled, lesson["rows"]), peak, free


@torch.no_grad()
def measure(gates: GateStack, lessons: list[dict[str, Tensor]]) -> Measure:
    """How well the gates choose as many free blocks as the budget leaves."""
    routing = gates.config.routing
    count = max(1, routing.topk - routing.init_blocks - routing.local_blocks)
    recalls, hits, all_needles = [], [], []
    for lesson in lessons:
        scores, peak, free = _scored(gates, lesson)
        chosen = torch.zeros_like(free.expand_as(scores))
        chosen.scatter_(-1, scores.masked_fill(~free, -torch.inf).topk(count, -1).indices, True)
        far = torch.where(free, peak, 0.0)
        best = far.topk(count, -1).values.sum((-2, -1))
        recalls.append((far * chosen).sum((-2, -1)) / best.clamp(min=1e-9))
        block = torch.div(lesson["sources"], routing.block_size, rounding_mode="floor")
        asked = (lesson["sources"] >= 0) & free.gather(-1, block.clamp(min=0)[:, None])[:, 0]
        index = block[asked][None, None, :, None].expand(*peak.shape[:2], -1, 1)
        needle = peak[:, :, asked].gather(-1, index)[..., 0]
        hits.append((needle * chosen[:, :, asked].gather(-1, index)[..., 0]).sum(-1))
        all_needles.append(needle.sum(-1))
    hit, total = torch.stack(hits).sum(0), torch.stack(all_needles).sum(0)
    heads = hit / total.clamp(min=1e-9)
    return Measure(float(torch.stack(recalls).mean()), float(hit.sum() / total.sum().clamp(min=1e-9)), heads)
