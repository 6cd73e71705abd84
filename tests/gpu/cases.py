"""Calls of the operators for ``make gpu-test``, made where the generator lives: a GPU or the CPU.

Whole numbers where a choice is made, so that scores are exact in every type and ties are common; ordinary numbers where
something is computed. Rows of different lengths, heads that do not nest, head dims that are no power of two, odd blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.gpu.machine import Attributes, Inputs

INF, NAN = torch.inf, torch.nan
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
ALL = (HALF, BRAIN, SINGLE)


def _int32(random: torch.Generator, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=random.device)


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device)


def _whole(random: torch.Generator, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.randint(low, high, shape, generator=random, device=random.device).to(dtype)


def _chance(random: torch.Generator, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=random, device=random.device)


@dataclass(frozen=True)
class Attention:
    """heads: Hq, Hkv, Hs. width: D. size: tokens in a block. lengths: L of the calls."""

    heads: tuple[int, int, int]
    width: int
    size: int
    blocks: int
    topk: int
    lengths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    causal: int = 1

    def call(self, random: torch.Generator, length: int, dtype: torch.dtype) -> tuple[Inputs, Attributes]:
        """Row 0 is full, row 1 short, row 2 idle; routes are unsorted, repeated, out of range or empty; the unseen is NaN."""
        heads, kv_heads, choices = self.heads
        capacity = self.size * self.blocks
        k, v = (_normal(random, 3, kv_heads, capacity, self.width) for _ in range(2))
        for x in (k, v):
            x[1, :, 3 + length // 2 :], x[2] = NAN, NAN
        routes = _whole(random, -2, self.blocks + 2, (3, choices, length, self.topk), torch.int32)
        routes[_chance(random, routes.shape[:3]) < 0.1] = -1
        inputs = {"q": _normal(random, 3, heads, length, self.width).to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
        inputs |= {"routes": routes, "past_len": _int32(random, capacity - length, 3, 0)}
        inputs |= {"new_len": _int32(random, length, length // 2, 0)}
        return inputs, {"block_size": self.size, "causal": self.causal, "scale": self.width**-0.5}


@dataclass(frozen=True)
class Route:
    """heads: Hr, Hk, Hs. width: Dr, on both sides of a slice of it."""

    heads: tuple[int, int, int]
    width: int
    size: int
    blocks: int
    topk: int
    lengths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    init: int = 1
    local: int = 1
    causal: int = 1
    candidates: int = 40

    def call(self, random: torch.Generator, length: int, dtype: torch.dtype, fine: bool) -> tuple[Inputs, Attributes]:
        """Whole numbers, NaN and infinities. Candidates are unsorted, repeated, missing and out of range."""
        route_heads, key_heads, choices = self.heads
        query = _whole(random, -2, 3, (3, route_heads, length, self.width))
        unit_key = _whole(random, -2, 3, (3, key_heads, self.blocks, self.width))
        # Where heads are summed, 2 * inf - 1 * inf has no value that every order of summation agrees on.
        for value in (NAN, INF, -INF) if route_heads == choices else (NAN,):
            for x in (query, unit_key):
                x[_chance(random, x.shape) < 0.05 / self.width] = value
        inputs = {"query": query.to(dtype), "unit_key": unit_key.to(dtype)}
        if fine:
            shape = (3, 1 if choices % 2 else choices // 2, length, self.candidates)
            inputs["candidates"] = _whole(random, -2, self.blocks + 3, shape, torch.int32)
        past = self.size * self.blocks - length
        inputs |= {"past_len": _int32(random, past, past // 3, 0), "new_len": _int32(random, length, length // 2, 0)}
        sizes = {"block_size": self.size, "topk": self.topk, "num_selection_heads": choices, "causal": self.causal}
        return inputs, {**sizes, "init_blocks": self.init, "local_blocks": self.local}

    def given(self, random: torch.Generator, length: int) -> tuple[Inputs, Attributes]:
        """SelectBlocks with as many choices: whole scores, NaN, infinities; only half of K for their score."""
        scores = _whole(random, -2, 3, (3, self.heads[2], length, self.blocks))
        for value in (NAN, INF, -INF):
            scores[_chance(random, scores.shape) < 0.05] = value
        past = self.size * self.blocks - length - min(1, self.size - 1)
        lengths = {"past_len": _int32(random, past, past // 3, 0), "new_len": _int32(random, length, length // 2, 0)}
        sizes = {"block_size": self.size, "topk": self.topk, "scored_topk": (self.topk + 1) // 2, "causal": self.causal}
        forced = {"init_blocks": self.init, "local_blocks": self.local - 1, "partial_block": self.blocks % 3}
        return {"scores": scores, **lengths}, {**sizes, **forced}


@dataclass(frozen=True)
class ExpertRoute:
    experts: int
    groups: int
    kept_groups: int
    topk: int
    score_func: str
    group_score: str
    normalize: int = 1
    norm_floor: float = 0.0
    zero_fill: int = 0

    def call(self, random: torch.Generator, tokens: int) -> tuple[Inputs, Attributes]:
        """Logits whose scores lie apart or tie; a bias of whole numbers, of NaN and of -inf."""
        values = torch.tensor([-2.0, 0.0, 1.0, 3.0], device=random.device)

        def pick(*shape: int) -> Tensor:
            return values[_whole(random, 0, 4, shape, torch.int64)]

        bias = _whole(random, -1, 2, (self.experts,))
        if self.group_score == "top2_sum":
            bias.zero_()  # (a + 1) + b and (b + 1) + a are equal numbers that round to two: no tie that both sides must see
        chance = _chance(random, bias.shape)
        bias[chance < 0.05], bias[chance > 0.95] = NAN, -INF
        inputs = {"logits": pick(tokens, self.experts), "group_logits": pick(tokens, self.groups), "select_bias": bias}
        attributes = {"top_k": self.topk, "topk_group": self.kept_groups, "normalize": self.normalize, "scale": 2.5}
        attributes |= {"norm_floor": self.norm_floor, "zero_fill": self.zero_fill}
        return inputs, {**attributes, "score_func": self.score_func, "group_score": self.group_score}


@dataclass(frozen=True)
class Experts:
    tokens: tuple[int, ...]
    kept: int
    experts: int
    width: int
    inner: int
    dtypes: tuple[torch.dtype, ...]

    def call(self, random: torch.Generator, tokens: int, dtype: torch.dtype) -> tuple[Inputs, Attributes]:
        """Ids -1, out of range and repeated, which count twice; nobody chose expert 0."""
        ids = _whole(random, 1, self.experts + 1, (tokens, self.kept), torch.int32)
        ids[_chance(random, ids.shape) < 0.1] = -1
        gate_up = _normal(random, self.experts, 2 * self.inner, self.width) * self.width**-0.5
        down = _normal(random, self.experts, self.width, self.inner) * self.inner**-0.5
        inputs = {"x": _normal(random, tokens, self.width).to(dtype), "ids": ids}
        inputs |= {"weights": _normal(random, tokens, self.kept), "gate_up": gate_up.to(dtype), "down": down.to(dtype)}
        odd = {"gate_scale": 1.702, "limit": 0.5, "up_shift": 1.0}
        return inputs, odd if self.experts % 2 else {"gate_scale": 1.0, "limit": 0.0, "up_shift": 0.0}


@dataclass(frozen=True)
class Cache:
    """heads: H. width: W; an update takes one program or several. lengths: L of the calls, at most ``capacity``."""

    heads: int
    width: int
    capacity: int
    lengths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def call(self, random: torch.Generator, length: int, dtype: torch.dtype) -> tuple[Inputs, Attributes]:
        """Rows whose update lies at the cache's beginning, ends where it ends, and reaches over its end."""
        cache = _normal(random, 3, self.heads, self.capacity, self.width).to(dtype)
        update = _normal(random, 3, self.heads, length, self.width).to(dtype)
        end = self.capacity - length
        return {"cache": cache, "update": update, "start": _int32(random, 0, end, end + (length + 1) // 2)}, {}


ATTENTION = (
    Attention((32, 8, 8), 128, 64, 64, 16, (1, 17, 150), ALL),
    Attention((16, 2, 2), 128, 64, 40, 16, (2, 130), (HALF,)),
    Attention((6, 3, 2), 80, 48, 9, 2, (1, 70), (BRAIN, SINGLE)),
    Attention((2, 1, 2), 32, 16, 200, 128, (3, 90), (HALF, SINGLE)),
    Attention((16, 1, 1), 256, 128, 9, 4, (4, 60), (HALF, SINGLE), causal=0),
    Attention((12, 4, 6), 96, 32, 24, 8, (16, 100), (BRAIN,)),
    Attention((4, 2, 2), 64, 5, 30, 4, (1, 40), (HALF,)),
)
ROUTES = (
    Route((32, 8, 8), 128, 64, 300, 16, (1, 100), ALL),
    Route((1, 1, 1), 768, 64, 600, 32, (8, 70), (HALF, SINGLE), candidates=32),
    Route((16, 2, 16), 64, 16, 200, 128, (3, 40), (BRAIN,)),
    Route((6, 3, 2), 20, 5, 6, 9, (1, 20), (SINGLE,), init=2, local=3, causal=0),
    Route((4, 2, 4), 3, 1, 60, 3, (1, 50), (HALF,), init=3, local=2),
    Route((16, 1, 1), 256, 128, 70, 24, (2, 50), (BRAIN,)),
)
EXPERT_ROUTES = (
    ExpertRoute(256, 8, 4, 8, "sigmoid", "top2_sum"),
    ExpertRoute(60, 6, 3, 5, "softmax", "max"),
    ExpertRoute(64, 1, 1, 6, "softmax", "external", normalize=0),
    ExpertRoute(8, 4, 3, 4, "sigmoid", "external"),
    ExpertRoute(1000, 10, 2, 16, "sigmoid", "max"),
    ExpertRoute(60, 6, 2, 9, "sqrtsoftplus", "max", norm_floor=20.0, zero_fill=1),
)
EXPERTS = (
    Experts((1, 7, 300, 3000), 8, 64, 512, 256, (HALF, BRAIN)),
    Experts((3, 70), 3, 6, 17, 40, ALL),
    Experts((5, 1100), 2, 5, 96, 80, (SINGLE,)),
)
CACHES = (
    Cache(8, 128, 4096, (1, 70), ALL),
    Cache(1, 2560, 300, (1, 5), (HALF,)),
    Cache(3, 5, 40, (2, 40), (SINGLE,)),
)
