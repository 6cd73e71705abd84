"""The published routers as small attention layers of one form: caches in and out, random weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.routers.dsa import DsaRouter
from bilevel.routers.infllm_v2 import InfLlmV2Router
from bilevel.routers.msa import MsaAttention, MsaRouter
from bilevel.routers.parts import heads, positions, rotate
from bilevel.routers.qsa import QsaAttention, QsaRouter

WIDTH, CAPACITY, LATENT = 32, 96, 12
QUERY_HEADS, KV_HEADS, HEAD_DIM, ROTARY = 4, 2, 16, 8
SIZES = {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
Step = tuple[Tensor, list[Tensor]]  # output [B, L, WIDTH], caches


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter is drawn, norms' too, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


class PlainAttention(nn.Module):
    """Rotated queries and keys over routes that a router gives."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(QUERY_HEADS * HEAD_DIM, WIDTH, bias=False)

    def project(self, x: Tensor, keys: Tensor, values: Tensor, past_len: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = heads(self.qkv(x), QUERY_HEADS + 2 * KV_HEADS).split([QUERY_HEADS, KV_HEADS, KV_HEADS], dim=1)
        query, key = (rotate(part, positions(past_len, x.shape[1]), ROTARY, 1e4) for part in split[:2])
        return query, ops.write_cache(keys, key, past_len), ops.write_cache(values, split[2], past_len)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, routes: Tensor, past_len: Tensor, new_len: Tensor, block_size: int
    ) -> Tensor:
        options = {"block_size": block_size, "causal": 1, "scale": HEAD_DIM**-0.5}
        out = ops.routed_attention(q, keys, values, routes, past_len, new_len, **options)
        return self.out(out.transpose(1, 2).flatten(2))


class Msa(nn.Module):
    cache_heads = (KV_HEADS, KV_HEADS, 1)

    def __init__(self) -> None:
        super().__init__()
        router = MsaRouter(WIDTH, heads=2, head_dim=HEAD_DIM, block_size=8, topk=3, rotary_channels=ROTARY, theta=1e4)
        self.attention = MsaAttention(WIDTH, router, **SIZES)

    def forward(self, x: Tensor, caches: list[Tensor], past_len: Tensor, new_len: Tensor) -> Step:
        out, *caches = self.attention(x, *caches, past_len, new_len)
        return out, caches


class Qsa(nn.Module):
    cache_heads = (KV_HEADS, KV_HEADS, 1)

    def __init__(self) -> None:
        super().__init__()
        router = QsaRouter(WIDTH, heads=3, head_dim=HEAD_DIM, block_size=4, budget=12, rotary_channels=ROTARY, theta=1e4)
        self.attention = QsaAttention(WIDTH, router, **SIZES)

    def forward(self, x: Tensor, caches: list[Tensor], past_len: Tensor, new_len: Tensor) -> Step:
        out, *caches = self.attention(x, *caches, past_len, new_len)
        return out, caches


class Dsa(nn.Module):
    cache_heads = (KV_HEADS, KV_HEADS, 1)

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.latent = PlainAttention(), nn.Linear(WIDTH, LATENT, bias=False)
        self.indexer = DsaRouter(WIDTH, LATENT, heads=3, head_dim=HEAD_DIM, topk=7, rotary_channels=ROTARY)

    def forward(self, x: Tensor, caches: list[Tensor], past_len: Tensor, new_len: Tensor) -> Step:
        keys, values, index_keys = caches
        q, keys, values = self.attention.project(x, keys, values, past_len)
        routes, index_keys = self.indexer(x, self.latent(x), index_keys, past_len, new_len)
        return self.attention.attend(q, keys, values, routes, past_len, new_len, 1), [keys, values, index_keys]


class InfLlmV2(nn.Module):
    cache_heads = (KV_HEADS, KV_HEADS)

    def __init__(self) -> None:
        super().__init__()
        self.attention = PlainAttention()
        self.router = InfLlmV2Router(
            block_size=16, window=8, stride=4, topk=4, init_blocks=1, local_blocks=2, scale=HEAD_DIM**-0.5
        )

    def forward(self, x: Tensor, caches: list[Tensor], past_len: Tensor, new_len: Tensor) -> Step:
        q, keys, values = self.attention.project(x, *caches, past_len)
        routes = self.router(q, keys, past_len, new_len)
        return self.attention.attend(q, keys, values, routes, past_len, new_len, 16), [keys, values]


LAYERS: dict[str, type[Msa | Qsa | Dsa | InfLlmV2]] = {"msa": Msa, "qsa": Qsa, "dsa": Dsa, "infllm_v2": InfLlmV2}


def empty_caches(layer: nn.Module, batch: int, fill: float = 0.0) -> list[Tensor]:
    return [torch.full((batch, count, CAPACITY, HEAD_DIM), fill) for count in layer.cache_heads]


def lengths(past: Iterable[int], new: Iterable[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(list(past), dtype=torch.int32), torch.tensor(list(new), dtype=torch.int32)
