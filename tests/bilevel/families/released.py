"""Tiny random models of released families, made by transformers' own classes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:  # its models load Triton, which other tests set up for its interpreter first
    from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 5.5],
    "partial_rotary_factor": 0.75,
}
GROUPED = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Released:
    """A class of transformers by its prefix, and how its config differs from ``SIZES``. length: of the compared text."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    length: int = 40


MODELS: dict[str, Released] = {
    "llama3": Released(
        "Llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ),
    "qwen2": Released("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows-off": Released("Qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": Released("Qwen3", {"head_dim": 16, "sliding_window": 16}),
    "mistral-head-dim-apart": Released("Mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral-long-window": Released("Mistral", {"sliding_window": 256}),
    "smollm3": Released("SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "smollm3-listed": Released("SmolLM3", {"no_rope_layers": [0, 1], "attention_bias": True}),
    "granite": Released(
        "Granite",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "granite-untied": Released("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "attention_multiplier": 0.2}),
    "granitemoe": Released(
        "GraniteMoe",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe": Released(
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe-not-normalised": Released(
        "Qwen3Moe", {"head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    ),
    "olmoe": Released("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "glm4_moe": Released("Glm4Moe", {**GROUPED, "head_dim": 16, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe-one-group": Released("Glm4Moe", {**GROUPED, "head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    "dots1": Released("Dots1", {**GROUPED, "head_dim": 16, "sliding_window": None, "norm_topk_prob": True}),
    "phi3": Released("Phi3", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}}),
    "phi3-longrope-short": Released(
        "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "tie_word_embeddings": True}
    ),
    "phi3-longrope-long": Released("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "ernie4_5-interleaved": Released("Ernie4_5", {"head_dim": 8, "use_bias": True}),
    "ernie4_5_moe": Released(
        "Ernie4_5_Moe",
        {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 2,
            "moe_layer_interval": 2,
            "moe_norm_min": 0.9,  # a floor that is felt
        },
    ),
    "yarn": Released("Qwen3", {"head_dim": 16, "rope_parameters": YARN}, length=90),
    "yarn-mscale": Released(
        "Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8, "beta_slow": 2}}
    ),
    "yarn-amplitude": Released("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.2}}),
    "linear": Released("Qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}}),
    "dynamic": Released(
        "Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}}, length=256
    ),
}


def make(name: str) -> PreTrainedModel:
    """The random model, every weight and bias far from its initial value, so that a forgotten one changes the logits."""
    released = MODELS[name]
    values = copy.deepcopy({**SIZES, **released.changes})
    config = getattr(transformers, f"{released.name}Config")(**values)
    torch.manual_seed(len(name))
    model: PreTrainedModel = getattr(transformers, f"{released.name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's ``config.json``; one that is set to ``...`` is removed."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
