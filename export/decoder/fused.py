"""The model as it is exported: the projections of one input are one matrix product.

Weights are joined once, before tracing; the checkpoint's names and the numbers stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bilevel.model import Attention, CausalLM, DecoderLayer


class FusedAttention(Attention):
    """Attention whose queries, keys and values come from one projection ``qkv_proj`` [(Hq + 2 Hkv) D, d]."""

    qkv_proj: nn.Linear

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Attention.project``."""
        config = self.config
        heads = self.qkv_proj(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        q, k, v = heads.split([config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads], dim=1)
        return q, k, v


def _joined(projections: list[nn.Linear]) -> nn.Linear:
    """One Linear whose outputs are those of ``projections``, one after another."""
    weight = torch.cat([p.weight for p in projections])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=projections[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if projections[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([p.bias for p in projections]), requires_grad=False)
    return joined


@contextmanager
def fused_projections(model: CausalLM, attention: type[FusedAttention] = FusedAttention) -> Iterator[None]:
    """While the context lasts, q, k and v of every layer are one projection, and its attention is of the class given."""
    layers = [layer.self_attn for layer in model.model.layers if isinstance(layer, DecoderLayer)]
    apart = [[layer.q_proj, layer.k_proj, layer.v_proj] for layer in layers]
    try:
        with torch.no_grad():
            for layer, projections in zip(layers, apart, strict=True):
                layer.qkv_proj = _joined(projections)
                del layer.q_proj, layer.k_proj, layer.v_proj
                layer.__class__ = attention
        yield
    finally:
        for layer, (q, k, v) in zip(layers, apart, strict=True):
            layer.__class__ = Attention
            layer.q_proj, layer.k_proj, layer.v_proj = q, k, v
            layer._modules.pop("qkv_proj", None)
