"""Granite 3 1B-A400M and 3B-A800M: experts in every layer, by softmax over the chosen logits; multipliers as in Granite."""

import dataclasses
from typing import Any

from bilevel.config import ModelConfig
from bilevel.families.granite import MULTIPLIERS, folded_layout, folded_values
from bilevel.families.shared.family import Family, Layout, Raw, whole
from bilevel.families.shared.gates import softmax_gate

_NAMES = {
    "mlp.gate": "block_sparse_moe.router.layer",
    "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "mlp.experts.down_proj": "block_sparse_moe.output_linear.weight",
}


def _values(raw: Raw) -> dict[str, Any]:
    # Softmax over the chosen logits is softmax over all of them, renormalised over the chosen.
    experts = softmax_gate(
        raw,
        tuple(range(whole(raw, "num_hidden_layers", 0))),
        num_experts=whole(raw, "num_local_experts", 8),
        width=whole(raw, "intermediate_size", 0),
        normalize=True,
    )
    return {"model_type": "bilevel", "experts": experts, **folded_values(raw)}


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    layout = folded_layout(raw, config, "mlp.experts.down_proj")
    return dataclasses.replace(layout, names=_NAMES)


FAMILY = Family(
    model_types=("granitemoe",),
    reads=frozenset({*MULTIPLIERS, "num_local_experts", "num_experts_per_tok"}),
    values=_values,
    layout=_layout,
)
