"""GGUF metadata -> ``config.json``, and every stored tensor -> its place in the checkpoint. All is settled before a weight is
read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.errors import CheckpointError
from bilevel.export.gguf.architectures import (
    ARCHITECTURES,
    BIASES,
    EMBEDDING,
    HANDLED,
    HEAD,
    LAYER,
    MLP_BIASES,
    OPTIONAL,
    OUTER,
    REQUIRED,
    ROPE_FACTORS,
    ROPE_SCALING,
    Architecture,
    Stored,
    sizes,
)
from bilevel.export.gguf.dequantise import read_rows
from bilevel.export.gguf.header import CONVERT, GgufFile, GgufTensor

_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_NEUTRAL: tuple[Any, ...] = (0, False, None, "", [], "none")  # a feature that is stored and switched off
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Placed:
    """A stored tensor and its place. heads: how many heads its rows are interleaved by, 0 where they lie as they should."""

    source: GgufTensor
    name: str
    heads: int


def make_config(file: GgufFile) -> tuple[dict[str, Any], list[Placed]]:
    """The checkpoint's ``config.json`` (without ``dtype``) and its tensors. Raises CheckpointError naming what cannot be
    honoured."""
    name = file.value("general.architecture", str)
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path} holds the architecture {name!r}, and {', '.join(ARCHITECTURES)} are imported; "
            "give one of these, or the model's own folder in Hugging Face's format"
        )
    architecture = ARCHITECTURES[name]
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
    }
    config |= _scalars(file, name, architecture)
    config |= {"head_dim": _head_size(file, name, config)}
    config |= _flags(file, architecture) | _rope(file, name, config)
    _refuse_unknown(file, name, architecture)
    for key, target in _IDS.items():
        if (index := file.value(f"tokenizer.ggml.{key}", int, -1)) >= 0:
            config[target] = index
    placed = list(_place(file, architecture, config))
    config["vocab_size"] = file.tensors[EMBEDDING].shape[0]
    if (stated := file.metadata.get(f"{name}.vocab_size", config["vocab_size"])) != config["vocab_size"]:
        raise CheckpointError(
            f"{file.path} gives {name}.vocab_size={stated}, but {EMBEDDING} has {config['vocab_size']}; {CONVERT}"
        )
    return config, placed


def exact_float(value: float) -> float:
    """The shortest decimal that is the same 32-bit number: what was 1e-05 before it was stored in GGUF is 1e-05 again."""
    return float(str(np.float32(value)))


def _scalars(file: GgufFile, name: str, architecture: Architecture) -> dict[str, Any]:
    """The keys of the tables REQUIRED, OPTIONAL and ``architecture.keys``."""
    values: dict[str, Any] = {}
    for key, target in (REQUIRED | dict(architecture.keys)).items():
        values[target] = file.value(f"{name}.{key}", (int, float))
    for key, (target, default) in OPTIONAL.items():
        values[target] = file.value(f"{name}.{key}", (int, float), values[default] if isinstance(default, str) else default)
    return {key: exact_float(value) if isinstance(value, float) else value for key, value in values.items()}


def _head_size(file: GgufFile, name: str, config: Mapping[str, Any]) -> int:
    """Channels of a head; queries, values and the rotary turn must cover the same."""
    default = config["hidden_size"] // config["num_attention_heads"]
    size: int = file.value(f"{name}.attention.key_length", int, default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := file.value(f"{name}.{key}", int, size)) != size:
            raise CheckpointError(
                f"{file.path} gives {name}.{key}={other} for heads of {size} channels, and other sizes than the head's are not "
                "imported; give the model's own folder in Hugging Face's format"
            )
    return size


def _flags(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """What the tensors that are there say."""
    flags: dict[str, Any] = {"tie_word_embeddings": HEAD not in file.tensors}
    if not architecture.biases:
        flags |= {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_down.bias" in file.tensors}
    return flags


def _rope(file: GgufFile, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling``: from metadata (linear), or recognised in the table of factors that llama.cpp stores for Llama 3.1."""
    kind = file.value(f"{name}.rope.scaling.type", str, "none")
    if kind == "linear" and ROPE_FACTORS not in file.tensors:
        return {
            "rope_scaling": {"rope_type": "linear", "factor": exact_float(file.value(f"{name}.rope.scaling.factor", float))}
        }
    if kind != "none":
        raise CheckpointError(
            f"{file.path} gives {name}.rope.scaling.type={kind!r}, and none and linear are imported; "
            "give the model's own folder in Hugging Face's format"
        )
    if ROPE_FACTORS not in file.tensors:
        return {}
    tensor = file.tensors[ROPE_FACTORS]
    stored = read_rows(file, tensor, 0, tensor.num_rows).reshape(-1)
    scaling = {"rope_type": "llama3", "factor": round(float(stored.max()), 4), **_LLAMA3}
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-5):
        raise CheckpointError(
            f"{file.path} stores in {ROPE_FACTORS} frequencies other than those of Llama 3.1 ({_LLAMA3}), and no others are "
            "recognised; give the model's own folder in Hugging Face's format"
        )
    return {"rope_scaling": scaling}


def llama3_factors(head_size: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """What each rotary frequency is divided by in Llama 3.1: fp64 [head_size / 2]."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    cycles = scaling["original_max_position_embeddings"] / wavelengths  # in the context that the model was first trained on
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((cycles - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def _refuse_unknown(file: GgufFile, name: str, architecture: Architecture) -> None:
    known = {f"{name}.{key}" for key in (*REQUIRED, *OPTIONAL, *architecture.keys, *HANDLED, *ROPE_SCALING)}
    for key, value in file.metadata.items():
        if key.startswith(f"{name}.") and key not in known and value not in _NEUTRAL:
            raise CheckpointError(
                f"{file.path} gives {key}={str(value)[:60]}, which is not imported and may change the result; "
                "give the model's own folder in Hugging Face's format"
            )


def _tables(file: GgufFile, architecture: Architecture, config: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
    """Every tensor that the model has: its name in the file, and what it is."""
    layer = {**LAYER, **architecture.layer}
    biases = architecture.biases or ("qkvo" if config["attention_bias"] else "")
    layer |= {key: stored for key, stored in BIASES.items() if stored.name.removeprefix("self_attn.")[0] in biases}
    layer |= MLP_BIASES if config.get("mlp_bias") else {}
    for key, stored in OUTER.items():
        if key != HEAD or not config["tie_word_embeddings"]:
            yield key, stored
    for index in range(config["num_hidden_layers"]):
        for key, stored in layer.items():
            yield f"blk.{index}.{key}", Stored(f"model.layers.{index}.{stored.name}", stored.shape, stored.heads)


def _place(file: GgufFile, architecture: Architecture, config: dict[str, Any]) -> Iterator[Placed]:
    """Both sides of the ledger must agree: every tensor of the model is stored, with its shape, and nothing else is."""
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor {EMBEDDING}; {CONVERT}")
    if architecture.no_rope_every:
        step = architecture.no_rope_every
        config["no_rope_layer_interval"] = step
        config["no_rope_layers"] = [int((index + 1) % step != 0) for index in range(config["num_hidden_layers"])]
    size = sizes(config, file.tensors[EMBEDDING].shape[0])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    left = set(file.tensors) - {ROPE_FACTORS}
    for name, stored in _tables(file, architecture, config):
        if name not in left:
            raise CheckpointError(f"{file.path} lacks the tensor {name}, which its metadata calls for; {CONVERT}")
        left.remove(name)
        tensor, shape = file.tensors[name], tuple(size[letter] for letter in stored.shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{file.path} stores {name} as {list(tensor.shape)}, and its metadata call for {list(shape)}; {CONVERT}"
            )
        yield Placed(tensor, stored.name, heads[stored.heads] if stored.heads and architecture.permuted else 0)
    if left:
        raise CheckpointError(
            f"{file.path} stores {min(left)} ({len(left)} such tensors), for which the architecture has no place; "
            "give the model's own folder in Hugging Face's format"
        )
