"""config.json: what does not matter loads whatever it says, what matters is honoured or refused by name, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.config import ModelConfig
from bilevel.config_json import config_from_dict, load_source
from bilevel.errors import ConfigError
from bilevel.families import FAMILIES
from bilevel.families.shared.keys import INERT, UNIMPLEMENTED

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
# SmolLM2-135M-Instruct on the Hub, with the sizes above.
SMOLLM2: dict[str, Any] = {
    **LLAMA,
    "architectures": ["LlamaForCausalLM"],
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "pretraining_tp": 1,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NEUTRAL = st.sampled_from([None, False, "", [], {}])
FIELDS = {*ModelConfig.__dataclass_fields__, "eos_token_id", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
FIELDS |= {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "original_max_position_embeddings"}
UNKNOWN = st.text("abcdefgh_", min_size=1, max_size=12).filter(
    lambda key: not key.startswith("_") and key not in {*FIELDS, *INERT, *UNIMPLEMENTED}
)


def test_smollm2_from_the_hub() -> None:
    assert config_from_dict(SMOLLM2) == config_from_dict({**LLAMA, "rope_theta": 100000})


@given(key=st.sampled_from(sorted(INERT)) | st.text(max_size=8).map("_{}".format), value=JSON)
def test_inert_keys_load_whatever_they_say(key: str, value: Any) -> None:
    assert config_from_dict({**LLAMA, key: value}) == config_from_dict(LLAMA)


@given(key=UNKNOWN, value=NEUTRAL)
def test_unknown_keys_that_say_nothing_load(key: str, value: Any) -> None:
    assert config_from_dict({**LLAMA, key: value}) == config_from_dict(LLAMA)


@given(key=UNKNOWN, value=JSON.filter(lambda value: value is True or bool(value) or value in (0, 0.0) and value is not False))
def test_unknown_keys_are_refused_unless_ignored(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}' .* export with --ignore-key {key}$"):
        config_from_dict({**LLAMA, key: value})
    assert config_from_dict({**LLAMA, key: value}, ignore=[key]) == config_from_dict(LLAMA)


@pytest.mark.parametrize("key", sorted(UNIMPLEMENTED))
def test_unimplemented_keys_load_with_neutral_values_only(key: str) -> None:
    for value in (None, False, *UNIMPLEMENTED[key].neutral):
        assert config_from_dict({**LLAMA, key: value}) == config_from_dict(LLAMA)
    for value in (True, 3.5, "gelu"):
        with pytest.raises(ConfigError, match=key):
            config_from_dict({**LLAMA, key: value})
        with pytest.raises(ConfigError, match=f"--ignore-key {key}: the result depends on this key"):
            config_from_dict({**LLAMA, key: value}, ignore=[key])


def test_keys_that_are_read_are_not_ignored() -> None:
    with pytest.raises(ConfigError, match="--ignore-key hidden_size: the result depends on this key"):
        config_from_dict(LLAMA, ignore=["hidden_size"])


def test_source_tells_what_was_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "sinks": 4, "flavour": None}))
    assert load_source(tmp_path, ["sinks", "flavour", "absent"]).ignored == ("sinks",)


# What is neutral though it names a feature that is not implemented.
LOADS: dict[str, dict[str, Any]] = {
    "window-off": {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2},
    "window-not-on": {"model_type": "qwen2", "sliding_window": 16},
    "window-behind-the-last-layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 4,
    },
    "window-as-long-as-the-text": {"model_type": "mistral", "sliding_window": 128},
    "window-null": {"model_type": "mistral", "sliding_window": None},
    "layers-with-a-long-window": {"layer_types": ["sliding_attention"] * 4, "sliding_window": 4096},
    "no-scaling": {"rope_scaling": None},
    "plain-scaling": {"rope_scaling": {"type": "default"}},
    "dynamic-within-its-length": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "no-experts": {"num_experts": 0, "num_local_experts": 0, "n_routed_experts": None},
    "whole-heads": {"partial_rotary_factor": 1.0},
    "scalars-of-one": {"scale_emb": 1, "residual_multiplier": 1.0, "logits_scaling": 1},
    "remote-code": {"auto_map": {"AutoConfig": "configuration.Config"}},
    "trained-length-without-scaling": {"original_max_position_embeddings": 4096},
    "layered-positions": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}},
}


@pytest.mark.parametrize("case", LOADS)
def test_neutral_values_load(case: str) -> None:
    changes = LOADS[case]
    plain = {**LLAMA, "model_type": changes.get("model_type", "llama"), "sliding_window": None}
    theta = {"rope_theta": 7.0} if case == "layered-positions" else {}
    assert config_from_dict({**LLAMA, **changes}) == config_from_dict({**plain, **theta})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "relu": ({"hidden_act": "relu"}, "hidden_act to 'relu', .* must be 'silu'"),
    "minicpm-named-llama": ({"scale_emb": 12}, "scale_emb to 12, .* set model_type to the family"),
    "depth": ({"scale_depth": 1.4}, "scale_depth to 1.4"),
    "base": ({"dim_model_base": 256}, "dim_model_base to 256"),
    "mistral-window": (
        {"model_type": "mistral", "sliding_window": 64},
        "sliding_window=64 below max_position_embeddings=128, .* set max_position_embeddings to 64",
    ),
    "mistral-window-by-default": (
        {"model_type": "mistral", "max_position_embeddings": 32768},
        "sliding_window=4096 below max_position_embeddings=32768",
    ),
    "qwen-window": ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding_window=64 below"),
    "window-text": ({"sliding_window": "64"}, "sliding_window='64', which must be a whole number"),
    "layer-window": (
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 64},
        "sliding_window=64 below",
    ),
    "linear-attention": ({"layer_types": ["linear_attention"] * 4}, "layer_types names layers other than"),
    "longrope-without-factors": ({"rope_scaling": {"type": "longrope"}}, "short_factor is missing, which rope_type longrope"),
    "su-length": (
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}},
        "short_factor holds 3 factors, but the 8 rotary channels of a head need 4",
    ),
    "longrope-zero": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 0, 1, 1]}},
        "long_factor holds 0, but every factor must be greater than 0",
    ),
    "dynamic-alpha": (
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0}},
        "rope_scaling.alpha is not supported for .*dynamic",
    ),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_type='mrope' is not supported"),
    "two-bases": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        "different positions for full_attention, sliding_attention",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported as 0.5: this model_type turns whole"),
    "too-much": ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "partial_rotary_factor is not supported as 1.5"),
    "odd-part": (
        {"model_type": "phi3", "partial_rotary_factor": 0.4},
        "rotary_dim=3 must be an even number from 2 to head_dim=8",
    ),
    "clipped": ({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0}, "clip_qkv to 8.0"),
    "no-step": ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0, which must be at least 1"),
    "too-many-experts": (
        {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 5},
        "experts.top_k=5 exceeds the 4 experts",
    ),
    "experts-twice": (
        {
            "model_type": "olmoe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "experts": {"num_experts": 2, "top_k": 1, "intermediate_size": 8, "layers": [0]},
        },
        '"experts" section and model_type=.olmoe., which has experts of its own',
    ),
    "few-flags": ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers holds 2 entries for 4 layers"),
    "granite-zero": ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling=0, which must be greater than 0"),
    "granite-text": (
        {"model_type": "granite", "attention_multiplier": "x"},
        "attention_multiplier='x', which must be a finite",
    ),
    "granite-huge": (
        {"model_type": "granite", "attention_multiplier": 1e308, "num_attention_heads": 1, "num_key_value_heads": 1},
        "factors make inf of self_attn.q_proj's weights",
    ),
    "minicpm-sparse": (
        {"model_type": "minicpm", "sparse_config": {"dense_len": 64}},
        "dense_len=64 below max_position_embeddings=128",
    ),
    "minicpm-experts": ({"model_type": "minicpm", "num_experts": 8}, "num_experts=8; MiniCPM's experts"),
    "small-groups": (
        {"model_type": "glm4_moe", "n_routed_experts": 4, "n_group": 4, "num_experts_per_tok": 1},
        "n_group=4, which leaves fewer than the two experts",
    ),
    "norm": ({"qk_norm": "layer"}, "qk_norm='layer' must be none, head or projection"),
    "latent": ({"kv_lora_rank": 512}, r"kv_lora_rank to 512, .* latent attention \(MLA\) is not implemented"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0, .* capped logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_result_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_dict({**LLAMA, **changes})
    assert "\n" not in str(caught.value)


FAMILY_KEYS = sorted({key for family in FAMILIES.values() for key in family.reads})


@given(model_type=st.sampled_from(sorted(FAMILIES)), key=st.sampled_from(FAMILY_KEYS), value=JSON)
def test_any_value_of_a_familys_key_loads_or_is_refused(model_type: str, key: str, value: Any) -> None:
    """No JSON ends in a Python error."""
    try:
        config_from_dict({**LLAMA, "model_type": model_type, "num_experts_per_tok": 1, "moe_intermediate_size": 8, key: value})
    except ConfigError as error:
        assert "\n" not in str(error)
