"""GGUF metadata -> ``config.json``. All is settled before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bilevel.errors import CheckpointError
from bilevel.export.gguf.architectures import (
    ARCHITECTURES,
    HANDLED,
    NOT_IMPORTED,
    OPTIONAL,
    REQUIRED,
    SOFTMAX,
    Architecture,
)
from bilevel.export.gguf.header import CONVERT, GgufFile
from bilevel.export.gguf.placement import Placed, place
from bilevel.export.gguf.rope import FOLDER, KEYS, exact_float, rope_scaling
from bilevel.export.gguf.tensors import EMBEDDING, HEAD

_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_NEUTRAL: tuple[Any, ...] = (0, False, None, "", [], "none")  # a feature that is stored and switched off
_WINDOW = "attention.sliding_window"


def make_config(file: GgufFile) -> tuple[dict[str, Any], list[Placed]]:
    """The checkpoint's ``config.json`` (without ``dtype``) and its tensors. Raises CheckpointError naming what cannot be
    honoured."""
    name = file.value("general.architecture", str)
    architecture = _architecture(file, name)
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        **architecture.constant,
    }
    config |= _scalars(file, name, architecture)
    unused = _further_layers(file, name, config)
    config["num_hidden_layers"] -= unused
    experts = {**_experts(file, name, architecture, config), "unused": unused}
    config |= _flags(file, architecture, config)
    config |= _heads(file, name, architecture, config)
    config |= _rope(file, name, architecture, config) | _window(file, name, architecture, config)
    _refuse_unknown(file, name, architecture)
    for key, target in _IDS.items():
        if (index := file.value(f"tokenizer.ggml.{key}", int, -1)) >= 0:
            config[target] = index
    if step := architecture.no_rope_every:
        config["no_rope_layer_interval"] = step
        config["no_rope_layers"] = [int((index + 1) % step != 0) for index in range(config["num_hidden_layers"])]
    placed = list(place(file, architecture, config, experts))
    config["vocab_size"] = file.tensors[EMBEDDING].shape[0]
    if (stated := file.metadata.get(f"{name}.vocab_size", config["vocab_size"])) != config["vocab_size"]:
        raise CheckpointError(
            f"{file.path} gives {name}.vocab_size={stated}, but {EMBEDDING} has {config['vocab_size']}; {CONVERT}"
        )
    return architecture.derive(config), placed


def _architecture(file: GgufFile, name: str) -> Architecture:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name in NOT_IMPORTED:
        raise CheckpointError(
            f"{file.path} holds the architecture {name!r}, which is not imported: {NOT_IMPORTED[name]}; "
            f"give one of {', '.join(ARCHITECTURES)}"
        )
    raise CheckpointError(
        f"{file.path} holds the architecture {name!r}, and {', '.join(ARCHITECTURES)} are imported; "
        "give one of these, or the model's own folder in Hugging Face's format"
    )


def _scalars(file: GgufFile, name: str, architecture: Architecture) -> dict[str, Any]:
    """The keys of the tables REQUIRED, OPTIONAL, ``architecture.keys`` and ``architecture.optional``."""
    values: dict[str, Any] = {}
    for key, target in {**REQUIRED, **architecture.keys}.items():
        kinds = int if key.endswith(("count", "length")) else (int, float)
        values[target] = file.value(f"{name}.{key}", kinds)
        if not 0 < values[target] < math.inf:
            raise CheckpointError(f"{file.path} gives {name}.{key}={values[target]}, which must be greater than 0; {CONVERT}")
    for key, (target, default) in {**OPTIONAL, **architecture.optional}.items():
        fallback = values[default] if isinstance(default, str) else default
        value = file.value(f"{name}.{key}", (int, float) if type(fallback) is float else type(fallback), fallback)
        values[target] = (value or fallback) if key in architecture.optional else value
        if not (0 < value < math.inf or (key in architecture.optional and value == 0)):
            raise CheckpointError(f"{file.path} gives {name}.{key}={value}, which must be greater than 0; {CONVERT}")
    return {key: exact_float(value) if isinstance(value, float) else value for key, value in values.items()}


def _further_layers(file: GgufFile, name: str, config: Mapping[str, Any]) -> int:
    """How many layers behind the last one predict further tokens; llama.cpp counts them among the blocks."""
    count: int = file.value(f"{name}.nextn_predict_layers", int, 0)
    if not 0 <= count < config["num_hidden_layers"]:
        raise CheckpointError(
            f"{file.path} gives {name}.nextn_predict_layers={count} of {config['num_hidden_layers']} blocks; {CONVERT}"
        )
    return count


def _experts(file: GgufFile, name: str, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes e, x and s (see :mod:`bilevel.export.gguf.tensors`), and lead, how many layers have no experts."""
    layers = config["num_hidden_layers"]
    if not architecture.gate:
        return {"e": 0, "x": 0, "s": 0, "lead": layers}
    gate = file.value(f"{name}.expert_gating_func", int, 0)
    # GLM's files and those of a softmax may leave it out.
    if gate != architecture.gate and (gate or (architecture.gate != SOFTMAX and name != "glm4moe")):
        raise CheckpointError(
            f"{file.path} gives {name}.expert_gating_func={gate}, and experts of {name} are chosen by {architecture.gate} "
            f"(1 softmax, 2 sigmoid); {FOLDER}"
        )
    count, used = file.value(f"{name}.expert_count", int), config["num_experts_per_tok"]
    groups, kept = config.get("n_group", 1), config.get("topk_group", 1)
    lead = config.get("first_k_dense_replace", 0)
    for wrong, said in (
        (used > count, f"expert_used_count={used} of expert_count={count}"),
        (
            count % groups or kept > groups,
            f"expert_group_count={groups} and expert_group_used_count={kept} for {count} experts",
        ),
        (groups > 1 and count // groups < 2, f"expert_group_count={groups}, which leaves groups of one expert"),
        (kept * (count // groups) < used, f"expert_used_count={used}, more than {kept} of {groups} groups hold"),
        (lead > layers, f"leading_dense_block_count={lead} of {layers} layers"),
    ):
        if wrong:
            raise CheckpointError(f"{file.path} gives {name}.{said}; {CONVERT}")
    shared = config.get("n_shared_experts", config.get("num_shared_experts", 0))
    size = config.get("moe_intermediate_size", config["intermediate_size"])
    return {"e": count, "x": size, "s": shared * config.get("moe_shared_expert_intermediate_size", size), "lead": lead}


def _flags(file: GgufFile, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors that are there say."""
    layers = range(config["num_hidden_layers"])
    flags = {
        key: any(f"blk.{index}.{tensor}" in file.tensors for index in layers) for key, tensor in architecture.flags.items()
    }
    return {"tie_word_embeddings": HEAD not in file.tensors, **flags}


def _heads(file: GgufFile, name: str, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Channels of a head, and the share of them that positions turn; queries and values must have as many."""
    default = config["hidden_size"] // config["num_attention_heads"]
    size: int = file.value(f"{name}.attention.key_length", int, default)
    values: dict[str, Any] = {"head_dim": size}
    turned: int = file.value(f"{name}.rope.dimension_count", int, size)
    if architecture.partial_rotary and 0 < turned <= size and turned % 2 == 0:
        share = turned / size
        # The product that readers form of it must not be rounded below the whole number.
        values["partial_rotary_factor"] = share if int(size * share) == turned else math.nextafter(share, 2.0)
    elif turned != size:
        raise _other_size(file, f"{name}.rope.dimension_count", turned, size)
    if (other := file.value(f"{name}.attention.value_length", int, size)) != size:
        raise _other_size(file, f"{name}.attention.value_length", other, size)
    return values


def _other_size(file: GgufFile, key: str, value: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{file.path} gives {key}={value} for heads of {size} channels, and other sizes than the head's are not "
        f"imported; {FOLDER}"
    )


def _rope(file: GgufFile, name: str, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    # Granite's switch for positions, which other architectures only print.
    if name.startswith("granite") and not file.value(f"{name}.rope.scaling.finetuned", bool, True):
        raise CheckpointError(
            f"{file.path} gives {name}.rope.scaling.finetuned=False, by which Granite has no positions, and models without "
            f"them are not imported; {FOLDER}"
        )
    turned = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    return rope_scaling(file, name, {**config, "rotated_channels": turned}, architecture.factors)


def _window(file: GgufFile, name: str, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """A sliding window, where the architecture's models have one; only one that nothing slides out of is imported."""
    if not architecture.windows:
        return {}
    size, length = file.value(f"{name}.{_WINDOW}", int, 0), config["max_position_embeddings"]
    if 0 < size < length:
        raise CheckpointError(
            f"{file.path} gives {name}.{_WINDOW}={size} below its context length {length}, and windows are not implemented; "
            f"set {name}.context_length to {size}, up to which nothing slides out of the window (gguf-set-metadata of the gguf "
            "package)"
        )
    return {"sliding_window": size or None}


def _refuse_unknown(file: GgufFile, name: str, architecture: Architecture) -> None:
    known = {*REQUIRED, *OPTIONAL, *architecture.keys, *architecture.optional, *HANDLED, *KEYS}
    known |= {_WINDOW} if architecture.windows else set()
    for key, value in file.metadata.items():
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in known and value not in _NEUTRAL:
            raise CheckpointError(
                f"{file.path} gives {key}={str(value)[:60]}, which is not imported and may change the result; {FOLDER}"
            )
