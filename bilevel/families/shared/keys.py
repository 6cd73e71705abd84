"""Every key of a ``config.json`` that somebody writes, and why it matters or does not.

Three kinds: *read* (``bilevel.config_json``'s own, and a family's ``reads``), *inert* (the result does not depend on it) and
*not implemented* (it changes the result; only a neutral value loads). A key of no kind is refused unless its value is null,
false or empty, because it may belong to any of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from bilevel.errors import ConfigError

# Why they do not matter -> the keys.
_INERT_GROUPS = {
    "names the class, the file or the version that wrote it": """
        architectures auto_map model_name name_or_path transformers_version transformers.js_config custom_pipelines
        unsloth_fixed unsloth_version is_llama_config is_decoder torchscript tf_legacy_loss use_bfloat16 finetuning_task
        task_specific_params problem_type id2label label2id num_labels return_dict output_attentions output_hidden_states
        output_router_logits chunk_size_feed_forward attn_implementation use_flash_attn use_flash_attn_v2 use_flash_attention
        use_flash_attention_2 use_cache use_cache_quantization use_kernel torch_dtype dtype fp16 bf16 fp32 params_dtype license
        tags language base_model fused_norm fuse_cross_entropy
    """,
    "belongs to training": """
        attention_dropout attn_dropout hidden_dropout hidden_dropout_prob embd_pdrop resid_pdrop embedding_dropout
        output_dropout dropout residual_dropout classifier_dropout initializer_range initializer_cutoff_factor init_std
        pretraining_tp router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise router_z_loss_coef
        mtp_loss_scaling_factor z_loss_coef gradient_checkpointing use_gradient_checkpointing ep_size expert_parallel
        mup_denominator rescale_prenorm_residual train_max_length loss_type max_grad_norm
    """,
    "belongs to the tokenizer or to the text's special tokens": """
        pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id tokenizer_class tokenizer_path
        vocab_file prefix pad_token eos_token bos_token unk_token image_token_id begin_suppress_tokens suppress_tokens
        forced_bos_token_id forced_eos_token_id user_token_id assistant_token_id added_tokens pad_vocab_size_multiple
    """,
    "is an option of text generation": """
        do_sample temperature top_k top_p typical_p min_p repetition_penalty length_penalty diversity_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_beams num_beam_groups num_return_sequences
        max_length min_length max_new_tokens early_stopping exponential_decay_length_penalty remove_invalid_values
        output_scores return_dict_in_generate keys_to_ignore_at_inference generation_config chat_template
    """,
    "repeats a length that max_position_embeddings decides": """
        max_sequence_length model_max_length max_seq_len max_seq_length seq_length seq_len n_positions
    """,
    "is read by no implementation of the families here": "rope_interleaved",
}
INERT: dict[str, str] = {key: why for why, keys in _INERT_GROUPS.items() for key in keys.split()}


@dataclass(frozen=True)
class Unimplemented:
    """A key that changes the result: the values with which it does not, and what to do about any other."""

    neutral: tuple[Any, ...]
    remedy: str


_EXPERTS = Unimplemented((0,), 'this model_type has no experts of its own; describe them in an "experts" section')
_FOLDED = Unimplemented((1,), "it scales what the model computes; set model_type to the family that it belongs to")
_OTHER_SHAPE = Unimplemented((), "no model of this shape is implemented; give a checkpoint without it")
_FUNCTION = Unimplemented(("silu", "swish"), "it must be 'silu'; only SwiGLU layers are implemented")

UNIMPLEMENTED: dict[str, Unimplemented] = {
    "hidden_act": _FUNCTION,
    "hidden_activation": _FUNCTION,
    "mlp_type": Unimplemented(("swiglu",), "only SwiGLU layers are implemented"),
    "quantization_config": Unimplemented((), "bilevel reads float weights: give the checkpoint before quantization"),
    "rotary_pct": Unimplemented((1,), "this model_type turns whole heads; set the model_type that it belongs to"),
    "rotary_emb_base": _OTHER_SHAPE,
    "add_cross_attention": _OTHER_SHAPE,
    "is_encoder_decoder": _OTHER_SHAPE,
    "cross_attention_hidden_size": _OTHER_SHAPE,
    "tie_encoder_decoder": _OTHER_SHAPE,
    "pruned_heads": _OTHER_SHAPE,
    "alibi": _OTHER_SHAPE,
    "use_parallel_residual": _OTHER_SHAPE,
    "parallel_attn": _OTHER_SHAPE,
    "clip_qkv": Unimplemented((), "clipped queries, keys and values are not implemented; give a checkpoint without it"),
    "attn_logit_softcapping": Unimplemented((), "capped scores are not implemented; give a checkpoint without it"),
    "final_logit_softcapping": Unimplemented((), "capped logits are not implemented; give a checkpoint without it"),
    "query_pre_attn_scalar": _OTHER_SHAPE,
    "kv_lora_rank": Unimplemented((0,), "latent attention (MLA) is not implemented; no conversion of such a model is exact"),
    "q_lora_rank": Unimplemented((0,), "latent attention (MLA) is not implemented; no conversion of such a model is exact"),
    "sparse_config": Unimplemented(
        (), "the attention that it describes is not implemented; remove it to attend to every token"
    ),
    "no_rope_layers": Unimplemented((), "layers without positions are read with model_type smollm3; set that"),
    "use_qk_norm": Unimplemented((), "this model_type has no norm of q and k; set the model_type that it belongs to"),
    "qk_layernorm": Unimplemented((), "this model_type has no norm of q and k; set the model_type that it belongs to"),
    "use_bias": Unimplemented((), "say attention_bias and mlp_bias for this model_type"),
    "use_qkv_bias": Unimplemented((), "say attention_bias and attention_output_bias for this model_type"),
    "norm_head": _OTHER_SHAPE,
    "lm_head_bias": _OTHER_SHAPE,
    "full_attn_mod": Unimplemented((1,), "layers without attention over the whole text are not implemented"),
    "interpolate_factor": Unimplemented((1,), "describe the positions in rope_scaling"),
    "mtp_num_layers": Unimplemented((0,), "remove the layers that predict further tokens from the checkpoint"),
    "num_nextn_predict_layers": Unimplemented((0,), "remove the layers that predict further tokens from the checkpoint"),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_shared_experts"), _EXPERTS
    ),
    **dict.fromkeys(("scale_emb", "scale_depth", "embedding_multiplier", "residual_multiplier", "logits_scaling"), _FOLDED),
    **dict.fromkeys(("dim_model_base", "attention_multiplier", "logit_scale", "scale_width"), _FOLDED),
}

# With these a key of no kind says nothing.
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def is_inert(key: str) -> bool:
    """Whether a key changes no result, whatever its value."""
    return key in INERT or key.startswith("_")


def _is_one_of(value: Any, values: Collection[Any]) -> bool:
    """Equality that keeps 0, False and 0.0 apart where a number is not what is meant: false is nothing, 0 is a number."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def _shown(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def judge(key: str, value: Any, ignored: Collection[str]) -> bool:
    """Pass over a key that no family reads, or raise ConfigError: it names the key, its value and the remedy.

    Returns whether it is passed over only because it is among ``ignored``.
    """
    if is_inert(key) or _is_one_of(value, _NOTHING):
        return False
    known = UNIMPLEMENTED.get(key)
    if known is not None:
        if _is_one_of(value, known.neutral):
            return False
        raise ConfigError(f"config.json sets {key} to {_shown(value)}, which bilevel does not implement; {known.remedy}")
    if key not in ignored:
        raise ConfigError(
            f"config.json holds the unknown key {key!r} ({_shown(value)}), which may change the result; "
            f"if it does not, export with --ignore-key {key}"
        )
    return True


def check_ignored(ignored: Collection[str], read: Collection[str]) -> None:
    """Raise ConfigError for a key to ignore that is known to change the result."""
    for key in sorted(ignored):
        if key in read or key in UNIMPLEMENTED:
            raise ConfigError(f"--ignore-key {key}: the result depends on this key, so it is not ignored; leave the option out")
