"""What a format of small weights keeps of a model's numbers, in PyTorch: weights rounded as the export rounds them, activations
as ONNX Runtime rounds them inside a quantised product.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.config import ModelConfig
from bilevel.expert_layers import ExpertWeights
from bilevel.export.graph.blocks import BITS, BLOCK, quantise_matrix
from bilevel.export.graph.quantise import table_bits
from bilevel.word_router import WordRouter


def _rounded_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weights the export rounds: all but a router's own."""
    router = {id(part) for module in model.modules() if isinstance(module, WordRouter) for part in module.modules()}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in router]


def round_weights(model: nn.Module, weights: str, config: ModelConfig) -> None:
    """Replace the weights of ``model``, a part of a model of ``config``, by what the format ``weights`` keeps of them."""
    if weights == "fp32":
        return
    bits = BITS[weights]
    for layer in _rounded_layers(model):
        layer.weight = nn.Parameter(_rounded(layer.weight, bits), requires_grad=False)
    for table in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        table.weight = nn.Parameter(_rounded(table.weight, table_bits(weights, config)), requires_grad=False)
    for experts in (module for module in model.modules() if isinstance(module, ExpertWeights)):
        for stacked in (experts.gate_up_proj, experts.down_proj):
            for weight in stacked.data:
                weight.copy_(_rounded(weight, bits))


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """What is left of fp32 [N, K]."""
    rounded = quantise_matrix(weight.detach().numpy().T, bits).dequantise()
    return torch.from_numpy(np.ascontiguousarray(rounded.T))


def _round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Activations [..., K] in blocks of 32 that share a scale, each in one of 255 steps."""
    (x,) = inputs
    blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, (blocks / step).round() * step, 0.0)
    return (rounded.flatten(-2)[..., : x.shape[-1]],)


def round_activations(model: nn.Module) -> None:
    """Let the layers with rounded weights round what they read to 8 bits, from now on and at most once."""
    for layer in _rounded_layers(model):
        if not layer._forward_pre_hooks:
            layer.register_forward_pre_hook(_round_input)
