"""Qwen4-Exp's sparse attention (QSA): small blocks of averaged index keys, scored by rectified products summed over heads.

Source: ``qwen4_exp`` in transformers 5.23 (``Qwen4ExpTextQSAIndexer``, ``Qwen4ExpTextAttention``), whose parameter names are
kept. For a complete block b of ``block_size`` tokens:

    k_b = rotate(norm(mean over s in b of W_k x_s), at the block's first position)
    score(t, b) = sum over index heads h of relu(q_h . k_b) / sqrt(head_dim)        q_h = rotate(norm(W_q x_t)_h)

One choice for all heads: the ``budget / block_size`` best complete blocks, and the open block beside them. Rectified scores tie
at 0 easily; the lower block then wins here, whereas torch.topk promises no order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.contract import ALWAYS_KEPT
from bilevel.errors import ContractError
from bilevel.operators.precision import wide
from bilevel.routers.parts import CachedAttention, OffsetNorm, blocks_of, heads, positions, rotate


class QsaRouter(nn.Module):
    """The indexer: routes int32 [B, 1, L, budget / block_size + 1] and the cache of its raw keys."""

    def __init__(
        self, width: int, *, heads: int, head_dim: int, block_size: int, budget: int, rotary_channels: int,
        theta: float = 1e7, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        if budget < block_size or budget % block_size:
            raise ContractError(f"the budget of {budget} tokens is no multiple of block_size={block_size}; give whole blocks")
        self.heads, self.head_dim, self.block_size = heads, head_dim, block_size
        self.kept, self.rotary_channels, self.theta = budget // block_size, rotary_channels, theta
        self.index_qk_proj = nn.Linear(width, (heads + 1) * head_dim, bias=False)
        self.q_layernorm, self.k_layernorm = OffsetNorm(head_dim, eps), OffsetNorm(head_dim, eps)

    def forward(self, x: Tensor, index_keys: Tensor, past_len: Tensor, new_len: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, L, width]. index_keys: [B, 1, M, head_dim], M a multiple of block_size. Returns (routes, index_keys)."""
        query, key = heads(self.index_qk_proj(x), self.heads + 1).split([self.heads, 1], dim=1)
        query = rotate(self.q_layernorm(query), positions(past_len, x.shape[1]), self.rotary_channels, self.theta)
        index_keys = ops.write_cache(index_keys, key, past_len)
        options = {"block_size": self.block_size, "topk": self.kept + 1, "scored_topk": self.kept, "causal": 1}
        options |= {"init_blocks": 0, "local_blocks": 0, "partial_block": ALWAYS_KEPT}
        return ops.select_blocks(self.scores(query, index_keys), past_len, new_len, **options), index_keys

    def scores(self, query: Tensor, index_keys: Tensor) -> Tensor:
        """fp32 [B, 1, L, M / block_size]. Those of blocks that are not complete mean nothing, and nobody reads them."""
        pooled = wide(blocks_of(index_keys, self.block_size)).mean(3).to(index_keys.dtype)
        first = torch.arange(pooled.shape[2], device=query.device)[None] * self.block_size
        place = first.expand(query.shape[0], -1)
        block_keys = rotate(self.k_layernorm(pooled), place, self.rotary_channels, self.theta)
        products = torch.relu(wide(query) @ wide(block_keys).mT)
        return products.sum(1, keepdim=True) / self.head_dim**0.5


class QsaAttention(CachedAttention):
    """A whole sparse attention layer of Qwen4-Exp, its output gated; three caches: keys, values, and the indexer's keys."""

    def __init__(
        self, width: int, router: QsaRouter, *, query_heads: int, kv_heads: int, head_dim: int, eps: float = 1e-6
    ) -> None:
        super().__init__(
            width,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_channels=router.rotary_channels,
            theta=router.theta,
            eps=eps,
            gated=True,
        )
        self.indexer = router

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, index_keys: Tensor, past_len: Tensor, new_len: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: [B, L, width]. Returns (out, keys, values, index_keys)."""
        routes, index_keys = self.indexer(x, index_keys, past_len, new_len)
        return (*self.attend(x, routes, self.indexer.block_size, keys, values, past_len, new_len), index_keys)
