"""DeepSeek-V3.2's lightning indexer (DSA): every token is a block, index heads are rectified and weighted.

Source: DeepSeek-V3.2-Exp's technical report, equation 1, and ``deepseek_v32`` in transformers 5.23 (``DeepseekV32Indexer``),
whose parameter names are kept. For token t and earlier token s:

    score(t, s) = sum over heads h of w_{t,h} relu(q_{t,h} . k_s / sqrt(head_dim))      w_t = W_w x_t / sqrt(heads)
    q = rotate(W_q c_t)_h, of the query's latent vector c      k = rotate(layer_norm(W_k x_s))

The release also turns q and k by a Hadamard matrix, which changes no product, and rounds them to fp8, which does; like
transformers this computes the unrounded scores. The ``topk`` best tokens are kept, none is forced. The attention that the model
runs over them is latent (MLA), which no operator here computes: a checkpoint of such a model is refused; the routes serve any
``routed_attention`` with block_size=1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.contract import NEVER_SCORED
from bilevel.operators.precision import wide
from bilevel.routers.parts import heads, positions, rotate


class DsaRouter(nn.Module):
    """The indexer: routes int32 [B, 1, L, topk], of blocks of one token, and the cache of its keys."""

    def __init__(
        self, width: int, latent_width: int, *, heads: int, head_dim: int, topk: int, rotary_channels: int, theta: float = 1e4
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.topk = heads, head_dim, topk
        self.rotary_channels, self.theta = rotary_channels, theta
        self.wq_b = nn.Linear(latent_width, heads * head_dim, bias=False)
        self.wk = nn.Linear(width, head_dim, bias=False)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(width, heads, bias=False)

    def forward(
        self, x: Tensor, latent: Tensor, index_keys: Tensor, past_len: Tensor, new_len: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x: [B, L, width]. latent: [B, L, latent_width]. index_keys: [B, 1, M, head_dim]. Returns (routes, index_keys)."""
        position = positions(past_len, x.shape[1])
        query = rotate(heads(self.wq_b(latent), self.heads), position, self.rotary_channels, self.theta)
        key = rotate(self.k_norm(self.wk(x))[:, None], position, self.rotary_channels, self.theta)
        index_keys = ops.write_cache(index_keys, key, past_len)
        options = {"block_size": 1, "topk": self.topk, "scored_topk": self.topk, "causal": 1}
        options |= {"init_blocks": 0, "local_blocks": 0, "partial_block": NEVER_SCORED}
        return ops.select_blocks(self.scores(x, query, index_keys), past_len, new_len, **options), index_keys

    def scores(self, x: Tensor, query: Tensor, index_keys: Tensor) -> Tensor:
        """fp32 [B, 1, L, M]."""
        products = torch.relu(wide(query) @ wide(index_keys).mT * self.head_dim**-0.5)
        weight = wide(self.weights_proj(x)) * self.heads**-0.5
        return (weight.transpose(1, 2)[..., None] * products).sum(1, keepdim=True)
