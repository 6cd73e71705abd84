"""In which float type the model's sums are accumulated."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in the type that scores, softmax and means are accumulated in: fp64 stays fp64, every other type becomes fp32.

    The model is defined with fp32 sums (contract, rule 2); an fp64 model is the reference that rounding is measured against,
    so nothing may cut it back to fp32.
    """
    return x if x.dtype == torch.float64 else x.float()
