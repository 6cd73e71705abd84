"""Qwen3-MoE (30B-A3B, Coder): Qwen3 with experts by softmax in every decoder_sparse_step-th layer outside mlp_only_layers."""

from typing import Any

from bilevel.errors import ConfigError
from bilevel.families.shared.family import Family, Raw, flag, whole, whole_list
from bilevel.families.shared.gates import softmax_gate


def _values(raw: Raw) -> dict[str, Any]:
    step, dense = whole(raw, "decoder_sparse_step", 1), whole_list(raw, "mlp_only_layers") or []
    if not step:
        raise ConfigError("config.json sets decoder_sparse_step=0, which must be at least 1")
    layers = [i for i in range(whole(raw, "num_hidden_layers", 0)) if i not in dense and (i + 1) % step == 0]
    experts = softmax_gate(
        raw,
        tuple(layers),
        num_experts=whole(raw, "num_experts", whole(raw, "num_local_experts", 128)),
        width=whole(raw, "moe_intermediate_size", 768),
        normalize=flag(raw, "norm_topk_prob", False),
    )
    return {"model_type": "bilevel", "qk_norm": "head", "experts": experts}


FAMILY = Family(
    model_types=("qwen3_moe",),
    reads=frozenset({
        "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "decoder_sparse_step", "mlp_only_layers",
    }),
    values=_values,
    windows="switch",
    defaults={"max_position_embeddings": 32768},
)  # fmt: skip
