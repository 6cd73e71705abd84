"""Dense Llama and Qwen3 folders, written by transformers, load unchanged: equal logits, equal greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bilevel.checkpoint import load_model, save_model
from tests.support.decoding import greedy, random_ids

TINY: dict[str, Any] = {
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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-Hq4-Hkv2-untied": (LlamaForCausalLM, {}),
    "llama-Hq4-Hkv4-tied": (LlamaForCausalLM, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-Hq4-Hkv1-D6-biases": (
        LlamaForCausalLM,
        {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-rope-llama3": (LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama-rope-linear": (
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
    ),
    "qwen3-Hq4-Hkv2-D16-tied": (Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-Hq4-Hkv4-D8-bias": (Qwen3ForCausalLM, {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True}),
}


def make_huggingface(name: str) -> PreTrainedModel:
    """A random model with every parameter far from its initial value, so that a forgotten one changes the logits."""
    kind, changes = MODELS[name]
    config = {LlamaForCausalLM: LlamaConfig, Qwen3ForCausalLM: Qwen3Config}[kind](**{**TINY, **changes})
    torch.manual_seed(len(name))
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_load_model_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = make_huggingface(name)
    theirs.save_pretrained(tmp_path / "dense")
    ours = load_model(tmp_path / "dense")
    assert ours.config.routing.is_dense

    ids = random_ids(2, 75)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)

    prompt = random_ids(2, 9)
    generated = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert greedy(ours, prompt, 12) == generated[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("preset", ["two_level", "moba", "moba_gqa"])
@pytest.mark.parametrize("length", [1, 3, 4, 31])
@torch.no_grad()
def test_load_model_routed_over_all_blocks_equals_transformers(preset: str, length: int, tmp_path: Path) -> None:
    """The dense weights as they are, with a routing section that keeps at least as many blocks as there are."""
    theirs = make_huggingface("qwen3-Hq4-Hkv2-D16-tied")
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["routing"] = {"preset": preset, "block_size": 4, "coarse_topk": 9, "topk": 8}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = random_ids(2, length)
    torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_save_model_is_read_by_transformers(name: str, tmp_path: Path) -> None:
    theirs = make_huggingface(name)
    theirs.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = random_ids(1, 40)
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_load_model_reads_shards(tmp_path: Path) -> None:
    theirs = make_huggingface("llama-Hq4-Hkv2-untied")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = random_ids(1, 20)
    torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=0)
