"""llama.cpp's tensors under Hugging Face's names, with their shapes: the pieces that the architectures are put together from.

A shape is written in letters: V vocabulary, d hidden size, f MLP size, F twice that, h a head's, q and k the widths of all
query and of all key/value heads, Q all of q, k and v, e experts, x an expert's size, s the shared experts' together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stored:
    """A tensor's name in the checkpoint and its shape. ``{}`` in the name: the file stacks one tensor an expert. Two of one
    name: the checkpoint stacks the rows of both, expert by expert.

    heads: "q" or "k" where the rows are a head's (see ``Architecture.permuted``). when: the key of config.json without which
    the model has no such tensor.
    """

    name: str
    shape: str
    heads: str = ""
    when: str = ""


EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
OUTER = {
    EMBEDDING: Stored("model.embed_tokens.weight", "Vd"),
    "output_norm.weight": Stored("model.norm.weight", "d"),
    HEAD: Stored("lm_head.weight", "Vd"),
}
# In every layer, without their ``blk.{i}.`` and ``model.layers.{i}.``.
ATTENTION = {
    "attn_norm.weight": Stored("input_layernorm.weight", "d"),
    "attn_q.weight": Stored("self_attn.q_proj.weight", "qd", heads="q"),
    "attn_k.weight": Stored("self_attn.k_proj.weight", "kd", heads="k"),
    "attn_v.weight": Stored("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": Stored("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": Stored("post_attention_layernorm.weight", "d"),
}
FUSED_QKV = {"attn_qkv.weight": Stored("self_attn.qkv_proj.weight", "Qd")}
HEAD_NORMS = {
    "attn_q_norm.weight": Stored("self_attn.q_norm.weight", "h"),
    "attn_k_norm.weight": Stored("self_attn.k_norm.weight", "h"),
}
PROJECTION_NORMS = {
    "attn_q_norm.weight": Stored("self_attn.q_norm.weight", "q"),
    "attn_k_norm.weight": Stored("self_attn.k_norm.weight", "k"),
}
DENSE = {
    "ffn_gate.weight": Stored("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": Stored("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": Stored("mlp.down_proj.weight", "df"),
}
MLP_BIASES = {
    "ffn_gate.bias": Stored("mlp.gate_proj.bias", "f", when="mlp_bias"),
    "ffn_up.bias": Stored("mlp.up_proj.bias", "f", when="mlp_bias"),
    "ffn_down.bias": Stored("mlp.down_proj.bias", "d", when="mlp_bias"),
}
ROUTER = {"ffn_gate_inp.weight": Stored("mlp.gate.weight", "ed")}
CHOICE_BIAS = {"exp_probs_b.bias": Stored("mlp.gate.e_score_correction_bias", "e")}
EACH_EXPERT = {
    "ffn_gate_exps.weight": Stored("mlp.experts.{}.gate_proj.weight", "exd"),
    "ffn_up_exps.weight": Stored("mlp.experts.{}.up_proj.weight", "exd"),
    "ffn_down_exps.weight": Stored("mlp.experts.{}.down_proj.weight", "edx"),
}
SHARED_EXPERT = {
    "ffn_gate_shexp.weight": Stored("mlp.shared_experts.gate_proj.weight", "sd"),
    "ffn_up_shexp.weight": Stored("mlp.shared_experts.up_proj.weight", "sd"),
    "ffn_down_shexp.weight": Stored("mlp.shared_experts.down_proj.weight", "ds"),
}


def biases(letters: str, when: str = "") -> dict[str, Stored]:
    """The biases of the projections q, k, v and o that ``letters`` names."""
    every = {
        "q": ("attn_q.bias", Stored("self_attn.q_proj.bias", "q", heads="q", when=when)),
        "k": ("attn_k.bias", Stored("self_attn.k_proj.bias", "k", heads="k", when=when)),
        "v": ("attn_v.bias", Stored("self_attn.v_proj.bias", "k", when=when)),
        "o": ("attn_output.bias", Stored("self_attn.o_proj.bias", "d", when=when)),
    }
    return dict(every[letter] for letter in letters)


def sizes(config: Mapping[str, Any], experts: Mapping[str, int], vocabulary: int) -> dict[str, int]:
    """Letter -> size. experts: the letters e, x and s, 0 where there are none."""
    head = config["head_dim"]
    q, k = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    inner = config["intermediate_size"]
    return {
        "V": vocabulary,
        "d": config["hidden_size"],
        "f": inner,
        "F": 2 * inner,
        "h": head,
        "q": q,
        "k": k,
        "Q": q + 2 * k,
        **experts,
    }
