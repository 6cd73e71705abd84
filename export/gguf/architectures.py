"""What each architecture of llama.cpp is in Hugging Face's terms: configuration keys, tensor names and shapes, declared in
tables.

Sources: llama.cpp's ``convert_hf_to_gguf.py`` (what it writes for a model) and its ``src/models`` (what it computes from that).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stored:
    """The tensor's name in the checkpoint and its shape in the letters of :func:`sizes`; permuted: see
    ``Architecture.permuted``."""

    name: str
    shape: str
    heads: str = ""


@dataclass(frozen=True)
class Architecture:
    """One value of ``general.architecture``.

    permuted: llama.cpp turns neighbouring channels of a head together, Hugging Face channels half a head apart; where this is
    true the file's rows of q and k are interleaved accordingly, and are put back.
    keys: further metadata (without the architecture's name before it) -> keys of config.json, all required.
    layer: further tensors of every layer. biases: projections that have a bias in every layer, "" where a file may have none
    or all four.
    constant: what the architecture fixes and no metadata says, given the number of layers.
    """

    model_type: str
    class_name: str
    permuted: bool
    keys: Mapping[str, str] = field(default_factory=dict)
    layer: Mapping[str, Stored] = field(default_factory=dict)
    biases: str = ""
    no_rope_every: int = 0


# Metadata below the architecture's name -> config.json, for every architecture.
REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# The same with llama.cpp's default, which is another key's value where it is a string.
OPTIONAL: dict[str, tuple[str, float | str]] = {
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "rope.freq_base": ("rope_theta", 10000.0),
}
# Read elsewhere (configuration.py), or without effect on what is computed.
HANDLED = ("vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scaling.finetuned")
ROPE_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear")

# Tensors outside the layers, in the order of a checkpoint; letters: V vocabulary, d hidden size, f MLP size, q and k the
# widths of all query and of all key/value heads, h a head's.
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
OUTER = {
    EMBEDDING: Stored("model.embed_tokens.weight", "Vd"),
    "output_norm.weight": Stored("model.norm.weight", "d"),
    HEAD: Stored("lm_head.weight", "Vd"),
}
LAYER = {
    "attn_norm.weight": Stored("input_layernorm.weight", "d"),
    "attn_q.weight": Stored("self_attn.q_proj.weight", "qd", heads="q"),
    "attn_k.weight": Stored("self_attn.k_proj.weight", "kd", heads="k"),
    "attn_v.weight": Stored("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": Stored("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": Stored("post_attention_layernorm.weight", "d"),
    "ffn_gate.weight": Stored("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": Stored("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": Stored("mlp.down_proj.weight", "df"),
}
BIASES = {
    "attn_q.bias": Stored("self_attn.q_proj.bias", "q", heads="q"),
    "attn_k.bias": Stored("self_attn.k_proj.bias", "k", heads="k"),
    "attn_v.bias": Stored("self_attn.v_proj.bias", "k"),
    "attn_output.bias": Stored("self_attn.o_proj.bias", "d"),
}
MLP_BIASES = {
    "ffn_gate.bias": Stored("mlp.gate_proj.bias", "f"),
    "ffn_up.bias": Stored("mlp.up_proj.bias", "f"),
    "ffn_down.bias": Stored("mlp.down_proj.bias", "d"),
}
_QK_NORM = {
    "attn_q_norm.weight": Stored("self_attn.q_norm.weight", "h"),
    "attn_k_norm.weight": Stored("self_attn.k_norm.weight", "h"),
}

ARCHITECTURES = {
    # Mistral too: llama.cpp does not tell it from Llama, and neither does what is computed.
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", permuted=False, biases="qkv"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", permuted=False, layer=_QK_NORM),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", permuted=True, no_rope_every=4),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        permuted=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
}


def sizes(config: Mapping[str, Any], vocabulary: int) -> dict[str, int]:
    """Letter -> size, for the shapes in the tables above."""
    head = config["head_dim"]
    return {
        "V": vocabulary,
        "d": config["hidden_size"],
        "f": config["intermediate_size"],
        "q": config["num_attention_heads"] * head,
        "k": config["num_key_value_heads"] * head,
        "h": head,
    }
