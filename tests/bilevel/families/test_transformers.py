"""Every family against transformers' own class: equal logits, equal greedy tokens, a checkpoint that comes back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from bilevel.checkpoint import load_model, save_model
from tests.bilevel.families.released import MODELS, change_config, make
from tests.support.decoding import greedy, random_ids


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_family_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "released")
    ours = load_model(tmp_path / "released")
    ids = random_ids(2, MODELS[name].length)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    prompt = random_ids(2, 40 if "longrope" in name else 11)  # longrope-long: behind the trained length
    generated = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert greedy(ours, prompt, 8) == generated[:, prompt.shape[1] :].tolist()
    save_model(ours, tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert again.config == ours.config
    assert torch.equal(again(ids), ours(ids))


@pytest.mark.parametrize("name", ["qwen2", "mistral-head-dim-apart", "smollm3", "granite", "ernie4_5-interleaved"])
@torch.no_grad()
def test_saved_model_is_read_by_transformers(name: str, tmp_path: Path) -> None:
    """What is still of a released type, or is one once its factors are folded, is saved as one."""
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "released")
    save_model(load_model(tmp_path / "released"), tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = random_ids(1, 40)
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", ["two_level", "moba", "moba_gqa"])
@pytest.mark.parametrize("name", ["qwen2", "smollm3", "granitemoe", "olmoe", "glm4_moe", "phi3"])
@torch.no_grad()
def test_family_routed_over_all_blocks_equals_transformers(name: str, preset: str, tmp_path: Path) -> None:
    """A routing section works on any family; where it keeps every block the model is what it was."""
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, routing={"preset": preset, "block_size": 4, "coarse_topk": 9, "topk": 8})
    ids = random_ids(2, 31)
    torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_longrope_takes_the_factors_of_the_declared_capacity(tmp_path: Path) -> None:
    """One set of factors: within the trained length transformers agrees only where no longer text is declared."""
    theirs = make("phi3-longrope-long")
    theirs.save_pretrained(tmp_path)
    ids = random_ids(1, 20)
    assert (load_model(tmp_path)(ids) - theirs(ids).logits).abs().max() > 1e-3
    change_config(tmp_path, max_position_embeddings=32)
    same = type(theirs).from_pretrained(tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(ids), same(ids).logits, atol=1e-4, rtol=0)
