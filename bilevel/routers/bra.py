"""BiFormer's bi-level routing attention on images: regions choose regions, tokens attend in the chosen ones. Not causal.

Source: BiFormer (arXiv 2303.08810), section 3.2, and the op of the released checkpoints (rayleizhu/BiFormer,
``ops/bra_legacy.py``), whose parameter names and quirks this keeps: the image is padded before the projection, so padding takes
part as tokens of value bias; the scale at both levels is that of all channels, not of a head; a region's descriptor is the mean
over its tokens of all heads together. With S = regions^2 regions:

    scores = (mean of q over region i) * width^-0.5 . (mean of k over region j)        keep the topk best j for every i
    out = softmax attention of region i's tokens over the tokens of its kept regions, + depthwise convolution of v (LEPE)

A region is a block, and region i's own one is scored like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.contract import NEVER_SCORED
from bilevel.errors import ContractError
from bilevel.operators.precision import wide


class _QkvLinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)


class BiLevelRoutingAttention(nn.Module):
    """One attention layer. The image's height and width are fixed when it is exported, the batch is free."""

    def __init__(self, width: int, *, heads: int, regions: int = 7, topk: int = 4, convolution: int = 5) -> None:
        super().__init__()
        if topk > regions**2 or width % heads:
            raise ContractError(
                f"topk={topk} of {regions**2} regions and {width} channels in {heads} heads do not fit together"
            )
        self.width, self.heads, self.regions, self.topk = width, heads, regions, topk
        self.scale = float(width) ** -0.5
        self.qkv, self.wo = _QkvLinear(width), nn.Linear(width, width)
        self.lepe = nn.Conv2d(width, width, convolution, padding=convolution // 2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, height, width, channels] -> the same."""
        height, width = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, -width % self.regions, 0, -height % self.regions))
        q, k, v = self.qkv.qkv(x).chunk(3, dim=-1)
        local = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, tokens = self._by_region(q), self._by_region(k), self._by_region(v)
        out = self._attend(q, k, tokens, self.route(q, k))
        out = self._to_image(out, x.shape[1] // self.regions, x.shape[2] // self.regions)
        return self.wo(out + local)[:, :height, :width]

    def _by_region(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, S, tokens of a region, C], regions row by row."""
        rows = image.unflatten(1, (self.regions, -1)).unflatten(3, (self.regions, -1))
        return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _to_image(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """[B, S, height * width, C] -> [B, regions * height, regions * width, C]."""
        grid = tokens.unflatten(1, (self.regions, self.regions)).unflatten(3, (height, width))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        """int32 [B, 1, S, topk]: the regions that each region reads, a token of the selection for every region."""
        scores = ((wide(q).mean(2) * self.scale) @ wide(k).mean(2).mT)[:, None]
        past = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        options = {"block_size": 1, "topk": self.topk, "scored_topk": self.topk, "causal": 0}
        options |= {"init_blocks": 0, "local_blocks": 0, "partial_block": NEVER_SCORED}
        return ops.select_blocks(scores, past, past + q.shape[1], **options)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> Tensor:
        """q, k, v: [B, S, tokens of a region, C]; all tokens of a region read what the region chose."""
        size = q.shape[2]
        q, k, v = (x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        every = routes[:, :, :, None].expand(-1, -1, -1, size, -1).flatten(2, 3)
        past = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        options = {"block_size": size, "causal": 0, "scale": self.scale}
        out = ops.routed_attention(q, k, v, every, past, past + q.shape[2], **options)
        return out.transpose(1, 2).flatten(2).unflatten(1, (self.regions**2, size))
