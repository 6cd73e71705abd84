"""Hugging Face's ``config.json`` in and out.

A dense Llama or Qwen3 ``config.json`` loads as it is. Routing is described by one extra section, ``"routing"``, and expert
layers by another, ``"experts"``. Unknown keys are an error: a key that this code does not know may change the result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.config import Experts, ModelConfig, RopeScaling, Routing
from bilevel.errors import ConfigError

# Keys that training or tooling writes and that do not change what the model computes.
_HARMLESS = frozenset({
    "architectures", "attention_dropout", "dtype", "initializer_range", "max_window_layers", "pad_token_id",
    "pretraining_tp", "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "_attn_implementation",
    "id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states", "problem_type",
    "chunk_size_feed_forward", "is_encoder_decoder", "_commit_hash", "unsloth_fixed", "unsloth_version",
})  # fmt: skip


# Keys that may be present only with these values: anything else is a model that this code does not implement.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None, {}),
    "partial_rotary_factor": (1, 1.0, None),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
}


def config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face ``config.json``. Raises ConfigError naming the first key that cannot be honoured."""
    raw = dict(raw)
    model_type = raw.pop("model_type", "llama")
    if model_type not in ("llama", "qwen3"):
        raise ConfigError(f"model_type={model_type!r} is not supported; bilevel reads llama and qwen3 checkpoints")
    values: dict[str, Any] = {"model_type": model_type}
    if raw.get("quantization_config"):
        raise ConfigError(
            "config.json sets quantization_config; bilevel reads float weights: give the checkpoint before quantization"
        )
    for key, allowed in _NEUTRAL.items():
        if key in raw and raw.pop(key) not in allowed:
            raise ConfigError(f"config.json sets {key} to a value that bilevel does not implement; it must be {allowed[0]!r}")
    layer_types = raw.pop("layer_types", None) or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError("config.json's layer_types names layers other than full_attention, which bilevel does not implement")
    _read_rope(raw, values)
    _read_tokens(raw, values)
    if (routing := raw.pop("routing", None)) is not None:
        values["routing"] = _section(Routing, "routing", routing)
    if (experts := raw.pop("experts", None)) is not None:
        values["experts"] = _section(Experts, "experts", experts)
    known = {f.name for f in dataclasses.fields(ModelConfig)} - set(values)
    for key in [key for key in raw if key in known]:
        value = raw.pop(key)
        if value is not None:  # null means the default, in Hugging Face's files too
            values[key] = value
    unknown = sorted(set(raw) - _HARMLESS)
    if unknown:
        raise ConfigError(
            f"config.json holds the unknown key {unknown[0]!r}, which may change the result; remove it if it does not matter"
        )
    return _complete(values)


def _section(kind: type, name: str, raw: Any) -> Any:
    """Build a nested dataclass from its JSON object; unknown and missing keys are named."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f'config.json\'s "{name}" must be an object, not {type(raw).__name__}')
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            raise ConfigError(f"{name}.{key} is unknown; the keys are {', '.join(fields)}")
    for key, spec in fields.items():
        if key not in raw and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{name}.{key} is missing")
    return kind(**raw)


def _read_rope(raw: dict[str, Any], values: dict[str, Any]) -> None:
    """Both of Hugging Face's spellings: ``rope_theta`` + ``rope_scaling``, and the newer ``rope_parameters``."""
    scaling: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        section = raw.pop(key, None) or {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"config.json's {key} must be an object, not {section!r}")
        scaling.update(section)
    if "rope_theta" in scaling:
        values["rope_theta"] = scaling.pop("rope_theta")
        raw.pop("rope_theta", None)
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if scaling.get("partial_rotary_factor") in _NEUTRAL["partial_rotary_factor"]:
        scaling.pop("partial_rotary_factor", None)
    known = {f.name for f in dataclasses.fields(RopeScaling)}
    for key in scaling:
        if key not in known:
            raise ConfigError(f"rope_scaling.{key} is not supported")
    if rope_type != "default":
        values["rope_scaling"] = _section(RopeScaling, "rope_scaling", {"rope_type": rope_type, **scaling})


def _read_tokens(raw: dict[str, Any], values: dict[str, Any]) -> None:
    bos, eos = raw.pop("bos_token_id", None), raw.pop("eos_token_id", None)
    values["bos_token_id"] = bos[0] if isinstance(bos, list) and bos else bos
    values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    raw.pop("eos_token_ids", None)


def _complete(values: dict[str, Any]) -> ModelConfig:
    """Fill in what Hugging Face derives, and turn a missing key into a sentence."""
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None and heads and values.get("hidden_size"):
        if values["hidden_size"] % heads:
            raise ConfigError(
                f"hidden_size={values['hidden_size']} is not divisible by num_attention_heads={heads}; give head_dim explicitly"
            )
        values["head_dim"] = values["hidden_size"] // heads
    for spec in dataclasses.fields(ModelConfig):
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and values.get(spec.name) is None:
            raise ConfigError(f"config.json does not give {spec.name}")
    return ModelConfig(**values)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`config_from_dict`, ready for ``json.dump``."""
    raw: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if config.has_qk_norm else "LlamaForCausalLM"],
        "hidden_act": "silu",
    }
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if spec.name == "eos_token_ids":
            raw["eos_token_id"] = list(value) if len(value) > 1 else (value[0] if value else None)
        elif value is not None:
            raw[spec.name] = list(value) if isinstance(value, tuple) else value
    if config.experts is not None:
        raw["experts"]["layers"] = list(config.experts.layers)
    return raw


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` in a checkpoint or bundle folder."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder holds config.json and model.safetensors") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); write it anew") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return config_from_dict(raw)
