"""MiniMax-M3's sparse attention: a light indexer scores every token, a block counts as its best one.

Source: MiniMax-M3's ``minimax_m3_vl`` in transformers 5.23 (``MiniMaxM3VLIndexer``, ``MiniMaxM3VLAttention``), whose parameter
names are kept. For index head h, token t and earlier token s:

    q = rotate(norm(W_q x_t)_h)      k = rotate(norm(W_k x_s))      score(t, block) = max over s in block, s <= t, of q . k

One choice per index head, no scale (it would change no order). Tokens are masked before the maximum, so the open block is
scored by what is visible of it; the ``local_blocks`` most recent blocks are forced inside the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.contract import SCORED
from bilevel.operators.precision import wide
from bilevel.routers.parts import CachedAttention, OffsetNorm, blocks_of, heads, positions, rotate


class MsaRouter(nn.Module):
    """The indexer: routes int32 [B, heads, L, topk] and the cache of its keys."""

    def __init__(
        self, width: int, *, heads: int, head_dim: int, block_size: int, topk: int, local_blocks: int = 1,
        init_blocks: int = 0, rotary_channels: int, theta: float = 5e6, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.block_size, self.rotary_channels, self.theta = heads, block_size, rotary_channels, theta
        self.budget = {"topk": topk, "scored_topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, head_dim, bias=False)
        self.q_norm, self.k_norm = OffsetNorm(head_dim, eps), OffsetNorm(head_dim, eps)

    def forward(self, x: Tensor, index_keys: Tensor, past_len: Tensor, new_len: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, L, width]. index_keys: [B, 1, M, head_dim], M a multiple of block_size. Returns (routes, index_keys)."""
        position = positions(past_len, x.shape[1])
        query = rotate(self.q_norm(heads(self.q_proj(x), self.heads)), position, self.rotary_channels, self.theta)
        key = rotate(self.k_norm(heads(self.k_proj(x), 1)), position, self.rotary_channels, self.theta)
        index_keys = ops.write_cache(index_keys, key, past_len)
        scores = self.scores(query, index_keys, position)
        options = {"block_size": self.block_size, "partial_block": SCORED, "causal": 1}
        return ops.select_blocks(scores, past_len, new_len, **self.budget, **options), index_keys

    def scores(self, query: Tensor, index_keys: Tensor, position: Tensor) -> Tensor:
        """fp32 [B, heads, L, M / block_size]: of each block the best visible token; -inf where none is visible."""
        products = blocks_of(index_keys, self.block_size)  # checks the capacity
        products = wide(query) @ wide(products.flatten(2, 3)).mT
        token = torch.arange(index_keys.shape[2], device=query.device)
        visible = token <= position[:, None, :, None]
        return torch.where(visible, products, -torch.inf).unflatten(-1, (-1, self.block_size)).amax(-1)


class MsaAttention(CachedAttention):
    """A whole sparse attention layer of MiniMax-M3; three caches: keys, values, and the indexer's keys."""

    def __init__(
        self, width: int, router: MsaRouter, *, query_heads: int, kv_heads: int, head_dim: int, eps: float = 1e-6
    ) -> None:
        super().__init__(
            width,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_channels=router.rotary_channels,
            theta=router.theta,
            eps=eps,
        )
        self.indexer = router

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, index_keys: Tensor, past_len: Tensor, new_len: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: [B, L, width]. Returns (out, keys, values, index_keys)."""
        routes, index_keys = self.indexer(x, index_keys, past_len, new_len)
        return (*self.attend(x, routes, self.indexer.block_size, keys, values, past_len, new_len), index_keys)
