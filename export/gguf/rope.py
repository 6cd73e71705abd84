"""Scaled positions: llama.cpp's metadata and tables of factors -> ``rope_scaling`` of config.json.

What llama.cpp computes from them stands in its ``llama-context.cpp`` (amplitudes) and in ggml's ``rope_yarn``. A file whose
positions mean one thing to llama.cpp and another to transformers is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bilevel.errors import CheckpointError
from bilevel.export.gguf.dequantise import read_rows
from bilevel.export.gguf.header import CONVERT, GgufFile
from bilevel.export.gguf.tensors import ROPE_FACTORS, ROPE_LONG, ROPE_SHORT

FOLDER = "give the model's own folder in Hugging Face's format"
TABLES = (ROPE_FACTORS, ROPE_LONG, ROPE_SHORT)
_PREFIX = "rope.scaling."
# YaRN's own keys, with the values that stand for "not set".
_YARN: dict[str, tuple[float, ...]] = {
    "yarn_ext_factor": (1.0, -1.0), "yarn_attn_factor": (), "yarn_beta_fast": (32.0,), "yarn_beta_slow": (1.0,),
    "yarn_log_multiplier": (0.0,),
}  # fmt: skip
KEYS = (
    "rope.scale_linear",
    *(f"{_PREFIX}{key}" for key in ("type", "factor", "original_context_length", "attn_factor", *_YARN)),
)
_KINDS = ("none", "linear", "yarn", "longrope")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def exact_float(value: float) -> float:
    """The shortest decimal that is the same 32-bit number: what was 1e-05 before it was stored in GGUF is 1e-05 again."""
    return float(str(np.float32(value)))


def rope_scaling(file: GgufFile, name: str, config: Mapping[str, Any], factors: str) -> dict[str, Any]:
    """The keys of config.json beside ``rope_theta``; none for plain positions. Raises CheckpointError.

    name: the architecture's. factors: see ``Architecture``.
    """
    kind, factor = _kind(file, name, factors)
    if kind != "yarn":
        _refuse_yarn_keys(file, name, kind)
    if kind in ("none", "linear") and (amplitude := _number(file, name, "attn_factor", 1.0)) != 1:
        raise CheckpointError(
            f"{file.path} gives {name}.{_PREFIX}attn_factor={amplitude} for positions of the kind {kind}, which transformers "
            f"does not scale so; {FOLDER}"
        )
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        return _yarn(file, name, config, factor)
    if kind == "longrope":
        return _longrope(file, name, config, factor)
    return _llama3(file, config) if ROPE_FACTORS in file.tensors else {}


def _kind(file: GgufFile, name: str, factors: str) -> tuple[str, float]:
    """The kind of positions and their factor, 1 where there is none; the tables that are stored must be that kind's."""
    factor = _number(file, name, "factor", 0.0) or exact_float(file.value(f"{name}.rope.scale_linear", float, 0.0)) or 1.0
    # To llama.cpp, what does not say its kind is linear.
    kind = file.value(f"{name}.{_PREFIX}type", str, "none" if factor == 1 else "linear")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{file.path} gives {name}.{_PREFIX}type={kind!r}, and {', '.join(_KINDS)} are imported; {FOLDER}"
        )
    if not factor > 0 or not math.isfinite(factor):
        raise CheckpointError(f"{file.path} gives {name}.{_PREFIX}factor={factor}, which must be greater than 0; {CONVERT}")
    if kind in ("linear", "yarn") and f"{name}.rope.scale_linear" not in file.metadata:
        file.value(f"{name}.{_PREFIX}factor", float)  # must be there
    stored = {table for table in TABLES if table in file.tensors}
    if kind == "none" and factors == "always" and stored & {ROPE_LONG, ROPE_SHORT}:
        kind = "longrope"
    if kind == "linear" and factor == 1:
        kind = "none"
    if kind == "longrope" and not factors:
        raise CheckpointError(
            f"{file.path} gives {name}.{_PREFIX}type='longrope', whose factors llama.cpp does not apply in {name}; {FOLDER}"
        )
    used = {"none": {ROPE_FACTORS}, "longrope": {ROPE_LONG, ROPE_SHORT}}.get(kind, set())
    if unused := stored - used:
        raise CheckpointError(
            f"{file.path} stores {min(unused)}, which positions of the kind {kind!r} ({name}.{_PREFIX}type) have no use for; "
            f"{FOLDER}"
        )
    return kind, factor


def _number(file: GgufFile, name: str, key: str, default: float) -> float:
    return exact_float(file.value(f"{name}.{_PREFIX}{key}", float, default))


def _trained_length(file: GgufFile, name: str, config: Mapping[str, Any]) -> int:
    length: int = file.value(f"{name}.{_PREFIX}original_context_length", int, config["max_position_embeddings"])
    if length < 2:
        raise CheckpointError(
            f"{file.path} gives {name}.{_PREFIX}original_context_length={length}, which must be at least 2; {CONVERT}"
        )
    return length


def _refuse_yarn_keys(file: GgufFile, name: str, kind: str) -> None:
    for key, unset in _YARN.items():
        value = file.metadata.get(f"{name}.{_PREFIX}{key}", 0.0)
        if value not in (0.0, *unset, 1.0 if key == "yarn_attn_factor" else 0.0):
            raise CheckpointError(
                f"{file.path} gives {name}.{_PREFIX}{key}={value}, and its positions are of the kind {kind!r}, not 'yarn'; "
                f"{CONVERT}"
            )


def _yarn(file: GgufFile, name: str, config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """YaRN. llama.cpp's cos and sin are (1 + 0.1 ln factor) x attn_factor long; transformers' are attention_factor."""
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _trained_length(file, name, config),
    }
    amplitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    for key, target in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if (value := _number(file, name, key, *_YARN[key])) != _YARN[key][0]:
            scaling[target] = value
    if (multiplier := _number(file, name, "attn_factor", 1.0)) != 1:
        scaling["attention_factor"] = amplitude * multiplier
    stated = _number(file, name, "yarn_attn_factor", amplitude)
    reasons = {
        "yarn_ext_factor": (
            _number(file, name, "yarn_ext_factor", 1.0) in (1.0, -1.0),
            "which mixes frequencies as transformers does not",
        ),
        "yarn_attn_factor": (
            np.float32(stated) == np.float32(amplitude),
            f"which is not {amplitude:.6g}, and llama.cpp does not say whether it replaces or multiplies that",
        ),
        "yarn_log_multiplier": (
            _number(file, name, "yarn_log_multiplier", 0.0) == 0,
            "which llama.cpp reads for other architectures only, in two meanings",
        ),
    }
    for key, (exact, reason) in reasons.items():
        if not exact:
            value = file.metadata[f"{name}.{_PREFIX}{key}"]
            raise CheckpointError(f"{file.path} gives {name}.{_PREFIX}{key}={exact_float(value)}, {reason}; {FOLDER}")
    return {"rope_scaling": scaling}


def _longrope(file: GgufFile, name: str, config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Every frequency divided by its own factor, one table up to the trained length and one beyond."""
    if factor != 1:
        raise CheckpointError(
            f"{file.path} gives {name}.{_PREFIX}factor={factor} beside tables of factors, which transformers does not divide "
            f"by as well; {FOLDER}"
        )
    trained, declared = _trained_length(file, name, config), config["max_position_embeddings"]
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    count = config["rotated_channels"] // 2
    for table, key in ((ROPE_SHORT, "short_factor"), (ROPE_LONG, "long_factor")):
        if table not in file.tensors:
            raise CheckpointError(f"{file.path} lacks the tensor {table}, which its longrope positions call for; {CONVERT}")
        values = _table(file, table)
        if values.shape != (count,) or not (np.isfinite(values) & (values > 0)).all():
            raise CheckpointError(
                f"{file.path} stores in {table} {len(values)} factors from {values.min()}, and its metadata call for {count} "
                f"greater than 0; {CONVERT}"
            )
        scaling[key] = [exact_float(value) for value in values]
    scale = declared / trained
    derived = math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0
    stated = _number(file, name, "attn_factor", 1.0)
    if np.float32(stated) != np.float32(derived):
        scaling["attention_factor"] = stated
    return {"rope_scaling": scaling, "original_max_position_embeddings": trained}


def _table(file: GgufFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    return read_rows(tensor, 0, tensor.num_rows).reshape(-1)


def _llama3(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's positions, recognised in the table of factors that llama.cpp stores for them."""
    stored = _table(file, ROPE_FACTORS)
    scaling = {"rope_type": "llama3", "factor": round(float(stored.max()), 4), **_LLAMA3}
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-5):
        raise CheckpointError(
            f"{file.path} stores in {ROPE_FACTORS} frequencies other than those of Llama 3.1 ({_LLAMA3}), and no others are "
            f"recognised; {FOLDER}"
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
