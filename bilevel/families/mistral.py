"""Mistral, Nemo: Llama's shape, head_dim apart from hidden_size / heads; a window is refused unless it has no effect."""

from typing import Any

from bilevel.families.shared.family import Family, Raw


def _values(raw: Raw) -> dict[str, Any]:
    return {"model_type": "llama", "attention_bias": False, "mlp_bias": False}


FAMILY = Family(model_types=("mistral",), values=_values, defaults={"max_position_embeddings": 131072, "sliding_window": 4096})
