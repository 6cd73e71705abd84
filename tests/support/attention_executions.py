"""Every execution of routed attention under one signature: (inputs, attributes) -> [B, Hq, L, Dv]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from bilevel import ops
from bilevel.operators import attention, packed_caches, reference
from tests.support.cpu_library import SETS, run_kernel
from tests.support.operator_calls import Attributes, Inputs, run_body
from tests.support.triton_calls import run_kernels

Execution = Callable[[Inputs, Attributes], Tensor]


def _called(function: Callable[..., Tensor], inputs: Inputs, attributes: Attributes) -> Tensor:
    return function(*inputs.values(), **attributes)


# The forms in PyTorch, which have gradients.
DIFFERENTIABLE: dict[str, Execution] = {
    "PyTorch": partial(_called, attention.routed_attention),
    "operator": partial(_called, ops.routed_attention),
}
EXECUTIONS: dict[str, Execution] = {
    "loops": partial(_called, reference.routed_attention),
    **DIFFERENTIABLE,
    "body": lambda inputs, attributes: run_body("RoutedAttention", inputs, attributes)[0],
    **{
        f"CPU kernel, {isa}": lambda inputs, attributes, isa=isa: run_kernel("RoutedAttention", inputs, attributes, isa)[0]
        for isa in SETS
    },
    **{
        f"GPU kernel, {plan}": lambda inputs, attributes, plan=plan: run_kernels(
            "RoutedAttention", inputs, attributes, only=plan
        )[plan][0]
        for plan in ("split", "tiles")
    },
}

# Of RoutedAttentionQuantized.
PACKED_EXECUTIONS: dict[str, Execution] = {
    "loops": partial(_called, reference.routed_attention_quantized),
    "PyTorch": partial(_called, packed_caches.routed_attention_quantized),
    "body": lambda inputs, attributes: run_body("RoutedAttentionQuantized", inputs, attributes)[0],
    **{
        f"CPU kernel, {isa}": lambda inputs, attributes, isa=isa: run_kernel(
            "RoutedAttentionQuantized", inputs, attributes, isa
        )[0]
        for isa in SETS
    },
}
