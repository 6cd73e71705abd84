"""Tiny models of transformers, written as GGUF, come back with every weight, key and token; transformers' own reader agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bilevel.checkpoint import load_model
from bilevel.errors import CheckpointError
from bilevel.export.gguf.convert import import_gguf
from bilevel.export.gguf.header import read_gguf
from bilevel.export.gguf.rope import exact_float
from tests import ROOT
from tests.support.gguf_files import MODELS, byte_level_vocabulary, make_model, model_metadata, write_gguf, write_model

VOCABULARY = byte_level_vocabulary("qwen2")
# What config.json says of a model, in the words that transformers knows it by.
COMPARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "hidden_act",
    "bos_token_id", "eos_token_id", "pad_token_id", "model_type", "no_rope_layers",
    "attention_multiplier", "embedding_multiplier",
    "residual_multiplier", "logits_scaling",
)  # fmt: skip


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_configuration_come_back(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", name, VOCABULARY)
    report = import_gguf(tmp_path / "m.gguf", tmp_path / "checkpoint")
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    expected = {key: value for key, value in model.state_dict().items() if key in stored or key != "lm_head.weight"}
    assert stored.keys() == expected.keys()
    assert [key for key in stored if not torch.equal(stored[key], expected[key])] == []
    assert report.num_weights == sum(value.numel() for value in expected.values())
    config = AutoConfig.from_pretrained(tmp_path / "checkpoint")
    for key in COMPARED:
        if hasattr(model.config, key):
            assert getattr(config, key) == getattr(model.config, key), key
    assert config.architectures == [type(model).__name__]


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_computes_what_the_original_computes(name: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "m.gguf", name, VOCABULARY)
    import_gguf(tmp_path / "m.gguf", tmp_path / "checkpoint")
    model = load_model(tmp_path / "checkpoint")
    ids = torch.randint(original.config.vocab_size, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), original(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, kind",
    [("llama-tied-biases", "Q4_1"), ("qwen3", "Q8_0"), *(("qwen2", kind) for kind in ("F16", "BF16", "Q4_0", "Q5_0", "Q5_1"))],
)
def test_transformers_reads_the_same(name: str, kind: str, tmp_path: Path) -> None:
    """transformers' own loader of GGUF files, where it knows the architecture: the same weights, bit by bit, and the same
    configuration."""
    write_model(tmp_path / "m.gguf", name, VOCABULARY, kind)
    import_gguf(tmp_path / "m.gguf", tmp_path / "checkpoint")
    theirs = load_gguf_checkpoint(str(tmp_path / "m.gguf"))["config"]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "checkpoint"))
    tensors = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=skeleton)["tensors"]
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert [key for key in stored if not torch.equal(stored[key], tensors[key])] == []
    ours = read_json(tmp_path / "checkpoint" / "config.json")
    theirs = {key: exact_float(value) if isinstance(value, float) else value for key, value in theirs.items()}
    for key in ("_model_name_or_path", "unk_token_id"):  # of no use to a model
        theirs.pop(key, None)
    assert theirs == {key: ours[key] for key in theirs}


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", "llama", {**VOCABULARY, "tokenizer.ggml.eot_token_id": 2})
    import_gguf(tmp_path / "m.gguf", tmp_path / "checkpoint")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == names
    assert read_json(tmp_path / "checkpoint" / "config.json")["dtype"] == "float32"
    # <|endoftext|> is a control token: llama.cpp ends an answer there too.
    assert read_json(tmp_path / "checkpoint" / "generation_config.json") == {
        "bos_token_id": 1,
        "pad_token_id": 2,
        "eos_token_id": [2, 0],
    }
    settings = read_json(tmp_path / "checkpoint" / "tokenizer_config.json")
    assert settings["chat_template"] == VOCABULARY["tokenizer.chat_template"]
    assert (settings["bos_token"], settings["eos_token"], settings["model_max_length"]) == ("<|im_start|>", "<|im_end|>", 256)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sixteen_bits_are_rounded_to_nearest(dtype: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", "qwen3", VOCABULARY)
    import_gguf(tmp_path / "m.gguf", tmp_path / "checkpoint", dtype=dtype)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for key, value in load_file(tmp_path / "checkpoint" / "model.safetensors").items():
        assert torch.equal(value, model.state_dict()[key].to(kind)), key
    assert read_json(tmp_path / "checkpoint" / "config.json")["dtype"] == {"fp16": "float16", "bf16": "bfloat16"}[dtype]


def test_weights_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    metadata = {**model_metadata("llama", write_model(tmp_path / "m.gguf", "llama", VOCABULARY)), **VOCABULARY}
    tensors = {name: read_tensor(tmp_path / "m.gguf", name) for name in read_gguf(tmp_path / "m.gguf").tensors}
    tensors["blk.3.ffn_up.weight"][5, 7] = 1e5
    write_gguf(tmp_path / "large.gguf", metadata, tensors)
    with pytest.raises(
        CheckpointError, match=r"large\.gguf holds weights too large for fp16 in blk\.3\.ffn_up\.weight; import it as"
    ):
        import_gguf(tmp_path / "large.gguf", tmp_path / "checkpoint", dtype="fp16")
    assert not (tmp_path / "checkpoint").exists()


def read_tensor(path: Path, name: str) -> np.ndarray:
    tensor = read_gguf(path).tensors[name]
    return np.fromfile(path, np.float32, int(np.prod(tensor.shape)), offset=tensor.offset).reshape(tensor.shape)


def test_the_head_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    write_model(
        tmp_path / "m.gguf", "llama", {**VOCABULARY, "general.languages": ["en", "de"], "general.scores": [0.5, -2.0]}, "Q4_1"
    )
    ours, theirs = read_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert ours.metadata == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert (own.kind, own.shape, own.offset) == (
            tensor.tensor_type.name,
            tuple(tensor.shape[::-1].tolist()),
            tensor.data_offset,
        )
        assert own.num_rows * own.row_bytes == tensor.n_bytes


def test_numbers_are_what_they_were_before_they_became_32_bits() -> None:
    assert [exact_float(float(np.float32(value))) for value in (1e-5, 1e-6, 5e5, 0.22, 1e6)] == [1e-5, 1e-6, 5e5, 0.22, 1e6]


def wide_model(path: Path, hidden: int) -> Path:
    """One layer of ``hidden`` channels, in Q8_0."""
    vocabulary = byte_level_vocabulary("qwen2")
    count = len(vocabulary["tokenizer.ggml.tokens"])
    metadata = {**model_metadata("llama", make_model("llama", count)), **vocabulary}
    changes = {"embedding_length": hidden, "feed_forward_length": 2 * hidden, "block_count": 1}
    changes |= dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), hidden // 4)
    metadata |= {f"llama.{key}": value for key, value in changes.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // 2, hidden),
        "attn_v": (hidden // 2, hidden),
    }
    shapes |= {"attn_output": (hidden, hidden), "ffn_up": (2 * hidden, hidden), "ffn_gate": (2 * hidden, hidden)}
    shapes |= {"ffn_down": (hidden, 2 * hidden), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors = {f"blk.0.{key}.weight": np.ones(shape, np.float32) for key, shape in shapes.items()}
    tensors |= {"token_embd.weight": np.ones((count, hidden), np.float32), "output_norm.weight": np.ones(hidden, np.float32)}
    return write_gguf(path, metadata, tensors, "Q8_0")


def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    """An import of 159 MB of weights, of which the largest tensor has 32 MB, takes less than twice that more than one of next
    to nothing."""
    program = (
        "import sys; from pathlib import Path; from bilevel.export.gguf.convert import import_gguf\n"
        "import_gguf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM:')))"
    )
    peaks = []
    for hidden in (64, 2048):
        model = wide_model(tmp_path / f"{hidden}.gguf", hidden)
        command = [sys.executable, "-c", program, str(model), str(tmp_path / str(hidden))]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(int(result.stdout) * 1024)
    assert (tmp_path / "2048" / "model.safetensors").stat().st_size > 150e6
    assert peaks[1] - peaks[0] < 2 * 32 * 2**20
