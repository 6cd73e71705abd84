"""What each architecture of llama.cpp is in Hugging Face's terms: configuration keys, tensor names and shapes, declared in
tables.

Sources: llama.cpp's converter from Hugging Face's format (what it writes for a model) and its ``src/models`` (what it computes
from that). Names and shapes of tensors: :mod:`bilevel.export.gguf.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bilevel.export.gguf.tensors import (
    ATTENTION,
    CHOICE_BIAS,
    DENSE,
    EACH_EXPERT,
    FUSED_QKV,
    HEAD_NORMS,
    MLP_BIASES,
    OUTER,
    PROJECTION_NORMS,
    ROUTER,
    SHARED_EXPERT,
    Stored,
    biases,
)

SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of expert gates


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One value of ``general.architecture``.

    permuted: llama.cpp turns neighbouring channels of a head together, Hugging Face channels half a head apart; where this is
    true the file's rows of q and k are interleaved accordingly, and are put back.
    keys: further metadata (without the architecture's name before it) -> keys of config.json, all required. optional: the
    same with a default, which is another key's value where it is a string; 0 and false stand for the default.
    constant: keys of config.json that no metadata say. flags: key of config.json -> the tensor of a layer whose presence it is.
    derive: config.json after the last keys that follow from others.
    outer, attention, dense, experts: tensors outside the layers, of every layer, of layers without and with experts.
    gate: how experts are chosen, 0 where there are none. factors: whether every frequency may have its own factor; "always":
    also where the metadata do not say longrope.
    """

    model_type: str
    class_name: str
    permuted: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    constant: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    outer: Mapping[str, Stored] = field(default_factory=lambda: OUTER)
    attention: Mapping[str, Stored] = field(default_factory=lambda: ATTENTION)
    dense: Mapping[str, Stored] = field(default_factory=lambda: DENSE)
    experts: Mapping[str, Stored] = field(default_factory=dict)
    gate: int = 0
    no_rope_every: int = 0
    partial_rotary: bool = False
    windows: bool = False
    factors: str = ""


# Metadata below the architecture's name -> config.json, for every architecture.
REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL: dict[str, tuple[str, Any]] = {
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "rope.freq_base": ("rope_theta", 10000.0),
}
# Read by name elsewhere in this package.
HANDLED = (
    "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scaling.finetuned",
    "expert_gating_func", "nextn_predict_layers",
)  # fmt: skip


def _minicpm(config: dict[str, Any]) -> dict[str, Any]:
    """scale_depth and dim_model_base, which stand inside the factors that llama.cpp stores, as the decimals that they were."""
    root = config["num_hidden_layers"] ** 0.5
    residual, logits = config.pop("residual_scale"), config.pop("logit_scale")
    scale_depth, base = float(f"{residual * root:.6g}"), config["hidden_size"] / logits
    return config | {
        "scale_depth": scale_depth if np.float32(scale_depth / root) == np.float32(residual) else residual * root,
        "dim_model_base": round(base)
        if np.float32(config["hidden_size"] / max(round(base), 1)) == np.float32(logits)
        else base,
    }


_BIASED = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_down.bias"}
_LLAMA: dict[str, Any] = {
    "flags": _BIASED,
    "attention": {**ATTENTION, **biases("qkvo", when="attention_bias")},
    "dense": {**DENSE, **MLP_BIASES},
}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_SOFTMAX: dict[str, Any] = {"gate": SOFTMAX, "experts": {**ROUTER, **EACH_EXPERT}}
# DeepSeek-V3's gate, as its descendants have it.
_GROUPED: dict[str, Any] = {
    "gate": SIGMOID,
    "keys": {
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
    },
    "optional": {
        "expert_group_count": ("n_group", 1),
        "expert_group_used_count": ("topk_group", 1),
        "expert_weights_scale": ("routed_scaling_factor", 1.0),
        "expert_weights_norm": ("norm_topk_prob", False),
        "leading_dense_block_count": ("first_k_dense_replace", 0),
    },
    "experts": {**ROUTER, **CHOICE_BIAS, **EACH_EXPERT, **SHARED_EXPERT},
}
_BAILING: dict[str, Any] = {
    "gate": SIGMOID,
    "keys": {
        **_GROUPED["keys"],
        "expert_count": "num_experts",
        "expert_shared_count": "num_shared_experts",
    },
    "optional": {
        **_GROUPED["optional"],
        "expert_shared_feed_forward_length": ("moe_shared_expert_intermediate_size", "moe_intermediate_size"),
    },
    "constant": {
        "score_function": "sigmoid", "use_qk_norm": True, "use_bias": False, "use_qkv_bias": False,
        "num_nextn_predict_layers": 0,
    },
    "flags": {"moe_router_enable_expert_bias": "exp_probs_b.bias"},
    "outer": {**OUTER, "token_embd.weight": Stored("model.word_embeddings.weight", "Vd")},
    "attention": {
        "attn_norm.weight": ATTENTION["attn_norm.weight"],
        "attn_qkv.weight": Stored("attention.query_key_value.weight", "Qd"),
        "attn_q_norm.weight": Stored("attention.query_layernorm.weight", "h"),
        "attn_k_norm.weight": Stored("attention.key_layernorm.weight", "h"),
        "attn_output.weight": Stored("attention.dense.weight", "dq"),
        "ffn_norm.weight": ATTENTION["ffn_norm.weight"],
    },
    "experts": {
        **ROUTER,
        "exp_probs_b.bias": Stored("mlp.gate.expert_bias", "e", when="moe_router_enable_expert_bias"),
        **EACH_EXPERT,
        **SHARED_EXPERT,
    },
}  # fmt: skip
# GLM's norm before the MLP goes by the other of the two names that llama.cpp has for it.
_GLM_ATTENTION = {key.replace("ffn_norm", "post_attention_norm"): stored for key, stored in ATTENTION.items()}
_GLM_NORMS = {key: Stored(stored.name, stored.shape, when="use_qk_norm") for key, stored in HEAD_NORMS.items()}

ARCHITECTURES = {
    # Mistral too: llama.cpp does not tell it from Llama, and neither does what is computed.
    "llama": Architecture(model_type="llama", class_name="LlamaForCausalLM", permuted=True, factors="longrope", **_LLAMA),
    "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", attention={**ATTENTION, **biases("qkv")}),
    "qwen3": Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        flags=_BIASED,
        attention={**_LLAMA["attention"], **HEAD_NORMS},
        dense=_LLAMA["dense"],
    ),
    "smollm3": Architecture(model_type="smollm3", class_name="SmolLM3ForCausalLM", permuted=True, no_rope_every=4, **_LLAMA),
    "granite": Architecture(model_type="granite", class_name="GraniteForCausalLM", permuted=True, keys=_GRANITE, **_LLAMA),
    "minicpm": Architecture(
        model_type="minicpm",
        class_name="MiniCPMForCausalLM",
        permuted=True,
        keys={"embedding_scale": "scale_emb", "residual_scale": "residual_scale", "logit_scale": "logit_scale"},
        derive=_minicpm,
        factors="longrope",
    ),
    "phi3": Architecture(
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        attention={
            "attn_norm.weight": ATTENTION["attn_norm.weight"],
            **FUSED_QKV,
            "attn_output.weight": ATTENTION["attn_output.weight"],
            "ffn_norm.weight": ATTENTION["ffn_norm.weight"],
        },
        dense={"ffn_up.weight": Stored("mlp.gate_up_proj.weight", "Fd"), "ffn_down.weight": DENSE["ffn_down.weight"]},
        partial_rotary=True,
        windows=True,
        factors="always",
    ),
    "ernie4_5": Architecture(model_type="ernie4_5", class_name="Ernie4_5ForCausalLM", constant={"use_bias": False}),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        constant={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        attention={**ATTENTION, **HEAD_NORMS},
        **_SOFTMAX,
    ),
    "olmoe": Architecture(
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        keys={"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        constant={"norm_topk_prob": False},
        attention={**ATTENTION, **PROJECTION_NORMS},
        **_SOFTMAX,
    ),
    "granitemoe": Architecture(
        model_type="granitemoe",
        class_name="GraniteMoeForCausalLM",
        permuted=True,
        keys={**_GRANITE, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        gate=SOFTMAX,
        flags={"attention_bias": "attn_q.bias"},
        attention=_LLAMA["attention"],
        experts={
            "ffn_gate_inp.weight": Stored("block_sparse_moe.router.layer.weight", "ed"),
            # Two in one: every expert's rows of gate, then of up.
            "ffn_gate_exps.weight": Stored("block_sparse_moe.input_linear.weight", "exd"),
            "ffn_up_exps.weight": Stored("block_sparse_moe.input_linear.weight", "exd"),
            "ffn_down_exps.weight": Stored("block_sparse_moe.output_linear.weight", "edx"),
        },
    ),
    "glm4moe": Architecture(
        model_type="glm4_moe",
        class_name="Glm4MoeForCausalLM",
        flags={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
        attention={**_GLM_ATTENTION, **biases("qkv", when="attention_bias"), **_GLM_NORMS},
        partial_rotary=True,
        **_GROUPED,
    ),
    "dots1": Architecture(
        model_type="dots1",
        class_name="Dots1ForCausalLM",
        constant={"sliding_window": None},
        attention={**ATTENTION, **HEAD_NORMS},
        **_GROUPED,
    ),
    "bailingmoe2": Architecture(
        model_type="bailing_moe", class_name="BailingMoeV2ForCausalLM", partial_rotary=True, **_BAILING
    ),
}
# Architectures whose names suggest one of those, and why they are not.
NOT_IMPORTED = {
    "bailingmoe": "its experts are chosen by a softmax beside shared experts, which no family of bilevel has",
    "granitehybrid": "it has state-space layers, which bilevel does not implement",
    "ernie4_5-moe": "of ERNIE 4.5 only the dense models are implemented",
    "minicpm3": "it has latent attention (MLA), which bilevel does not implement",
    "phimoe": "of Phi only the dense models are implemented",
    "qwen2moe": "of Qwen's models with experts only Qwen3's are implemented",
}
