"""Ling and Ring 2.0 (mini, flash), and Ring-mini-sparse: DeepSeek-V3's gate, a shared expert, half of every head turned.

Ring-mini-sparse reads 8 blocks of 1,024 tokens, chosen once for all query heads of a key/value head. As released its file says
so in keys of its own; here it is a section: "routing": {"preset": "moba_gqa", "block_size": 1024, "topk": 8, "init_blocks": 0}.
"""

from typing import Any

from bilevel.config import ModelConfig
from bilevel.errors import ConfigError
from bilevel.families.shared.family import EMBEDDING, QKV, Family, Layout, O, Raw, flag, whole
from bilevel.families.shared.gates import grouped_gate

_NAMES = {
    EMBEDDING: "model.word_embeddings",
    O: "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "mlp.gate.e_score_correction_bias": "mlp.gate.expert_bias",
}
# What the gate is; any other value is another model.
_GATE = {"score_function": "sigmoid", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _values(raw: Raw) -> dict[str, Any]:
    for key, expected in _GATE.items():
        if raw.get(key, expected) not in (expected, None):
            raise ConfigError(f"config.json sets {key} to {raw[key]!r}; of Bailing's gates only {expected!r} is implemented")
    width = whole(raw, "moe_shared_expert_intermediate_size", 0) or whole(raw, "moe_intermediate_size", 0)
    shared = whole(raw, "num_shared_experts", 0) * width
    biased = flag(raw, "moe_router_enable_expert_bias", True)
    return {
        "model_type": "bilevel",
        "qk_norm": "head" if flag(raw, "use_qk_norm", True) else "none",
        "attention_bias": flag(raw, "use_qkv_bias", False),
        "attention_output_bias": flag(raw, "use_bias", False),
        "experts": grouped_gate(raw, whole(raw, "num_experts", 0), shared, select_bias=biased),
    }


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    further = range(config.num_hidden_layers, config.num_hidden_layers + whole(raw, "num_nextn_predict_layers", 0))
    return Layout(
        names=_NAMES,
        fused={"attention.query_key_value": QKV},
        unused=tuple(f"model.layers.{index}." for index in further),
    )


FAMILY = Family(
    model_types=("bailing_moe", "bailing_moe_v2"),
    reads=frozenset({
        "num_experts", "num_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
        "moe_shared_expert_intermediate_size", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace",
        "moe_router_enable_expert_bias", "num_nextn_predict_layers", "use_qk_norm", "use_bias", "use_qkv_bias", "use_rmsnorm",
        "router_dtype", *_GATE,
    }),
    values=_values,
    layout=_layout,
    partial_rotary=True,
    windows="switch",
)  # fmt: skip
