"""Families that transformers has no class for: their definition in slow loops over single tokens, on the tensors as stored.

MiniCPM: arXiv 2404.06395 and the released code's scalars. Ling and Ring 2.0, by the released code: DeepSeek-V3's gate (arXiv
2412.19437, section 2.1.2) and grouped-query attention with a norm of every head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
EPSILON = 1e-6
COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": EPSILON,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
MINICPM: dict[str, Any] = {
    **COMMON,
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "model_type": "minicpm",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}
BAILING: dict[str, Any] = {
    **COMMON,
    "architectures": ["BailingMoeV2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM"},
    "model_type": "bailing_moe",
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.1},
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_qk_norm": True,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "num_nextn_predict_layers": 0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "max_window_layers": 20,
}


def _random(shapes: dict[str, tuple[int, ...]]) -> Weights:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 and "bias" not in name else 0.0)
        for name, shape in shapes.items()
    }


def _mlp_shapes(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (hidden, width),
        f"{prefix}.up_proj.weight": (hidden, width),
        f"{prefix}.down_proj.weight": (width, hidden),
    }


def save_minicpm(folder: Path, **changes: Any) -> Weights:
    """Write a random MiniCPM; returns its tensors."""
    config = {**MINICPM, **changes}
    width, head = config["hidden_size"], 8
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (101, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (101, width)
    for layer in (f"model.layers.{i}" for i in range(2)):
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{kind}_proj.weight": (n * head, width) for kind, n in (("q", 4), ("k", 2), ("v", 2))}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (width, 4 * head), **_mlp_shapes(f"{layer}.mlp", width, 40)}
    return _write(folder, config, _random(shapes))


def save_bailing(folder: Path, **changes: Any) -> Weights:
    """Write a random Ling; returns its tensors."""
    config = {**BAILING, **changes}
    width, head = config["hidden_size"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (101, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (101, width),
    }
    for i, layer in ((i, f"model.layers.{i}") for i in range(2)):
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.attention.{kind}_layernorm.weight": (head,) for kind in ("query", "key")}
        shapes |= {f"{layer}.attention.query_key_value.weight": (8 * head, width)}
        shapes |= {f"{layer}.attention.dense.weight": (width, 4 * head)}
        if i == 0:
            shapes |= _mlp_shapes(f"{layer}.mlp", width, 40)
            continue
        shapes |= {f"{layer}.mlp.gate.weight": (8, width), f"{layer}.mlp.gate.expert_bias": (8,)}
        for part in ("shared_experts", *(f"experts.{e}" for e in range(8))):
            shapes |= _mlp_shapes(f"{layer}.mlp.{part}", width, 24)
    return _write(folder, config, _random(shapes))


def _write(folder: Path, config: dict[str, Any], weights: Weights) -> Weights:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean() + EPSILON) * weight


def _mlp(x: Tensor, weights: Weights, prefix: str) -> Tensor:
    gate, up, down = (weights[f"{prefix}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def _turn(x: Tensor, position: int, frequencies: list[float], amplitude: float) -> Tensor:
    """One head's vector: channel i turns with channel i + r/2 of the first r."""
    turned, half = x.clone(), len(frequencies)
    for i, frequency in enumerate(frequencies):
        cos, sin = amplitude * math.cos(position * frequency), amplitude * math.sin(position * frequency)
        turned[i] = x[i] * cos - x[i + half] * sin
        turned[i + half] = x[i + half] * cos + x[i] * sin
    return turned


def _attend(q: list[list[Tensor]], k: list[list[Tensor]], v: list[list[Tensor]]) -> list[Tensor]:
    """[token] of all heads' results, from [token][head] vectors; two query heads share a key head."""
    results = []
    for t, queries in enumerate(q):
        heads = []
        for h, query in enumerate(queries):
            scores = torch.stack([query @ k[s][h // 2] for s in range(t + 1)]) / math.sqrt(len(query))
            heads.append(sum((p * v[s][h // 2] for s, p in enumerate(scores.softmax(0))), torch.zeros_like(query)))
        results.append(torch.cat(heads))
    return results


def minicpm_logits(ids: list[int], w: Weights) -> Tensor:
    """[L, vocab], with the scalars where the model has them."""
    depth, frequencies = 1.4 / math.sqrt(2), [10000.0 ** (-2 * i / 8) for i in range(4)]
    stream = [w["model.embed_tokens.weight"][token] * 12 for token in ids]
    for layer in (f"model.layers.{i}" for i in range(2)):
        xs = [_norm(x, w[f"{layer}.input_layernorm.weight"]) for x in stream]
        q, k, v = ([[*(w[f"{layer}.self_attn.{n}_proj.weight"] @ x).split(8)] for x in xs] for n in "qkv")
        q, k = ([[_turn(head, t, frequencies, 1.0) for head in heads] for t, heads in enumerate(part)] for part in (q, k))
        out = w[f"{layer}.self_attn.o_proj.weight"]
        stream = [x + depth * (out @ a) for x, a in zip(stream, _attend(q, k, v), strict=True)]
        stream = [x + depth * _mlp(_norm(x, w[f"{layer}.post_attention_layernorm.weight"]), w, f"{layer}.mlp") for x in stream]
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return torch.stack([head @ (_norm(x, w["model.norm.weight"]) / (32 / 8)) for x in stream])


def _yarn_frequencies(base: float, width: int, factor: float, trained: int) -> list[float]:
    """YaRN's ramp between the channels that turn 32 times and once in the trained length."""

    def channel(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), width - 1)
    frequencies = []
    for i in range(width // 2):
        plain = base ** (-2 * i / width)
        share = min(max((i - low) / (high - low), 0.0), 1.0)
        frequencies.append(share * plain / factor + (1 - share) * plain)
    return frequencies


def bailing_experts(x: Tensor, w: Weights, prefix: str) -> Tensor:
    """Sigmoid scores; 2 of 4 groups by their two best biased scores; 3 experts by biased score, weighted by the plain ones."""
    scores = torch.sigmoid(w[f"{prefix}.gate.weight"] @ x)
    biased = scores + w[f"{prefix}.gate.expert_bias"]
    groups = sorted(range(4), key=lambda g: -float(biased[2 * g : 2 * g + 2].sum()))[:2]
    allowed = [expert for expert in range(8) if expert // 2 in groups]
    chosen = sorted(allowed, key=lambda e: -float(biased[e]))[:3]
    total = sum(float(scores[e]) for e in chosen) + 1e-20
    out = _mlp(x, w, f"{prefix}.shared_experts")
    for expert in chosen:
        out = out + 2.5 * float(scores[expert]) / total * _mlp(x, w, f"{prefix}.experts.{expert}")
    return out


def bailing_logits(
    ids: list[int], w: Weights, keep: Callable[[int, list[Tensor], list[Tensor]], list[int]] | None = None
) -> Tensor:
    """[L, vocab]. keep: (token, the queries of a key head's group, that head's keys) -> the tokens that are read; None: all."""
    frequencies = _yarn_frequencies(600000.0, 8, 4.0, 32)
    stream = [w["model.word_embeddings.weight"][token] for token in ids]
    for i, layer in ((i, f"model.layers.{i}") for i in range(2)):
        xs = [_norm(x, w[f"{layer}.input_layernorm.weight"]) for x in stream]
        heads = [[*(w[f"{layer}.attention.query_key_value.weight"] @ x).split(16)] for x in xs]
        q, k, v = ([token[first:last] for token in heads] for first, last in ((0, 4), (4, 6), (6, 8)))
        norms = [w[f"{layer}.attention.{kind}_layernorm.weight"] for kind in ("query", "key")]
        q, k = (
            [[_turn(_norm(head, norm), t, frequencies, 1.1) for head in token] for t, token in enumerate(part)]
            for part, norm in ((q, norms[0]), (k, norms[1]))
        )
        attended = _attend(q, k, v) if keep is None else _attend_some(q, k, v, keep)
        stream = [x + w[f"{layer}.attention.dense.weight"] @ a for x, a in zip(stream, attended, strict=True)]
        for t, x in enumerate(stream):
            normed = _norm(x, w[f"{layer}.post_attention_layernorm.weight"])
            stream[t] = x + (_mlp(normed, w, f"{layer}.mlp") if i == 0 else bailing_experts(normed, w, f"{layer}.mlp"))
    return torch.stack([w["lm_head.weight"] @ _norm(x, w["model.norm.weight"]) for x in stream])


def moba_tokens(token: int, queries: list[Tensor], keys: list[Tensor], block_size: int = 4, topk: int = 3) -> list[int]:
    """MoBA shared by a group: the own block, and the earlier blocks whose mean key scores best over the group's queries."""
    own = token // block_size
    means = [torch.stack(keys[b * block_size : (b + 1) * block_size]).mean(0) for b in range(own)]
    scores = [sum(float(query @ mean) for query in queries) for mean in means]
    chosen = sorted(range(own), key=lambda b: -scores[b])[: topk - 1]
    return [s for b in sorted([*chosen, own]) for s in range(b * block_size, min((b + 1) * block_size, token + 1))]


def _attend_some(
    q: list[list[Tensor]],
    k: list[list[Tensor]],
    v: list[list[Tensor]],
    keep: Callable[[int, list[Tensor], list[Tensor]], list[int]],
) -> list[Tensor]:
    results = []
    for t, queries in enumerate(q):
        heads = []
        for h, query in enumerate(queries):
            kv = h // 2
            tokens = keep(t, queries[2 * kv : 2 * kv + 2], [token[kv] for token in k])
            scores = torch.stack([query @ k[s][kv] for s in tokens]) / math.sqrt(len(query))
            heads.append(sum((p * v[s][kv] for s, p in zip(tokens, scores.softmax(0), strict=True)), torch.zeros_like(query)))
        results.append(torch.cat(heads))
    return results
