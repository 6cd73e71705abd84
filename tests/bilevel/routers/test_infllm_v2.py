"""InfLLM-V2's scores against their definition in loops, and its published budget."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bilevel import ops
from bilevel.routers.infllm_v2 import InfLlmV2Router
from tests.support.router_layers import lengths


def slow_score(router: InfLlmV2Router, query: Tensor, keys: Tensor, t: int, b: int) -> float:
    """The score of block ``b`` for position ``t`` and one key/value head. query: [G, D]. keys: [M, D]."""
    window, stride, size, scale = router.window, router.stride, router.block_size, router.scale

    def visible_means(width: int, step: int) -> dict[int, Tensor]:
        return {j: keys[j * step : j * step + width].mean(0) for j in range(t + 1) if j * step + width - 1 <= t}

    fine, coarse = visible_means(window, stride), visible_means(4 * window, 4 * stride)
    if not coarse:
        return 0.0
    best = 0.0
    for j, mean in fine.items():
        if j * stride < (b + 1) * size and j * stride + window > b * size:
            share = 0.0
            for q in query:
                total = sum(math.exp(float(q @ other) * scale) for other in coarse.values())
                share += math.exp(float(q @ mean) * scale) / total
            best = max(best, share)
    return best


@pytest.mark.parametrize(("window", "stride", "size"), [(8, 4, 16), (12, 2, 8), (4, 4, 32)])
def test_scores_equal_the_definition(window: int, stride: int, size: int) -> None:
    router = InfLlmV2Router(block_size=size, window=window, stride=stride, topk=3, local_blocks=1, scale=0.3)
    query, keys = torch.randn(1, 6, 70, 5, dtype=torch.float64), torch.randn(1, 2, 96, 5, dtype=torch.float64)
    found = router.scores(query, keys, torch.arange(70)[None])
    for t in (0, window - 1, 4 * window - 2, 4 * window - 1, 47, 69):
        for g in range(2):
            for b in range(t // size + 1):
                expected = slow_score(router, query[0, 3 * g : 3 * g + 3, t], keys[0, g], t, b)
                assert float(found[0, g, t, b]) == pytest.approx(expected, rel=1e-12), (t, g, b)


def test_minicpm4s_budget() -> None:
    """One initial block, 33 local ones with the own one, 62 free: 96 of 64 tokens; all of them while there are no more."""
    router = InfLlmV2Router(scale=1.0)
    query, keys = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 64 * 120, 4)
    routes = router(query, keys, *lengths([64 * 110], [3]))
    assert routes.shape == (1, 1, 3, 96)
    kept = set(routes[0, 0, 0].tolist())
    assert {0, *range(78, 111)} <= kept and len(kept) == 96
    short = router(query, keys, *lengths([64 * 50], [3]))
    assert short[0, 0, 0].tolist() == [*range(51)] + [-1] * 45


def test_neighbours_that_share_their_best_window_tie_exactly() -> None:
    """The window that reaches into two blocks gives both its share, bit by bit; the lower block is kept."""
    router = InfLlmV2Router(block_size=16, window=8, stride=4, topk=2, init_blocks=0, local_blocks=1, scale=1.0)
    keys = torch.zeros(1, 1, 96, 4)
    keys[:, :, 44:52] = 3.0  # the window behind block 2's last step
    with ops.recorded() as calls:
        routes = router(torch.ones(1, 1, 1, 4), keys, *lengths([95], [1]))
    scores = calls[0].tensors[0][0, 0, 0]
    assert scores[2] == scores[3] > scores[[0, 1, 4, 5]].max()
    assert routes.flatten().tolist() == [2, 5]
