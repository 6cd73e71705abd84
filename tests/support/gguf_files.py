"""GGUF files made in tests: tiny models of transformers as llama.cpp's converter would write them, with tokenizers trained
here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

TEXT = """
The quick brown fox jumps over the lazy dog. Don't they've we'll I'm he'd it's DON'T; 12 345 6789 0.5 1,000,000
(a+b)*c == d != e;
for i in range(10):\n    print(f"{i}: {values[i]!r}")\n\n\tif x <= y:\r\n        return None  # done
Le cœur déçu mais l'âme plutôt naïve, Noël où es-tu. Größe, Straße, Füße. El niño y la niña, ¿qué tal? Zażółć gęślą jaźń.
Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
نص حكيم له سر قاطع وذو شأن عظيم. दिन रात हिन्दी में लिखते रहो।
いろはにほへと ちりぬるを カタカナ 漢字仮名交じり文。 天地玄黃 宇宙洪荒。
다람쥐 헌 쳇바퀴에 타고파. เป็นมนุษย์สุดประเสริฐ 😀👍🏽👩‍👩‍👧‍👦🇩🇪 ① ½ ² ٣ ७ Ⅷ
"""
# What strings are drawn from: ASCII, spaces and line ends, letters of many scripts, digits of many scripts, signs, combining
# marks.
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r  \N{NO-BREAK SPACE}\N{EM SPACE}",
    "'.,;:!?\"()[]{}<>|\\/+-=*&^%$#@~`_",
    "éèüßñçøåæœÀÉÎ",
    "漢字仮名交じりカナ天地玄黃",
    "한국어다람쥐",
    "العربيةحكيم",
    "हिन्दीมนุษย์",
    "РусскийязыкΕλληνικά",
    "😀👍🏽👩\N{ZERO WIDTH JOINER}🇩🇪①½²٣७Ⅷ",
    "\N{COMBINING ACUTE ACCENT}\N{COMBINING DIAERESIS}e\N{ZERO WIDTH SPACE}\N{BYTE ORDER MARK}",
)
_WORDS = TEXT.split(" ")


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of up to about 80 characters, of one script or many, with words of TEXT, runs of spaces and contractions."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        alphabets = draw.sample(_ALPHABETS, draw.randint(1, 4))
        pieces = []
        for _ in range(draw.randint(0, 12)):
            kind = draw.random()
            if kind < 0.4:
                pieces.append(draw.choice(_WORDS))
            elif kind < 0.5:
                pieces.append(draw.choice(" \n\t") * draw.randint(1, 4))
            elif kind < 0.6:
                pieces.append(draw.choice(("'s", "'T", "'re", "n't", "'LL", "  1", " 22", "333", "4444")))
            else:
                pieces.append("".join(draw.choice(draw.choice(alphabets)) for _ in range(draw.randint(1, 8))))
        texts.append(draw.choice(("", " ")).join(pieces))
    return texts


Metadata = dict[str, Any]


def byte_level_vocabulary(pre: str, size: int = 400) -> Metadata:
    """Metadata of a byte-level BPE trained on TEXT without any cutting but at spaces, so that merges reach as far as they
    can."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Runs of digits, spaces and signs become tokens too: a wrong cut then shows.
    tokenizer.train_from_iterator([TEXT, *(["  1  22  333 4444 '' ;; ===== \n\n\n    x"] * 20), "12345678" * 20], trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "<tool_call>", "<tool call>"]
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(tokens) - 5), 4, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }


def sentencepiece_vocabulary(size: int = 500) -> Metadata:
    """Metadata of a SentencePiece BPE with byte fallback: a token's score is minus the place of its merge, as in
    SentencePiece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator([line for line in TEXT.splitlines() for _ in range(3)], trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    joined = {"".join(pair): -float(place) for place, pair in reversed(list(enumerate(_merges(tokenizer))))}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0 if index < 259 else joined.get(token, -1e6) for index, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, type, type, dict[str, Any]]] = {
    "llama": ("llama", LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied-biases": (
        "llama",
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-3.2": (
        "llama",
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8192},
            "head_dim": 128,
            "max_position_embeddings": 131072,
        },
    ),
    "llama-linear": (
        "llama",
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "qwen2": ("qwen2", Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "smollm3": ("smollm3", SmolLM3Config, SmolLM3ForCausalLM, {"tie_word_embeddings": True}),
    "granite": (
        "granite",
        GraniteConfig,
        GraniteForCausalLM,
        {"attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    ),
}


def make_model(name: str, vocab_size: int) -> PreTrainedModel:
    """A random model with every parameter far from its initial value, so that a forgotten one changes the logits."""
    _, config, kind, changes = MODELS[name]
    torch.manual_seed(len(name))
    model = kind(config(**{**TINY, **changes, "vocab_size": vocab_size})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def model_metadata(name: str, model: PreTrainedModel) -> Metadata:
    """What convert_hf_to_gguf.py writes below the architecture's name."""
    arch, config = MODELS[name][0], model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata: Metadata = {
        "general.architecture": arch,
        "general.name": "tiny",
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.rope.dimension_count": head,
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if config.rope_parameters["rope_type"] == "linear":
        metadata |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": config.rope_parameters["factor"]}
    if arch == "granite":
        metadata |= {
            f"{arch}.attention.scale": config.attention_multiplier,
            f"{arch}.embedding_scale": config.embedding_multiplier,
            f"{arch}.residual_scale": config.residual_multiplier,
            f"{arch}.logit_scale": config.logits_scaling,
        }
    return metadata


def model_tensors(name: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's parameters under llama.cpp's names (the gguf package's table), q and k permuted where llama.cpp turns
    neighbours."""
    arch, config = MODELS[name][0], model.config
    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = key.rpartition(".")
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.rpartition(".")[2])
        if heads and arch in ("llama", "smollm3", "granite"):
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        tensors[f"{table.get_name(stem)}.{suffix}"] = np.ascontiguousarray(array)
    if config.rope_parameters["rope_type"] == "llama3":
        rope = model.model.rotary_emb.inv_freq.numpy()
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(len(rope)) / len(rope))
        tensors["rope_freqs.weight"] = (plain / rope).astype(np.float32)
    return tensors


def write_gguf(path: Path, metadata: Metadata, tensors: dict[str, np.ndarray], kind: str = "F32") -> Path:
    """One GGUF file; matrices are stored as ``kind``, vectors in fp32, as llama.cpp does."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # the writer has written it
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    stored = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        if array.ndim < 2 or kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, name: str, vocabulary: Metadata, kind: str = "F32") -> PreTrainedModel:
    """Write the tiny model ``name`` with a tokenizer; returns the model as it was before its weights were rounded to
    ``kind``."""
    model = make_model(name, len(vocabulary["tokenizer.ggml.tokens"]))
    write_gguf(path, {**model_metadata(name, model), **vocabulary}, model_tensors(name, model), kind)
    return model
