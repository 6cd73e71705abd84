"""Tiny random models of released families (``tests/bilevel/families``) as llama.cpp's converter would write them to GGUF.

What it does with a model is read off llama.cpp's ``conversion`` folder; names of tensors are the gguf package's own table.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from tests.support.gguf_files import Metadata

# Architectures whose rows of q and k the converter permutes.
PERMUTED = ("llama", "granitemoe", "minicpm")


def tiny_vocabulary(size: int = 101) -> Metadata:
    """A SentencePiece vocabulary without bytes, as small as the models."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(size - 3))],
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (size - 3)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def released_files(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and the tensors of the checkpoint that transformers writes, which is what is converted."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


def converted_metadata(arch: str, config: dict[str, Any]) -> Metadata:
    """``set_gguf_parameters`` of the converter, by config.json."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    further = config.get("num_nextn_predict_layers") or 0
    values: Metadata = {
        "block_count": config["num_hidden_layers"] + further,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * share),
        "vocab_size": config["vocab_size"],
        **_rope(arch, config, rope),
    }
    if config.get("head_dim") and arch != "granitemoe":
        values |= {"attention.key_length": head, "attention.value_length": head}
    if arch == "granitemoe":
        values |= {
            "attention.scale": config["attention_multiplier"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": config["logits_scaling"],
        }
    if arch == "minicpm":
        values |= {
            "embedding_scale": float(config["scale_emb"]),
            "residual_scale": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
            "logit_scale": config["hidden_size"] / config["dim_model_base"],
        }
    values |= _experts(arch, config)
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in values.items()}}


def _rope(arch: str, config: dict[str, Any], rope: dict[str, Any]) -> Metadata:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if arch == "phi3":
        trained = rope.get("original_max_position_embeddings", config["original_max_position_embeddings"])
        scale = config["max_position_embeddings"] / trained
        amplitude = math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0
        values: Metadata = {"rope.scaling.original_context_length": trained}
        values["attention.sliding_window"] = config.get("sliding_window") or 0
        return values | ({"rope.scaling.attn_factor": amplitude} if kind == "longrope" else {})
    if kind not in ("linear", "yarn", "longrope"):
        return {}
    values = {"rope.scaling.type": kind}
    if kind == "longrope":
        return values
    values["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        values |= {f"rope.scaling.{names[key]}": float(rope[key]) for key in names if rope.get(key) is not None}
    return values


def _experts(arch: str, config: dict[str, Any]) -> Metadata:
    if not config.get("num_experts_per_tok"):
        return {}
    count = next(config[key] for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in config)
    values: Metadata = {"expert_count": count, "expert_used_count": config["num_experts_per_tok"]}
    if "moe_intermediate_size" in config:
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if arch in ("glm4moe", "dots1", "bailingmoe2"):
        shared = config.get("n_shared_experts", config.get("num_shared_experts"))
        values |= {
            "expert_gating_func": 2,
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
            "expert_weights_scale": config["routed_scaling_factor"],
            "expert_weights_norm": config["norm_topk_prob"],
            "expert_shared_count": shared,
            "leading_dense_block_count": config["first_k_dense_replace"],
        }
    if arch == "bailingmoe2":
        values["expert_shared_feed_forward_length"] = config["moe_intermediate_size"]
    if config.get("num_nextn_predict_layers"):
        values["nextn_predict_layers"] = config["num_nextn_predict_layers"]
    return values


def converted_tensors(arch: str, config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``modify_tensors`` of the converter: experts stacked, fused ones taken apart, rows of q and k permuted."""
    layers = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], layers)
    tensors: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for key, array in weights.items():
        if key == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        prefix, _, expert = key.partition(".mlp.experts.")
        if expert:
            number, kind, _ = expert.split(".")
            stacks.setdefault(f"{prefix}.mlp.experts.{kind}", {})[int(number)] = array
        elif key.endswith("block_sparse_moe.input_linear.weight"):
            block = key.split(".")[2]
            gate, up = np.split(array, 2, axis=1)
            tensors |= {f"blk.{block}.ffn_gate_exps.weight": gate, f"blk.{block}.ffn_up_exps.weight": up}
        else:
            tensors[_name(table, key)] = _permuted(array, key, config) if arch in PERMUTED else array
    for stem, experts in stacks.items():
        tensors[f"{table.get_name(stem)}.weight"] = np.stack([experts[number] for number in range(len(experts))])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "long_factor" in rope:
        tensors |= {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _name(table: Any, key: str) -> str:
    key = key.replace("e_score_correction_bias", "e_score_correction.bias").replace("gate.expert_bias", "gate.expert_bias.bias")
    stem, _, suffix = key.rpartition(".")
    name = table.get_name(stem)
    assert name, key
    return f"{name}.{suffix}"


def _permuted(array: np.ndarray, key: str, config: dict[str, Any]) -> np.ndarray:
    kinds = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    heads = kinds.get(key.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
