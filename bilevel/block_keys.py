"""What level 2 compares (``routing.key``): of each word a query, of each block a key, their product the block's score.

Every kind is a pair of vectors, so that the contract's CoarseRoute and FineRoute need to know none of them, and every kind is
made from the layer's key cache alone: any cut of a text into calls gives the same keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ops
from bilevel.bundle.cache_rows import CacheRows
from bilevel.config import ModelConfig
from bilevel.operators.precision import wide
from bilevel.rotary import apply_rotary
from bilevel.state import Step


class MeanKeys(nn.Module):
    """The mean of the block's keys against each query head (MoBA, arXiv 2502.13189)."""

    def __init__(self, config: ModelConfig, has_positions: bool) -> None:
        super().__init__()
        self.config, self.has_positions = config, has_positions

    def query(self, plain: Tensor, turned: Tensor, step: Step) -> Tensor:
        """[B, Hr, L, Dr] from the layer's queries [B, Hq, L, D] before and after rotation."""
        return turned

    def blocks(self, keys: Tensor, first: Tensor, num_blocks: int) -> Tensor:
        """Blocks [B, Hkv, num_blocks, R, D] of the key cache from each row's ``first`` [B] on; of a packed one as numbers.

        A packed cache is all that is pooled, not the exact keys while they are at hand: any cut into calls gives the same.
        """
        blocks = ops.gather_blocks(keys, first, num_blocks, self.config.routing.block_size)
        if keys.dtype != torch.uint8:
            return blocks
        rows = CacheRows.of_bytes(keys.shape[-1], self.config.head_dim)
        return ops.unpack_cache(blocks, **rows.attributes, width=rows.width)

    def pool(self, keys: Tensor, first: Tensor, num_blocks: int, step: Step) -> Tensor:
        """[B, Hkv, num_blocks, Dr] from the key cache [B, Hkv, M, D or C]: the blocks from each row's ``first`` [B] on.

        What is made of a block that is not complete yet is never read: only complete blocks are scored, and the block is
        pooled again in the call that completes it.
        """
        blocks = self.blocks(keys, first, num_blocks)
        return wide(blocks).mean(3).to(blocks.dtype)


class BoundsKeys(MeanKeys):
    """The least and the greatest key of the block in each channel (Quest, arXiv 2406.10774).

    A query's score is the largest product that a key within these bounds could have: sum over channels of
    max(q * greatest, q * least) = relu(q) . greatest + min(q, 0) . least, one product of vectors of twice the width.
    """

    def query(self, plain: Tensor, turned: Tensor, step: Step) -> Tensor:
        return torch.cat([turned.clamp(min=0), turned.clamp(max=0)], dim=-1)

    def pool(self, keys: Tensor, first: Tensor, num_blocks: int, step: Step) -> Tensor:
        blocks = self.blocks(keys, first, num_blocks)
        return torch.cat([blocks.amax(3), blocks.amin(3)], dim=-1)


class GateKeys(MeanKeys):
    """Learned projections of queries and of pooled keys (SeerAttention-R, arXiv 2506.08889, section 3.1).

        query_g = turn(norm(sum over heads h of group g: q_h W^q_gh))      W^q [Hkv, G D, D]
        key_g   = turn(norm([max; min; mean of the block's keys] W^k_g))   W^k [Hkv, 3 D, D]

    q and keys are those before rotation. A word turns by its own position and a block by its first one. The cache holds turned
    keys; turning them back is exact to rounding and spares a second cache. The width is the head's, which released gates have.
    """

    def __init__(self, config: ModelConfig, has_positions: bool) -> None:
        super().__init__(config, has_positions)
        heads, width = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // heads
        self.query_weight = nn.Parameter(torch.empty(heads, group * width, width))
        self.key_weight = nn.Parameter(torch.empty(heads, 3 * width, width))
        for weight in (self.query_weight, self.key_weight):
            nn.init.normal_(weight, std=(weight.shape[1]) ** -0.5)
        if config.routing.gate_norm:
            self.query_norm, self.key_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if not self.config.routing.gate_norm:
            return x
        norm = self.get_submodule(name)
        assert isinstance(norm, nn.RMSNorm)
        return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)

    def query(self, plain: Tensor, turned: Tensor, step: Step) -> Tensor:
        groups = wide(plain).unflatten(1, (self.config.num_key_value_heads, -1)).transpose(2, 3).flatten(3)
        query = self._norm(groups @ wide(self.query_weight), "query_norm")
        if self.has_positions:
            query = apply_rotary(query, step.cos, step.sin)
        return query.to(plain.dtype)

    def pool(self, keys: Tensor, first: Tensor, num_blocks: int, step: Step) -> Tensor:
        stored, weight = self.blocks(keys, first, num_blocks), wide(self.key_weight)
        blocks = stored.to(weight.dtype)  # a packed cache has fp32 numbers in an fp64 model too
        if self.has_positions:
            blocks = self._turned_back(blocks, *step.token_angles(self.config, first, num_blocks))
        pooled = torch.cat([blocks.amax(3), blocks.amin(3), blocks.mean(3)], dim=-1)
        pooled = self._norm(pooled @ weight, "key_norm")
        if self.has_positions:
            pooled = apply_rotary(pooled, *step.block_angles(self.config, first, num_blocks))
        return pooled.to(stored.dtype)

    def _turned_back(self, blocks: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys [B, Hkv, N, R, D] as they were before rotation; cos and sin [B, N, R, r/2]."""
        width = 2 * cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]
        first, second, rest = blocks.split([width // 2, width // 2, blocks.shape[-1] - width], dim=-1)
        scaling = self.config.rope_scaling
        shrink = 1.0 if scaling is None else scaling.amplitude**-2  # cos^2 + sin^2 is the amplitude's square
        parts = [(first * cos + second * sin) * shrink, (second * cos - first * sin) * shrink]
        return torch.cat([*parts, *([rest] if rest.shape[-1] else [])], dim=-1)


KINDS: dict[str, type[MeanKeys]] = {"mean": MeanKeys, "bounds": BoundsKeys, "gate": GateKeys}


def block_keys(config: ModelConfig, has_positions: bool) -> MeanKeys:
    """The kind that the configuration names."""
    return KINDS[config.routing.key](config, has_positions)
