"""Granite 3 dense: four multipliers on Llama's shape, folded into the weights, so that what is left is a Llama."""

from typing import Any

from bilevel.config import ModelConfig
from bilevel.families.shared.family import EMBEDDING, HEAD, Family, Layout, O, Q, Raw, flag, positive_number, scaled

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def folded_values(raw: Raw) -> dict[str, Any]:
    """A tied head stays tied only where embedding and head are scaled alike."""
    tied = flag(raw, "tie_word_embeddings", False)
    embedding, head = _ends(raw)
    return {"tie_word_embeddings": tied and embedding == head}


def _ends(raw: Raw) -> tuple[float, float]:
    return positive_number(raw, "embedding_multiplier", 1.0), 1 / positive_number(raw, "logits_scaling", 1.0)


def folded_layout(raw: Raw, config: ModelConfig, down: str) -> Layout:
    """attention_multiplier stands where Llama has head_dim ** -0.5. down: the module whose output enters the stream."""
    residual = positive_number(raw, "residual_multiplier", 1.0)
    embedding, head = _ends(raw)
    query = positive_number(raw, "attention_multiplier", 1.0) / config.attention_scale
    factors = {EMBEDDING: embedding, HEAD: head, Q: query, O: residual, down: residual}
    return Layout(factors=scaled(factors), tied=flag(raw, "tie_word_embeddings", False))


def _values(raw: Raw) -> dict[str, Any]:
    return {"model_type": "llama", **folded_values(raw)}


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    return folded_layout(raw, config, "mlp.down_proj")


FAMILY = Family(model_types=("granite",), reads=frozenset(MULTIPLIERS), values=_values, layout=_layout)
