"""MiniMax-M3's text model, tiny and random: against transformers' class, in any cut, exported and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

from bilevel.errors import ConfigError
from bilevel.export.check.module import check_module
from bilevel.export.graph.module import save_onnx
from bilevel.routers.minimax_m3 import MiniMaxM3, MiniMaxM3Config

VOCABULARY, CAPACITY = 50, 48
RELEASED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 12,
    "dense_intermediate_size": 20,
    "shared_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 4,
    "index_topk_blocks": 3,
    "swiglu_limit": 0.6,  # a bound that is felt
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse"],
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def released() -> MiniMaxM3VLForCausalLM:
    """Every parameter and bias drawn."""
    generator = torch.Generator().manual_seed(3)
    theirs = MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**RELEASED)).eval()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
            if not name.endswith("inv_freq"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return theirs


@pytest.fixture(scope="module")
def model(released: MiniMaxM3VLForCausalLM) -> MiniMaxM3:
    ours = MiniMaxM3(MiniMaxM3Config.from_dict(released.config.to_dict())).eval()
    weights = {name: tensor for name, tensor in released.state_dict().items() if not name.endswith("inv_freq")}
    ours.load_state_dict(weights)
    return ours


@torch.no_grad()
def run(model: MiniMaxM3, ids: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits [B, L, vocabulary] of a text in calls of these lengths."""
    caches, parts, past = model.empty_caches(len(ids), CAPACITY), [], 0
    for count in cuts:
        lengths = (torch.full((len(ids),), n, dtype=torch.int32) for n in (past, count))
        out, *caches = model(ids[:, past : past + count], *lengths, caches)
        parts.append(out)
        past += count
    return torch.cat(parts, 1)


@torch.no_grad()
def test_the_model_is_transformers_and_decodes_what_it_prefills(model: MiniMaxM3, released: MiniMaxM3VLForCausalLM) -> None:
    ids = torch.randint(0, VOCABULARY, (2, 43), generator=torch.Generator().manual_seed(0))
    whole = run(model, ids, [43])
    torch.testing.assert_close(whole, released(ids).logits, atol=1e-4, rtol=1e-4)
    for cuts in ([1] * 43, [17, 1, 1, 9, 15]):
        torch.testing.assert_close(run(model, ids, cuts), whole, atol=1e-5, rtol=1e-5)


def test_the_model_exports_and_both_executions_make_its_choices(model: MiniMaxM3, tmp_path: Path) -> None:
    """A chunk behind a filled cache, rows of different lengths."""
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    caches = model.empty_caches(2, CAPACITY)
    lengths = [torch.tensor(values, dtype=torch.int32) for values in ((0, 0), (19, 13), (11, 6))]
    with torch.no_grad():
        _, *caches = model(ids[:, :19], lengths[0], lengths[1], caches)
    inputs = {"input_ids": ids[:, 19:], "past_len": lengths[1], "new_len": lengths[2], "past": caches}
    dynamic = {"input_ids": {1: "tokens"}}
    names = ["logits", *(f"present.{n}" for n in range(len(caches)))]
    save_onnx(model, inputs, tmp_path / "model.onnx", output_names=names, dynamic=dynamic)
    verdict = check_module(model, inputs, tmp_path / "model.onnx")
    assert verdict.passed, verdict.lines()
    assert [name.split()[1] for name in verdict.selections] == ["SelectBlocks", "ExpertRoute"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 8}, "turns 0.5 of head_dim=8, but rotary_dim=8"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'; only 'default' is implemented"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types=.* must hold one of full_"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types=.* must hold one of dense, sparse for each layer"),
        ({"head_dim": None}, "text_config does not give head_dim"),
        ({"hidden_size": "24"}, "hidden_size='24' must be a whole number"),
        ({"rotary_dim": 3, "rope_parameters": {}}, "rotary_dim=3 must be even, from 2 to head_dim and index_head_dim"),
    ],
)
def test_other_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MiniMaxM3Config.from_dict({**RELEASED, **changes})
