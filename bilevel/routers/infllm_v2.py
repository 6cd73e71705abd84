"""InfLLM-V2, the sparse attention of MiniCPM4: probabilities over overlapping windows, whose sum is taken from coarser ones.

Source: InfLLM-V2 (arXiv 2509.24663), section 3, and the kernels of OpenBMB/infllmv2_cuda_impl, whose definition this is where
the two differ (the budget). The router has no parameters; it reads the model's own rotated queries and cached keys. Of each
key/value head, window j holds the mean of keys [j*stride, j*stride + window), coarse window c that of keys
[c*4*stride, c*4*stride + 4*window); position t sees a window whose last token is not after t.

    p_{h,j} = exp(q_h . k_j * scale) / sum over visible coarse windows c of exp(q_h . k_c * scale)
    score(t, b) = max over j in the windows that reach into block b of the sum of p_{h,j} over the query heads h of the group

Where no coarse window is visible yet, every score is 0. Windows that reach into block b are r*b - pad .. r*b + r - 1 with
r = block_size / stride and pad = window / stride - 1. Neighbouring blocks share windows: their scores tie exactly and often.
``local_blocks`` counts the own block: MiniCPM4's window_size of 2048 tokens is 33 blocks of 64 here, 32 and the own one; its
topk of 64 lies beside the 32: 96. Prefill keeps the rule that decoding has, whatever the length is modulo 16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.contract import NEVER_SCORED
from bilevel.errors import ContractError
from bilevel.operators.precision import wide
from bilevel.routers.parts import blocks_of, positions

COARSER = 4  # a coarse window is so much longer, and steps so much further, than a fine one


class InfLlmV2Router(nn.Module):
    """Routes int32 [B, Hkv, L, topk] from queries and the cache of keys."""

    def __init__(
        self, *, block_size: int = 64, window: int = 32, stride: int = 16, topk: int = 96, init_blocks: int = 1,
        local_blocks: int = 33, scale: float,
    ) -> None:  # fmt: skip
        super().__init__()
        if window % stride or block_size % (COARSER * stride):
            raise ContractError(
                f"window={window} must be a multiple of stride={stride}, and block_size={block_size} one of {COARSER * stride}"
            )
        self.block_size, self.window, self.stride, self.scale = block_size, window, stride, scale
        self.budget = {"topk": topk, "scored_topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}

    def forward(self, query: Tensor, keys: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        """query: [B, Hq, L, D], rotated. keys: [B, Hkv, M, D], M a multiple of block_size, these tokens' already written."""
        scores = self.scores(query, keys, positions(past_len, query.shape[2]))
        options = {"block_size": self.block_size, "partial_block": NEVER_SCORED, "causal": 1}
        return ops.select_blocks(scores, past_len, new_len, **self.budget, **options)

    def scores(self, query: Tensor, keys: Tensor, position: Tensor) -> Tensor:
        """fp32 [B, Hkv, L, M / block_size]."""
        groups = wide(query).unflatten(1, (keys.shape[1], -1)) * self.scale  # [B, Hkv, G, L, D]
        fine, fine_seen = self._products(groups, keys, self.window, self.stride, position)
        coarse, coarse_seen = self._products(groups, keys, COARSER * self.window, COARSER * self.stride, position)
        coarse = torch.where(coarse_seen, coarse, -torch.inf)
        most = coarse.amax(-1, keepdim=True)
        any_seen = most > -torch.inf
        most = torch.where(any_seen, most, 0.0)  # exp(-inf - -inf) would be NaN
        total = torch.where(coarse_seen, torch.exp(coarse - most), 0.0).sum(-1, keepdim=True)
        share = torch.exp(torch.where(fine_seen, fine - most, -torch.inf)) / torch.where(any_seen, total, 1.0)
        share = torch.where(any_seen, share, 0.0).sum(2)
        return self._block_maxima(share, keys.shape[2] // self.block_size)

    def _products(self, groups: Tensor, keys: Tensor, window: int, stride: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """(products [B, Hkv, G, L, W] with the means of all windows that fit, which of them a position sees [B, 1, 1, L, W]).

        A window is a row of ``window / stride`` neighbouring steps; at least one is there, visible or not.
        """
        steps = wide(blocks_of(keys, stride)).sum(3)
        parts = window // stride
        steps = nn.functional.pad(steps, (0, 0, 0, parts - 1))
        count = keys.shape[2] // stride
        summed = steps[:, :, :count]
        for part in range(1, parts):
            summed = summed + steps[:, :, part : part + count]
        mean = wide((summed / window).to(keys.dtype))[:, :, None]
        last = torch.arange(count, device=keys.device) * stride + window - 1
        return groups @ mean.mT, last <= position[:, None, None, :, None]

    def _block_maxima(self, share: Tensor, num_blocks: int) -> Tensor:
        """[B, Hkv, L, N] from the windows' shares [B, Hkv, L, W], which are at least 0."""
        ratio, pad = self.block_size // self.stride, self.window // self.stride - 1
        padded = nn.functional.pad(share, (pad, 0))
        best = padded[..., pad:].unflatten(-1, (num_blocks, ratio)).amax(-1)
        for before in range(1, pad + 1):  # windows that begin before the block and reach into it
            best = torch.maximum(best, padded[..., pad - before :: ratio][..., :num_blocks])
        return best
