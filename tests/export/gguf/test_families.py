"""Every family that ``bilevel/families`` reads, from GGUF: the checkpoint that transformers wrote, tensor by tensor and bit by
bit, its configuration, and its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig

from bilevel.checkpoint import load_model
from bilevel.export.gguf.convert import import_gguf
from bilevel.export.gguf.dequantise import read_rows
from bilevel.export.gguf.header import GgufTensor
from tests.bilevel.families.definitions import save_bailing, save_minicpm
from tests.bilevel.families.released import LONGROPE, MODELS, YARN, Released, make
from tests.support.decoding import random_ids
from tests.support.gguf_files import write_gguf
from tests.support.gguf_released import converted_metadata, converted_tensors, released_files, tiny_vocabulary

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
# The name of a model -> llama.cpp's architecture. Those that tests/bilevel/families lacks are added to its table here.
CASES = {
    "granitemoe": "granitemoe",
    "gguf-qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "glm4_moe": "glm4moe",
    "glm4_moe-one-group": "glm4moe",
    "dots1": "dots1",
    "phi3": "phi3",
    "phi3-longrope-short": "phi3",
    "phi3-longrope-long": "phi3",
    "gguf-ernie4_5": "ernie4_5",
    "yarn": "qwen3",
    "gguf-yarn-betas": "llama",
    "gguf-yarn-experts": "qwen3moe",
    "gguf-longrope": "llama",
    "gguf-mistral": "llama",
    "linear": "qwen2",
}
ADDED = {
    "gguf-qwen3_moe": Released("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "gguf-ernie4_5": Released("Ernie4_5", {"head_dim": 16, "use_bias": False, "tie_word_embeddings": True}),
    "gguf-yarn-betas": Released("Llama", {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}}, length=90),
    "gguf-yarn-experts": Released("Qwen3Moe", {**EXPERTS, "head_dim": 16, "rope_parameters": YARN}, length=90),
    "gguf-longrope": Released(
        "Llama",
        {
            "rope_parameters": {
                **{key: value for key, value in LONGROPE.items() if key != "partial_rotary_factor"},
                "short_factor": [1.0, 1.1, 1.3, 1.4],
                "long_factor": [1.0, 2.0, 5.5, 7.25],
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "gguf-mistral": Released("Mistral", {"head_dim": 16, "sliding_window": None}),
}
# Of no use to a model, or llama.cpp's way of saying it.
_UNCOMPARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "transformers_version", "_name_or_path",
    "model_type", "initializer_range", "attention_dropout", "layer_types", "max_window_layers",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, released in ADDED.items():
        monkeypatch.setitem(MODELS, name, released)


def imported(folder: Path, arch: str, config: dict[str, Any], weights: dict[str, np.ndarray], kind: str = "F32") -> Path:
    metadata = {**converted_metadata(arch, config), **tiny_vocabulary()}
    write_gguf(folder / "m.gguf", metadata, converted_tensors(arch, config, weights), kind)
    import_gguf(folder / "m.gguf", folder / "checkpoint")
    return folder / "checkpoint"


def assert_equal_weights(checkpoint: Path, expected: dict[str, np.ndarray]) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert [key for key in stored if not np.array_equal(stored[key], expected[key])] == []


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_released_model_comes_back(name: str, tmp_path: Path) -> None:
    model = make(name)
    config, weights = released_files(model)
    checkpoint = imported(tmp_path, CASES[name], config, weights)
    assert_equal_weights(checkpoint, weights)
    ids = random_ids(1, MODELS[name].length)
    torch.testing.assert_close(load_model(checkpoint)(ids), model(ids).logits, atol=1e-4, rtol=1e-4)
    # And as transformers reads it.
    again, before = AutoConfig.from_pretrained(checkpoint).to_dict(), model.config.to_dict()
    differing = {
        key: (again.get(key), before[key]) for key in before if key not in _UNCOMPARED and again.get(key) != before[key]
    }
    assert not differing, differing


@pytest.mark.parametrize("family, arch", [(save_minicpm, "minicpm"), (save_bailing, "bailingmoe2")])
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 2, "tie_word_embeddings": False}])
@torch.no_grad()
def test_a_family_that_transformers_lacks(family: Any, arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """tests/bilevel/families holds these checkpoints against the families' definitions."""
    if arch == "bailingmoe2":  # an attention_factor of its own is refused: test_rope.py
        changes = {**changes, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    original = family(tmp_path / "released", **changes)
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    config.setdefault("tie_word_embeddings", "lm_head.weight" not in original)
    weights = {key: value.numpy() for key, value in original.items()}
    checkpoint = imported(tmp_path, arch, config, weights)
    assert_equal_weights(checkpoint, weights)
    ids = random_ids(1, 60)
    torch.testing.assert_close(load_model(checkpoint)(ids), load_model(tmp_path / "released")(ids), atol=1e-5, rtol=1e-5)
    stored = json.loads((checkpoint / "config.json").read_text())
    for key in ("scale_emb", "scale_depth", "dim_model_base", "routed_scaling_factor", "n_group", "partial_rotary_factor"):
        assert stored.get(key) == config.get(key), key


def test_quantised_experts_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert of a stack is what the gguf package makes of its rows, and no more than its rows are read at once."""
    monkeypatch.setitem(
        MODELS, "gguf-wide", Released("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64})
    )
    config, weights = released_files(make("gguf-wide"))
    reads: list[int] = []

    def recording(tensor: GgufTensor, start: int, stop: int, heads: int = 0) -> np.ndarray:
        reads.append((stop - start) * tensor.shape[-1])
        return read_rows(tensor, start, stop, heads)

    monkeypatch.setattr("bilevel.export.gguf.dequantise.read_rows", recording)
    checkpoint = imported(tmp_path, "olmoe", config, weights, "Q8_0")
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected = {
        key: array if array.ndim == 1 else gguf.dequantize(gguf.quantize(array, q8), q8) for key, array in weights.items()
    }
    assert_equal_weights(checkpoint, expected)
    assert max(reads) == weights["model.embed_tokens.weight"].size and reads.count(64 * 32) == 2 * 6 * 3
