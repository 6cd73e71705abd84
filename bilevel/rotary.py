"""Rotary position embedding (RoFormer, arXiv 2104.09864), with Hugging Face's layout: channel i turns with i + r/2
of the r rotary channels (all D, or the first ones).

The tables of cos and sin are fp32 by definition, in a model of every precision, fp64 included: they are constants of the model,
so that models of two precisions differ by the rounding of their sums and not by the angles they turn by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.operators.precision import wide
from bilevel.rope_scaling import RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [rotary channels / 2]: radians per position, scaled where the checkpoint says so."""
    width = config.rotated_channels
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    if scaling.rope_type == "yarn":
        return _yarn(frequency, scaling, config)
    if scaling.rope_type == "longrope":
        is_long = config.max_position_embeddings > scaling.original_max_position_embeddings
        return frequency / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
    # Llama 3.1: long wavelengths are stretched by the factor, short ones kept, those between blended.
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn(frequency: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Channels that turn often in the trained length keep their frequency, those that hardly turn have it over the factor."""
    width = config.rotated_channels

    def channel(turns: float) -> float:
        """The pair of channels, as a fraction, that turns so many times in the trained length."""
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = channel(scaling.beta_fast or 32), channel(scaling.beta_slow or 1)
    if scaling.truncate is None or scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0, 1)
    return stretched * frequency / scaling.factor + (1 - stretched) * frequency


def rotary_angles(position: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [B, L, rotary channels / 2] in every precision, for absolute positions [B, L]."""
    angle = position[..., None].float() * inverse_frequencies(config).to(position.device)
    cos, sin = angle.cos(), angle.sin()
    amplitude = config.rope_scaling.amplitude if config.rope_scaling is not None else 1.0
    return (cos, sin) if amplitude == 1 else (cos * amplitude, sin * amplitude)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + r/2) of [B, H, L, D] by each position's angles, in fp32 (fp64 for fp64 x).

    r: the rotary channels, twice as many as there are angles; channels from r on stay as they are.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([apply_rotary(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    if torch.compiler.is_exporting():
        return torch.onnx.ops.rotary_embedding(wide(x), cos, sin).to(x.dtype)  # one node
    first, second = wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
