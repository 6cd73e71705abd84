"""Rotary position embedding (RoFormer, arXiv 2104.09864), with Hugging Face's layout: channel i turns with i + D/2.

The tables of cos and sin are fp32 by definition, in a model of every precision, fp64 included: they are constants of the model,
so that models of two precisions differ by the rounding of their sums and not by the angles they turn by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.operators.precision import wide


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [D/2]: radians per position, scaled where the checkpoint says so."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # Llama 3.1: long wavelengths are stretched by the factor, short ones kept, those between blended.
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rotary_angles(position: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [B, L, D/2] in every precision, for absolute positions [B, L]."""
    angle = position[..., None].float() * inverse_frequencies(config).to(position.device)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of [B, H, L, D] by each position's angles, in fp32 (fp64 for fp64 x)."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.rotary_embedding(wide(x), cos, sin).to(x.dtype)  # one node
    first, second = wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
