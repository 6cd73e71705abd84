"""Families of released models, one small declarative file each: ``config.json`` in, ``ModelConfig`` and a weight layout out.

    shared/   what a family declares, and what families have in common
    own.py    this package's own model_type
    (the rest)   one released family each

A new family is a file with a ``FAMILY`` and a line below. Its test compares a tiny random model with transformers' own class
(``tests/bilevel/families``), or with the definition in slow loops where transformers has none.
"""

from __future__ import annotations

from types import ModuleType

from bilevel.errors import ConfigError
from bilevel.families import (
    bailing_moe,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    glm4_moe,
    granite,
    granitemoe,
    llama,
    minicpm,
    mistral,
    olmoe,
    own,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from bilevel.families.shared.family import Family

_MODULES: tuple[ModuleType, ...] = (
    llama, qwen2, qwen3, mistral, smollm3, granite, minicpm, phi3, ernie4_5, ernie4_5_moe, qwen3_moe, granitemoe, olmoe,
    glm4_moe, dots1, bailing_moe, own,
)  # fmt: skip
FAMILIES: dict[str, Family] = {name: module.FAMILY for module in _MODULES for name in module.FAMILY.model_types}


_LATENT = "its attention is latent (MLA), which is not implemented, and no conversion of such a model is exact"
# Released models that people bring and that cannot be read: why not, and what there is of them.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "minicpm3", "mistral4", "longcat_flash"), _LATENT),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"), f"{_LATENT}; its indexer alone is bilevel.routers.dsa, for a module of your own"
    ),
    "deepseek_v4": "its compressed attention is not implemented; its expert gates, by a table and by context, are "
    "bilevel.expert_layers.ExpertGate with Experts.deepseek_v4",
    **dict.fromkeys(
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        "its indexer is no routing section; the whole text model is bilevel.routers.minimax_m3, a module to export",
    ),
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text"),
        "its linear-attention layers are not implemented; its attention is bilevel.routers.qsa, for a module of your own",
    ),
}


def family_of(model_type: object) -> Family:
    """The family that reads this model_type. Raises ConfigError naming those that there are."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ConfigError(f"model_type={model_type!r} is not supported: {REFUSED[model_type]}")
    raise ConfigError(f"model_type={model_type!r} is not supported; bilevel reads {', '.join(sorted(FAMILIES))}")
