"""The gates of all layers as one stack, so that one pass trains them together; the formulas are those of ``GateKeys``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.config import ModelConfig
from bilevel.rotary import apply_rotary, rotary_angles

_EPS = 1e-6
_NOISE = 0.02  # times what a random start would have: breaks the symmetry of the channels that begin at zero


class GateStack(nn.Module):
    """``bilevel.block_keys.GateKeys`` of several layers [G layers]; begins as the comparison with the mean key.

    config: of the model; its routing section says the block size and whether the gates are normalised.
    """

    def __init__(self, config: ModelConfig, layers: Sequence[int]) -> None:
        super().__init__()
        self.config, self.layers = config, tuple(layers)
        heads, width = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // heads
        eye = torch.eye(width)
        query = torch.cat([eye / group] * group)
        key = torch.cat([torch.zeros(2 * width, width), eye])  # of max, min and mean only the mean
        self.query_weight, self.key_weight = (
            nn.Parameter(start + _NOISE * len(start) ** -0.5 * torch.randn(len(self.layers), heads, *start.shape))
            for start in (query, key)
        )
        if config.routing.gate_norm:
            self.query_norm = nn.Parameter(torch.ones(len(self.layers), width))
            self.key_norm = nn.Parameter(torch.ones(len(self.layers), width))
        turns = torch.tensor([layer not in config.nope_layers for layer in self.layers])
        self.turns: Tensor
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, query: Tensor, pooled: Tensor, rows: Tensor) -> Tensor:
        """Scores [G, Hkv, S, N] of every block.

        query: [G, Hq, S, D] before rotation, of the words at positions ``rows`` [S]. pooled: [G, Hkv, N, 3 D], greatest, least
        and mean key of each block, before rotation.
        """
        config = self.config
        groups = query.unflatten(1, (config.num_key_value_heads, -1)).transpose(2, 3).flatten(3)
        starts = torch.arange(pooled.shape[2], device=rows.device) * config.routing.block_size
        q = self._turned(self._norm(groups @ self.query_weight, "query_norm"), rows)
        k = self._turned(self._norm(pooled @ self.key_weight, "key_norm"), starts)
        return q @ k.mT * config.head_dim**-0.5

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if not self.config.routing.gate_norm:
            return x
        return F.rms_norm(x, x.shape[-1:], eps=_EPS) * self.get_parameter(name)[:, None, None]

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (angle.expand(len(x), -1, -1) for angle in rotary_angles(positions[None], self.config))
        turned = apply_rotary(x, cos, sin)
        return turned if len(self.config.nope_layers) == 0 else torch.where(self.turns[:, None, None, None], turned, x)

    def state(self, layer: int) -> dict[str, Tensor]:
        """The parameters of one layer under the names of ``GateKeys``."""
        index = self.layers.index(layer)
        names = {"query_weight": "query_weight", "key_weight": "key_weight"}
        if self.config.routing.gate_norm:
            names |= {"query_norm": "query_norm.weight", "key_norm": "key_norm.weight"}
        return {stored: self.get_parameter(name)[index].detach().clone() for name, stored in names.items()}
