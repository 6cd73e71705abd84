"""GLM-4.5 and 4.5-Air: DeepSeek-V3's gate with shared experts behind a few dense layers, half of every head turned."""

from typing import Any

from bilevel.config import ModelConfig
from bilevel.families.shared.family import Family, Layout, Raw, flag, whole
from bilevel.families.shared.gates import grouped_gate

_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")


def _values(raw: Raw) -> dict[str, Any]:
    shared = whole(raw, "n_shared_experts", 1) * whole(raw, "moe_intermediate_size", 1408)
    experts = grouped_gate(raw, whole(raw, "n_routed_experts", whole(raw, "num_local_experts", 128)), shared)
    norm = "head" if flag(raw, "use_qk_norm", False) else "none"
    return {"model_type": "bilevel", "qk_norm": norm, "attention_output_bias": False, "experts": experts}


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    """Layers behind the last one predict further tokens; the text does not pass through them."""
    first = config.num_hidden_layers
    count = max(whole(raw, key, 1) for key in _FURTHER)
    return Layout(unused=tuple(f"model.layers.{first + i}." for i in range(count)))


FAMILY = Family(
    model_types=("glm4_moe",),
    reads=frozenset({
        "n_routed_experts", "num_local_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group",
        "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "use_qk_norm", *_FURTHER,
    }),
    values=_values,
    layout=_layout,
    partial_rotary=True,
    defaults={"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "first_k_dense_replace":
    1},
)  # fmt: skip
