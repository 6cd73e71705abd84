"""OLMoE: experts by softmax in every layer, and q and k normalised over all heads together."""

from typing import Any

from bilevel.families.shared.family import Family, Raw, flag, whole
from bilevel.families.shared.gates import softmax_gate


def _values(raw: Raw) -> dict[str, Any]:
    experts = softmax_gate(
        raw,
        tuple(range(whole(raw, "num_hidden_layers", 0))),
        num_experts=whole(raw, "num_experts", whole(raw, "num_local_experts", 64)),
        width=whole(raw, "intermediate_size", 2048),
        normalize=flag(raw, "norm_topk_prob", False),
    )
    return {"model_type": "bilevel", "qk_norm": "projection", "experts": experts}


FAMILY = Family(
    model_types=("olmoe",),
    reads=frozenset({"num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"}),
    values=_values,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
)
