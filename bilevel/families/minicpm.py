"""MiniCPM 1 to 4, the dense part: three scalars on Llama's shape, folded into the weights.

scale_emb multiplies the embeddings, scale_depth / sqrt(layers) what a layer adds to the stream, and the head reads the stream
divided by hidden_size / dim_model_base. MiniCPM 4's sparse attention (InfLLM-V2) begins behind dense_len tokens; up to there
it is dense.
"""

import math
from collections.abc import Mapping
from typing import Any

from bilevel.config import ModelConfig
from bilevel.errors import ConfigError
from bilevel.families.shared.family import EMBEDDING, HEAD, Family, Layout, O, Raw, flag, positive_number, scaled, whole


def _values(raw: Raw) -> dict[str, Any]:
    _check_sparse(raw)
    if whole(raw, "num_experts", 0):
        raise ConfigError(f"config.json sets num_experts={raw['num_experts']}; MiniCPM's experts are not implemented")
    tied = flag(raw, "tie_word_embeddings", True)
    embedding, head = _ends(raw)
    return {"model_type": "llama", "tie_word_embeddings": tied and embedding == head}


def _check_sparse(raw: Raw) -> None:
    sparse = raw.get("sparse_config")
    if not sparse:
        return
    dense = whole(sparse, "dense_len", 0) if isinstance(sparse, Mapping) else 0
    length = whole(raw, "max_position_embeddings", 32768)
    if dense < length:
        raise ConfigError(
            f"config.json sets sparse_config with dense_len={dense} below max_position_embeddings={length}; its attention "
            "behind dense_len is not implemented: set max_position_embeddings to dense_len, or remove sparse_config to attend "
            "to every token"
        )


def _ends(raw: Raw) -> tuple[float, float]:
    width = whole(raw, "hidden_size", 1) or 1
    return positive_number(raw, "scale_emb", 1.0), positive_number(raw, "dim_model_base", float(width)) / width


def _layout(raw: Raw, config: ModelConfig) -> Layout:
    root = math.sqrt(config.num_hidden_layers)
    depth = positive_number(raw, "scale_depth", root) / root
    embedding, head = _ends(raw)
    factors = {EMBEDDING: embedding, HEAD: head, O: depth, "mlp.down_proj": depth}
    return Layout(factors=scaled(factors), tied=flag(raw, "tie_word_embeddings", True))


FAMILY = Family(
    model_types=("minicpm",),
    reads=frozenset({"scale_emb", "scale_depth", "dim_model_base", "sparse_config", "num_experts"}),
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 32768},
    values=_values,
    layout=_layout,
)
