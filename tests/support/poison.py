"""Poison in every place that an operator must not read, and what must then stay as it was.

A place is poisoned where none of the *judged* rows reads it by the operator's definition: tokens outside their routes, behind
their position or behind the text; the queries and routes of rows that are none. Judging all rows poisons what nobody reads;
judging a single row also poisons what others read and it does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.operator_calls import Attributes, Inputs

POISONS = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
WORST = 2**31 - 1


class Poisoned(NamedTuple):
    """inputs: the poisoned ones. judged: bool, the rows of the output that must not change. read: for every input that has
    gradients, bool of its shape, where the judged rows read it."""

    inputs: Inputs
    judged: Tensor
    read: dict[str, Tensor]


def spoil(x: Tensor, read: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` with poison in the rows of its last axis that ``read`` (bool, without that axis) leaves out."""
    if x.dtype == torch.uint8:  # packed rows: any bytes, and a scale of NaN
        poison = torch.randint(256, x.shape, generator=generator, dtype=torch.uint8)
        poison[..., -1] = 255
        return torch.where(read[..., None], x, poison)
    poison = POISONS[torch.randint(len(POISONS), x.shape, generator=generator)].to(x.dtype)
    poison = torch.where(
        torch.rand(x.shape, generator=generator) < 0.5, poison, x
    )  # sums with both signs of infinity, and with one
    poison[..., 0] = POISONS[torch.randint(len(POISONS), x.shape[:-1], generator=generator)]
    return torch.where(read[..., None], x, poison)


def attention_reads(inputs: Inputs, attributes: Attributes) -> Tensor:
    """bool [B, Hq, L, M]: the tokens that each row reads, from the definition."""
    q, k, routes = inputs["q"], inputs["k"], inputs["routes"]
    (batch, heads, length), (capacity, size) = q.shape[:3], (k.shape[2], attributes["block_size"])
    reads = torch.zeros(batch, heads, length, capacity, dtype=torch.bool)
    for b in range(batch):
        past, new = int(inputs["past_len"][b]), int(inputs["new_len"][b])
        for i in range(new):
            horizon = past + i + 1 if attributes["causal"] else past + new
            for h in range(heads):
                for block in routes[b, h * routes.shape[1] // heads, i].tolist():
                    if 0 <= block < capacity // size:
                        reads[b, h, i, block * size : min((block + 1) * size, horizon)] = True
    return reads


def poison_attention(inputs: Inputs, attributes: Attributes, seed: int, *, single: bool) -> Poisoned:
    """A call of RoutedAttention. single: judge one row only, if there is one."""
    generator = torch.Generator().manual_seed(seed)
    reads = attention_reads(inputs, attributes)
    (batch, heads, length), kv_heads = inputs["q"].shape[:3], inputs["k"].shape[1]
    judged = (torch.arange(length) < inputs["new_len"][:, None])[:, None].expand(batch, heads, length).clone()
    idle = ~judged
    rows = judged.nonzero()
    if single and len(rows):
        b, h, i = rows[int(torch.randint(len(rows), (), generator=generator))].tolist()
        judged = torch.zeros_like(judged)
        judged[b, h, i] = True
    reads = (reads & judged[..., None]).any(2)
    tokens = torch.stack([reads[:, g * heads // kv_heads : (g + 1) * heads // kv_heads].any(1) for g in range(kv_heads)], 1)
    routes = inputs["routes"].clone()
    listed = judged.unflatten(1, (routes.shape[1], -1)).any(2)
    # Other rows' routes may be anything; where they stay, those rows read beside the judged ones.
    spoiled = torch.rand(listed.shape, generator=generator) < 0.3
    routes[~listed & (spoiled | idle.unflatten(1, (routes.shape[1], -1)).any(2))] = WORST
    poisoned = {**inputs, "routes": routes}
    read = {"q": judged, "k": tokens, "v": tokens}
    poisoned |= {name: spoil(inputs[name], where, generator) for name, where in read.items()}
    return Poisoned(poisoned, judged, read)
