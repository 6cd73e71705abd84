"""config.json in and out: what is read, what is refused, and that a refusal is one sentence naming the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.config import Experts, ModelConfig, RopeScaling, Routing
from bilevel.config_json import config_from_dict, config_to_dict, load_config
from bilevel.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 3,
    "intermediate_size": 16,
    "layers": [0, 2],
    "n_group": 4,
    "topk_group": 2,
}
FULL: dict[str, Any] = {
    **SIZES,
    "model_type": "qwen3",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    "routing": {"preset": "two_level", "block_size": 4, "coarse_topk": 5, "topk": 3, "window": 3, "route_dim": 8},
    "experts": EXPERTS,
}
# As published with Llama 3.2 and Qwen3, training and tooling keys included.
LLAMA_3_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_config_from_dict_published_llama() -> None:
    config = config_from_dict(LLAMA_3_2)
    assert config.rope_scaling == RopeScaling(rope_type="llama3", factor=32.0)
    assert (config.eos_token_ids, config.bos_token_id, config.rope_theta) == ((128001, 128008, 128009), 128000, 5e5)
    assert config.routing.is_dense and not config.has_qk_norm and config.tie_word_embeddings


def test_config_from_dict_published_qwen3() -> None:
    config = config_from_dict(QWEN3)
    assert config.has_qk_norm and config.head_dim == 128 and config.eos_token_ids == (151645,)
    assert config.rope_scaling is None and config.rope_theta == 1e6


def test_config_from_dict_fills_what_hugging_face_derives() -> None:
    raw = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    config = config_from_dict(raw)
    assert (config.num_key_value_heads, config.head_dim, config.model_type) == (4, 8, "llama")
    assert config_from_dict({**raw, "num_key_value_heads": None, "head_dim": None}) == config


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}},
    ],
    ids=["type", "rope_type-and-type", "rope_parameters", "neutral-partial"],
)
def test_config_from_dict_rope_spellings(spelling: dict[str, Any]) -> None:
    config = config_from_dict({**SIZES, **spelling})
    assert config.rope_theta == 7.0
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


@pytest.mark.parametrize("raw", [FULL, LLAMA_3_2, QWEN3, {**SIZES, "eos_token_id": 4}, {**FULL, "experts": None}])
def test_config_to_dict_round_trip(raw: dict[str, Any]) -> None:
    config = config_from_dict(raw)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_load_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FULL))
    assert load_config(tmp_path) == config_from_dict(FULL)


@pytest.mark.parametrize(
    "contents, message",
    [
        (None, r"config\.json does not exist; a checkpoint folder holds"),
        (b"{", r"config\.json is not valid JSON"),
        (b"\xff\xfe{}", r"config\.json is not valid JSON"),
        (b"[1]", r"config\.json holds \[1\], which must be an object"),
    ],
    ids=["missing", "cut-off", "not-utf8", "list"],
)
def test_load_config_damaged(contents: bytes | None, message: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-key": ({"attention_sinks": 4}, "unknown key 'attention_sinks'"),
    "unknown-routing-key": ({"routing": {"blocksize": 4}}, r"the unknown key routing\.blocksize \(did you mean block_size\?\)"),
    "unknown-experts-key": (
        {"experts": {**EXPERTS, "capacity": 2}},
        r"the unknown key experts\.capacity \(the keys are num_experts, top_k",
    ),
    "missing-experts-key": ({"experts": {"num_experts": 8}}, "config.json does not give experts.top_k"),
    "routing-not-object": ({"routing": [1]}, r"config\.json holds routing=\[1\], which must be an object"),
    "latent-attention": (
        {"model_type": "deepseek_v32"},
        r"model_type='deepseek_v32' is not supported: its attention is latent \(MLA\), .*bilevel.routers.dsa",
    ),
    "msa-by-model-type": (
        {"model_type": "minimax_m3_vl"},
        "is not supported: its indexer is no routing section; .*bilevel.routers.minimax_m3",
    ),
    "model-type": ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; bilevel reads bailing_moe, .*llama, .*qwen3"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act .* must be 'silu'"),
    "sliding-window": ({"use_sliding_window": True}, "use_sliding_window"),
    "layer-types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names layers other than"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config; .* before quantization"),
    "rope-type": ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "rope_type='mrope' is not supported"),
    "rope-key": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, r"rope_scaling\.beta is not supported"),
    "rope-key-default": ({"rope_scaling": {"beta": 1}}, r"rope_scaling\.beta is not supported"),
    "rope-partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
    "rope-factor": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0 must be greater than 0"),
    "rope-frequencies": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}},
        "high_freq_factor=4.0 must exceed low_freq_factor=4.0",
    ),
    "rope-not-object": ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
    "heads": ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads=6 is not divisible by .*heads=4"),
    "no-head-dim": ({"head_dim": None, "num_attention_heads": 3}, "hidden_size=32 is not divisible by num_attention_heads=3"),
    "odd-head-dim": ({"head_dim": 7}, "head_dim=7 is odd"),
    "missing": ({"vocab_size": None}, "config.json does not give vocab_size"),
    "zero": ({"hidden_size": 0}, "config.hidden_size=0 must be a positive whole number"),
    "string": ({"vocab_size": "97"}, "config.vocab_size='97' must be a whole number"),
    "boolean": ({"num_hidden_layers": True}, "config.num_hidden_layers=True must be a whole number"),
    "epsilon": ({"rms_norm_eps": "1e-6"}, "config.rms_norm_eps='1e-6' must be a finite number"),
    "huge-epsilon": ({"rms_norm_eps": 10**400}, "config.rms_norm_eps=10{76}... must be a finite number"),
    "negative-theta": ({"rope_theta": -1.0}, "rope_theta=-1.0 must be greater than 0"),
    "tie": ({"tie_word_embeddings": "yes"}, "config.tie_word_embeddings='yes' must be true or false"),
    "eos": ({"eos_token_id": ["</s>"]}, "eos_token_ids=.* must be a list of whole numbers"),
    "bos": ({"bos_token_id": []}, r"bos_token_id=\[\] must be a whole number or null"),
    "preset": ({"routing": {"preset": "msa"}}, "routing.preset='msa' is unknown; choose one of two_level, moba"),
    "K2>K1": ({"routing": {"coarse_topk": 4, "topk": 5}}, r"routing.topk=5 \(level 2\) exceeds coarse_topk=4"),
    "K>3840": ({"routing": {"preset": "moba", "topk": 3841}}, "routing.topk=3841 exceeds 3840"),
    "K1>3840": ({"routing": {"coarse_topk": 4000}}, "routing.coarse_topk=4000 exceeds 3840"),
    "forced>K": ({"routing": {"topk": 2, "init_blocks": 2}}, "init_blocks=2 and local_blocks=1 need more than topk=2"),
    "no-local": ({"routing": {"local_blocks": 0}}, "routing.local_blocks=0 must be a positive whole number"),
    "negative-init": ({"routing": {"init_blocks": -1}}, "routing.init_blocks=-1 must be a whole number of at least 0"),
    "block-size": ({"routing": {"block_size": 2.5}}, "routing.block_size=2.5 must be a whole number"),
    "groups": ({"experts": {**EXPERTS, "n_group": 3}}, "experts.num_experts=8 is not divisible by n_group=3"),
    "topk-group": ({"experts": {**EXPERTS, "topk_group": 5}}, "experts.topk_group=5 exceeds n_group=4"),
    "top-k": ({"experts": {**EXPERTS, "top_k": 5}}, "experts.top_k=5 exceeds the 4 experts that the kept groups hold"),
    "score": (
        {"experts": {**EXPERTS, "score_func": "relu"}},
        "experts.score_func='relu' must be one of sigmoid, softmax, sqrtsoftplus",
    ),
    "group": ({"experts": {**EXPERTS, "group_score": "mean"}}, "experts.group_score='mean' must be external, max or"),
    "layer": ({"experts": {**EXPERTS, "layers": [0, 3]}}, r"experts.layers holds 3, but the layers are 0\.\.2"),
    "layers": ({"experts": {**EXPERTS, "layers": 1}}, "experts.layers=1 must be a list of whole numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_from_dict_refuses(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        config_from_dict({**SIZES, **changes})


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 12),
    st.floats(),
    st.sampled_from(["", "linear", "silu", "full_attention"]),
    st.lists(st.one_of(st.integers(-1, 3), st.text(max_size=2)), max_size=2),
    st.dictionaries(st.sampled_from(["rope_type", "topk", "type"]), st.integers(0, 3), max_size=2),
)
PLACES = [(key,) for key in FULL] + [(key, inner) for key in ("routing", "rope_scaling", "experts") for inner in FULL[key]]
PLACES += [("rope_parameters",), ("layer_types",), ("hidden_act",), ("quantization_config",), ("tie_word_embeddings",)]


@settings(max_examples=200)
@given(place=st.sampled_from(PLACES), value=JSON_VALUES)
def test_config_from_dict_any_json_loads_or_is_refused(place: tuple[str, ...], value: Any) -> None:
    """No value of any key ends in a Python error, and what loads can be saved and loaded again."""
    raw = json.loads(json.dumps(FULL))
    owner = raw if len(place) == 1 else raw[place[0]]
    owner[place[-1]] = value
    try:
        config = config_from_dict(raw)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    "preset, heads", [("two_level", 2), ("moba", 4), ("moba_gqa", 2)], ids=["two_level-Hkv", "moba-Hq", "moba_gqa-Hkv"]
)
def test_num_selection_heads(preset: str, heads: int) -> None:
    assert ModelConfig(**SIZES, routing=Routing(preset=preset)).num_selection_heads == heads


def test_route_dim() -> None:
    assert ModelConfig(**SIZES, routing=Routing(route_dim=5)).route_dim == 5
    assert ModelConfig(**SIZES, routing=Routing(route_dim=0)).route_dim == SIZES["hidden_size"]


def test_deepseek_v3() -> None:
    experts = Experts.deepseek_v3(layers=(1,), intermediate_size=64)
    assert (experts.num_experts, experts.n_group, experts.topk_group, experts.top_k) == (256, 8, 4, 8)
    assert (experts.score_func, experts.group_score, experts.scale, experts.select_bias) == ("sigmoid", "top2_sum", 2.5, True)
    assert experts.intermediate_size == 64
