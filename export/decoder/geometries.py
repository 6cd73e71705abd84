"""Models of known sizes with random weights, for measurements that need no checkpoint: ``bilevel bench --geometry small``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bilevel.config import ModelConfig, Routing
from bilevel.errors import require
from bilevel.export.decoder.bundle import export_bundle
from bilevel.folders import scratch

# "small" is the geometry of the project's published numbers; "tiny" lets every part of a measurement run in seconds.
GEOMETRIES = {
    "small": ModelConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2**17 + 2048,
        routing=Routing(block_size=64, coarse_topk=32, topk=16),
    ),
    "tiny": ModelConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        routing=Routing(block_size=8, coarse_topk=8, topk=4),
    ),
}


def make_bundle(name: str, bundle: Path, weights: str, on_stage: Callable[[str], None], caches: str = "fp32") -> None:
    """Export the geometry ``name`` with random weights (always the same ones) to ``bundle``. Raises BilevelError, KeyError."""
    import torch

    from bilevel.checkpoint import save_model
    from bilevel.model import CausalLM

    on_stage(f"making random weights of geometry {name}")
    config = GEOMETRIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CausalLM(config)
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with scratch(bundle.parent, f"{name}.geometry") as folder:
        checkpoint = folder / "checkpoint"
        save_model(model, checkpoint, files={"tokenizer.json": _tokenizer(config.vocab_size)})
        export_bundle(checkpoint, bundle, force=True, weights=weights, caches=caches, on_stage=on_stage)


def _tokenizer(vocab_size: int) -> bytes:
    """A tokenizer whose words are the ids: the format asks for one, a measurement does not use it."""
    tokenizers = require("tokenizers")
    model = tokenizers.models.WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str().encode()
