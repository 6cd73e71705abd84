"""Mistral and Mistral Nemo: Llama's shape, with head_dim apart from hidden_size / heads. Windows are refused unless they have no effect."""

from typing import Any

from bilevel.families.family import Family, Raw


def _values(raw: Raw) -> dict[str, Any]:
    return {"model_type": "llama", "attention_bias": False, "mlp_bias": False}


FAMILY = Family(model_types=("mistral",), values=_values, defaults={"max_position_embeddings": 131072, "sliding_window": 4096})
