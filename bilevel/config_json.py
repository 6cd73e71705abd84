"""Hugging Face's ``config.json`` in and out.

A ``config.json`` of any family in ``bilevel/families`` loads as it is. Routing is described by one extra section,
``"routing"``, and expert layers by another, ``"experts"``. ``bilevel/families/shared/keys.py`` says which keys matter: one
that is unknown may change the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.config import Experts, ModelConfig, Routing
from bilevel.errors import ConfigError
from bilevel.families import family_of
from bilevel.families.shared import rope, windows
from bilevel.families.shared.family import Layout
from bilevel.families.shared.keys import check_ignored, judge
from bilevel.sections import Section

_COMMON = frozenset({spec.name for spec in dataclasses.fields(ModelConfig)} - {"eos_token_ids"})
_TOKENS = ("bos_token_id", "eos_token_id", "eos_token_ids")
# What a model is written as, and the class that Hugging Face's tools look for.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "bilevel": "BilevelForCausalLM",
}


@dataclass(frozen=True)
class Source:
    """What a ``config.json`` says: the model, how its weights are stored, and the unknown keys passed over by request."""

    config: ModelConfig
    layout: Layout
    ignored: tuple[str, ...] = ()


def config_from_dict(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> ModelConfig:
    """The model of a Hugging Face ``config.json``. Raises ConfigError naming the first key that cannot be honoured."""
    return source_from_dict(raw, ignore).config


def source_from_dict(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> Source:
    """Read a Hugging Face ``config.json`` of any family. ignore: unknown keys to pass over.

    Raises ConfigError naming the first key that cannot be honoured.
    """
    family = family_of(raw.get("model_type", "llama"))
    read = {*_COMMON, *_TOKENS, *windows.KEYS, *rope.KEYS, *family.reads, "routing", "experts"}
    check_ignored(ignore, read)
    if raw.get("quantization_config"):
        raise ConfigError(
            "config.json sets quantization_config; bilevel reads float weights: give the checkpoint before quantization"
        )
    full = _given({**family.defaults, **raw})
    rest = dict(full)
    values: dict[str, Any] = {"model_type": rest.pop("model_type", "llama")}
    windows.read_windows(rest, family.windows)
    positions, share = rope.read_rope(rest, family.partial_rotary)
    values |= positions
    _read_tokens(rest, values)
    for name, kind in (("routing", Routing), ("experts", Experts)):
        if (section := rest.pop(name, None)) is not None:
            values[name] = _section(kind, name, section)
    values |= {key: rest.pop(key) for key in [key for key in rest if key in _COMMON]}
    _merge(values, family.values(full))
    ignored = tuple(key for key in sorted(rest) if key not in family.reads and judge(key, rest[key], ignore))
    config = _complete(values, share)
    return Source(config, family.layout(full, config), ignored)


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with a value: null means the default, in Hugging Face's files too."""
    return {key: value for key, value in raw.items() if value is not None}


def _merge(values: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Add what a family says of itself; its experts and a section of that name cannot both hold."""
    if values.get("experts") is not None and own.get("experts") is not None:
        raise ConfigError(
            f'config.json has an "experts" section and model_type={values["model_type"]!r}, which has experts of its own; '
            "remove the section"
        )
    values |= {key: value for key, value in own.items() if key != "experts" or value is not None}


def _section(kind: type, name: str, raw: Any) -> Any:
    """Build a nested dataclass from its JSON object; unknown and missing keys are named."""
    section = Section(raw, "config.json", ConfigError, f"{name}.")
    fields = {spec.name: spec for spec in dataclasses.fields(kind)}
    section.refuse_unknown(fields)
    for key, spec in fields.items():
        if key not in section and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"config.json does not give {name}.{key}")
    return kind(**section.values)


def _read_tokens(raw: dict[str, Any], values: dict[str, Any]) -> None:
    bos, eos = raw.pop("bos_token_id", None), raw.pop("eos_token_id", None)
    values["bos_token_id"] = bos[0] if isinstance(bos, list) and bos else bos
    values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    raw.pop("eos_token_ids", None)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _complete(values: dict[str, Any], share: float) -> ModelConfig:
    """Fill in what Hugging Face derives, and turn a missing key into a sentence. share: of a head, turned by positions."""
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None and _is_size(heads) and _is_size(values.get("hidden_size")):
        if values["hidden_size"] % heads:
            raise ConfigError(
                f"hidden_size={values['hidden_size']} is not divisible by num_attention_heads={heads}; give head_dim explicitly"
            )
        values["head_dim"] = values["hidden_size"] // heads
    if share < 1 and _is_size(values.get("head_dim")):
        values["rotary_dim"] = int(values["head_dim"] * share)
    for spec in dataclasses.fields(ModelConfig):
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and values.get(spec.name) is None:
            raise ConfigError(f"config.json does not give {spec.name}")
    return ModelConfig(**values)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`config_from_dict`, ready for ``json.dump``."""
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES.get(config.model_type, _ARCHITECTURES["bilevel"])],
        "hidden_act": "silu",
    }
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            raw[spec.name] = _section_to_dict(value)
        elif spec.name == "eos_token_ids":
            raw["eos_token_id"] = list(value) if len(value) > 1 else (value[0] if value else None)
        elif spec.name == "nope_layers":
            if value:
                raw[spec.name] = list(value)
        elif value is not None:
            raw[spec.name] = value
    if (
        config.model_type == "smollm3"
    ):  # Hugging Face's spelling of nope_layers; and its ids of tokens are not those of every model
        raw |= {"bos_token_id": config.bos_token_id, "pad_token_id": None}
        raw["no_rope_layers"] = [int(i not in config.nope_layers) for i in range(config.num_hidden_layers)]
    return raw


# What a section may leave out, because older files and readers do not have it.
_OPTIONAL = {
    "shared_intermediate_size": 0,
    "norm_floor": 0.0,
    "zero_fill": False,
    "hash_layers": (),
    "key": "mean",
    "gate_norm": True,
    "dense_layers": (),
    "coarse_local_blocks": 0,
    "weighted_words": False,
}


def _section_to_dict(section: Any) -> dict[str, Any]:
    """A nested dataclass as JSON; what is null or says nothing is left out."""
    fields = dataclasses.asdict(section)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in fields.items()
        if value is not None and not (key in _OPTIONAL and value == _OPTIONAL[key])
    }


def load_config(folder: Path, ignore: Collection[str] = ()) -> ModelConfig:
    """Read ``config.json`` in a checkpoint or bundle folder. ignore: unknown keys to pass over."""
    return load_source(folder, ignore).config


def load_source(folder: Path, ignore: Collection[str] = ()) -> Source:
    """Read ``config.json`` in a checkpoint or bundle folder, with the weights' layout. ignore: unknown keys to pass over."""
    path = Path(folder) / "config.json"
    try:
        section = Section.read(path, lambda problem: ConfigError(f"{path.parent}: {problem}; write it anew"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder holds config.json and model.safetensors") from None
    return source_from_dict(section.values, ignore)
