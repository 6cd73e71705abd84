"""How much of the attention that goes to an answer's place a choice of blocks keeps, head by head.

Recall of all attention misleads: most of it lies near by or is spread thin, and a few heads carry the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.export.route.facts import pack
from bilevel.export.route.rows import Case
from bilevel.export.route.walk import Choosers, Packed, ask, chosen_blocks, read, shared_step
from bilevel.model import CausalLM
from bilevel.operators.routing import head_map


@dataclass(frozen=True)
class Needles:
    """mass: [Y, Hq], mean attention of the dense model to the blocks that hold the answer, from the words that write it.

    kept: [Y, Hq], the share of that mass that lies in blocks which are read (1 in a dense layer).
    """

    mass: Tensor
    kept: Tensor

    @property
    def total(self) -> float:
        """The share kept of all heads' mass together."""
        return float((self.mass * self.kept).sum() / self.mass.sum())

    def strongest(self, count: int) -> list[tuple[int, int]]:
        """(layer, head) of the heads with the most mass."""
        flat = self.mass.flatten().topk(count).indices.tolist()
        return [divmod(index, self.mass.shape[1]) for index in flat]


@torch.inference_mode()
def needles(model: CausalLM, cases: Sequence[Case], choosers: Choosers) -> Needles:
    """Read contexts and questions densely, and compare what every layer attends to with what it would choose."""
    config = model.config
    kept, mass = torch.zeros(2, config.num_hidden_layers, config.num_attention_heads)
    size = next((chooser.block_size for chooser in choosers.values()), config.routing.block_size)
    count = 0
    for case in cases:
        packed = pack(case)
        prefix = read(model, torch.from_numpy(case.context), {})
        rows, sources = _asked(case, packed)
        count += len(rows)
        step = shared_step(config, packed.positions[None])

        def observe(index: int, plain_q: Tensor, plain_k: Tensor, q: Tensor, k: Tensor) -> None:
            weights = _weights(q[:, :, rows], prefix.keys[index], k, packed, rows, config)  # noqa: B023
            chooser = choosers.get(index)
            place = torch.div(sources, size, rounding_mode="floor")  # noqa: B023
            blocks = weights[..., : prefix.length].unflatten(-1, (-1, size)).sum(-1)  # noqa: B023
            needle = blocks.gather(-1, place[None, :, None].expand(len(blocks), -1, 1))[..., 0]
            mass[index] += needle.sum(1)
            if chooser is not None:
                query = chooser.keys.query(plain_q, q, step)  # noqa: B023
                chosen = chosen_blocks(chooser, query, chooser.pool(prefix.keys[index]), packed)[0, :, rows]  # noqa: B023
                chosen = chosen[head_map(len(needle), len(chosen))]
                needle = needle * chosen.gather(-1, place[None, :, None].expand(len(chosen), -1, 1))[..., 0]
            kept[index] += needle.sum(1)

        ask(model, prefix, packed, {}, observe=observe)
    return Needles(mass / count, kept / mass.clamp(min=1e-9))


def _asked(case: Case, packed: Packed) -> tuple[Tensor, Tensor]:
    """Places in the packed row of the words that write answers to facts, and where each answer's token stands."""
    rows: list[int] = []
    sources: list[int] = []
    for question, (_, end) in zip(case.questions, packed.bounds, strict=True):
        if question.is_fact:
            rows += range(end - question.num_answer, end)
            sources += question.sources.tolist()
    return torch.tensor(rows), torch.tensor(sources)


def _weights(q: Tensor, context: Tensor, own: Tensor, packed: Packed, rows: Tensor, config: ModelConfig) -> Tensor:
    """Attention weights [Hq, S, M + T] of queries [1, Hq, S, D] over the context's keys and the packed row's own."""
    keys = torch.cat([context, own], 2)[0].float()[head_map(q.shape[1], context.shape[1])]
    scores = q[0].float() @ keys.mT * config.attention_scale
    scores[..., context.shape[2] :].masked_fill_(~packed.own[rows], -torch.inf)
    return scores.softmax(-1)
