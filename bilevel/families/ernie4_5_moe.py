"""ERNIE 4.5 with experts (21B-A3B): softmax scores with a bias that moves the choice, a floor under the sum that normalises,
shared experts; positions turn neighbouring channels."""

from typing import Any

from bilevel.config import ModelConfig
from bilevel.errors import ConfigError
from bilevel.families.shared.family import Family, Layout, Raw, flag, number, whole
from bilevel.families.shared.gates import softmax_gate

_BIAS = "mlp.gate.e_score_correction_bias"


def _values(raw: Raw) -> dict[str, Any]:
    if flag(raw, "use_bias", False):
        raise ConfigError(
            "config.json sets use_bias to True; ERNIE's expert layers have no biases here: give a checkpoint without"
        )
    if raw.get("moe_gate", "topk") not in ("topk", None):
        raise ConfigError(f"config.json sets moe_gate to {raw['moe_gate']!r}; of ERNIE's gates only 'topk' is implemented")
    count, interval, width = whole(raw, "num_hidden_layers", 0), whole(raw, "moe_layer_interval", 1), "moe_intermediate_size"
    end = count - 1 if raw.get("moe_layer_end_index", -1) in (-1, None) else whole(raw, "moe_layer_end_index", 0)
    if not interval:
        raise ConfigError("config.json sets moe_layer_interval to 0, which must be at least 1")
    first, last = whole(raw, "moe_layer_start_index", 1), min(end, count - 1)
    experts = softmax_gate(
        raw,
        tuple(layer for layer in range(first, last + 1) if (layer + 1) % interval == 0),
        num_experts=whole(raw, "moe_num_experts", 64),
        width=whole(raw, width, 1536),
        normalize=True,
        top_k="moe_k",
        select_bias=True,
        shared_intermediate_size=whole(raw, "moe_num_shared_experts", 2) * whole(raw, width, 1536),
        norm_floor=number(raw, "moe_norm_min", 1e-12),
    )
    return {"model_type": "bilevel", "experts": experts}


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    """What begins with mtp predicts further tokens; the text does not pass through it."""
    return Layout(
        names={_BIAS: "mlp.moe_statics.e_score_correction_bias"}, interleaved=True, unused=("model.mtp_",), one_row=(_BIAS,)
    )


FAMILY = Family(
    model_types=("ernie4_5_moe",),
    reads=frozenset({
        "use_bias", "moe_num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts", "moe_layer_start_index",
        "moe_layer_end_index", "moe_layer_interval", "moe_norm_min", "moe_gate", "moe_use_aux_free", "moe_capacity",
        "num_nextn_predict_layers",
    }),
    values=_values,
    layout=_layout,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072, "tie_word_embeddings": True, "moe_k":
    6},
)  # fmt: skip
