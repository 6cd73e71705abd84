"""dots.llm1: DeepSeek-V3's gate with shared experts, every head's q and k normalised."""

from typing import Any

from bilevel.families.shared.family import Family, Raw, whole
from bilevel.families.shared.gates import grouped_gate


def _values(raw: Raw) -> dict[str, Any]:
    shared = whole(raw, "n_shared_experts", 0) * whole(raw, "moe_intermediate_size", 1408)
    experts = grouped_gate(raw, whole(raw, "n_routed_experts", whole(raw, "num_local_experts", 0)), shared)
    return {"model_type": "bilevel", "qk_norm": "head", "experts": experts}


FAMILY = Family(
    model_types=("dots1",),
    reads=frozenset({
        "n_routed_experts", "num_local_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group",
        "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace",
    }),
    values=_values,
    defaults={"norm_topk_prob": False, "sliding_window": 4096, "max_window_layers": 62},
)  # fmt: skip
