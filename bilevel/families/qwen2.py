"""Qwen2, Qwen2.5 and what is distilled into them: Llama with a bias on q, k and v, whatever the file says of biases."""

from typing import Any

from bilevel.families.shared.family import Family, Raw


def _values(raw: Raw) -> dict[str, Any]:
    return {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False}


FAMILY = Family(
    model_types=("qwen2",),
    values=_values,
    windows="switch",
    defaults={"max_position_embeddings": 32768},
)
