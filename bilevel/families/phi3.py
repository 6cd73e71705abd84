"""Phi-3 and Phi-4-mini: Llama's shape with q, k, v in one tensor and gate, up in another, part of a head turned, longrope."""

from typing import Any

from bilevel.config import ModelConfig
from bilevel.families.shared.family import QKV, Family, Layout, Raw


def _values(raw: Raw) -> dict[str, Any]:
    return {"model_type": "bilevel", "attention_bias": False, "mlp_bias": False}


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    return Layout(fused={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")})


FAMILY = Family(
    model_types=("phi3",),
    values=_values,
    layout=_layout,
    partial_rotary=True,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
)
