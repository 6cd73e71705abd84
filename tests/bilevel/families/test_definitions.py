"""MiniCPM, Ling and Ring-mini-sparse against their definitions in slow loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel.checkpoint import load_model, save_model
from bilevel.errors import CheckpointError, ConfigError
from tests.bilevel.families.definitions import (
    bailing_logits,
    minicpm_logits,
    moba_tokens,
    save_bailing,
    save_minicpm,
)
from tests.bilevel.families.released import change_config
from tests.support.decoding import random_ids


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_minicpm(tied: bool, tmp_path: Path) -> None:
    weights = save_minicpm(tmp_path / "released", tie_word_embeddings=tied)
    model = load_model(tmp_path / "released")
    ids = random_ids(1, 20)
    torch.testing.assert_close(model(ids)[0], minicpm_logits(ids[0].tolist(), weights), atol=1e-4, rtol=0)
    save_model(model, tmp_path / "ours")
    assert torch.equal(load_model(tmp_path / "ours")(ids), model(ids)), "what is folded is not folded twice"


@torch.no_grad()
def test_minicpm4_is_dense_up_to_dense_len(tmp_path: Path) -> None:
    weights = save_minicpm(tmp_path / "released", sparse_config={"kernel_size": 32, "dense_len": 96})
    ids = random_ids(1, 12)
    model = load_model(tmp_path / "released")
    torch.testing.assert_close(model(ids)[0], minicpm_logits(ids[0].tolist(), weights), atol=1e-4, rtol=0)
    change_config(tmp_path / "released", max_position_embeddings=97)
    with pytest.raises(ConfigError, match="dense_len=96 below max_position_embeddings=97; .* set max_position_embeddings"):
        load_model(tmp_path / "released")


@torch.no_grad()
def test_ling(tmp_path: Path) -> None:
    weights = save_bailing(tmp_path / "released")
    ids = random_ids(1, 24)
    expected = bailing_logits(ids[0].tolist(), weights)
    torch.testing.assert_close(load_model(tmp_path / "released")(ids)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 5, 26])
@torch.no_grad()
def test_ring_mini_sparse(length: int, tmp_path: Path) -> None:
    """Blocks chosen once for all query heads of a key head, the own one among them."""
    weights = save_bailing(tmp_path / "released")
    routing: dict[str, Any] = {"preset": "moba_gqa", "block_size": 4, "topk": 3, "init_blocks": 0}
    change_config(tmp_path / "released", routing=routing)
    ids = random_ids(1, length)
    expected = bailing_logits(ids[0].tolist(), weights, moba_tokens)
    torch.testing.assert_close(load_model(tmp_path / "released")(ids)[0], expected, atol=1e-4, rtol=0)


def test_bailing_refuses_another_gate_and_a_fused_tensor_of_another_shape(tmp_path: Path) -> None:
    save_bailing(tmp_path / "gate", score_function="softmax")
    with pytest.raises(ConfigError, match="score_function to 'softmax'; of Bailing's gates only 'sigmoid'"):
        load_model(tmp_path / "gate")
    save_bailing(tmp_path / "shape")
    change_config(tmp_path / "shape", num_key_value_heads=1)
    with pytest.raises(CheckpointError, match=r"query_key_value.weight has shape \[128, 32\] .* needs \[96, 32\]"):
        load_model(tmp_path / "shape")
