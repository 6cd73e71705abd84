"""ERNIE 4.5 dense: Llama's shape whose positions turn neighbouring channels."""

from typing import Any

from bilevel.config import ModelConfig
from bilevel.families.shared.family import Family, Layout, Raw, flag


def _values(raw: Raw) -> dict[str, Any]:
    bias = flag(raw, "use_bias", False)
    return {"model_type": "llama", "attention_bias": bias, "mlp_bias": bias}


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    return Layout(interleaved=True)


FAMILY = Family(
    model_types=("ernie4_5",),
    reads=frozenset({"use_bias"}),
    values=_values,
    layout=_layout,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072, "tie_word_embeddings": True},
)
