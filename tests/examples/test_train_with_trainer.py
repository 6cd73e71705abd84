"""examples/train_with_trainer.py: transformers' own loop trains a two-level model, whose checkpoint then loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bilevel.checkpoint import load_model
from tests import ROOT
from tests.examples.test_examples import run_example

MODEL = ROOT / "examples" / "model"


def test_the_trainer_changes_every_part_that_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(MODEL), str(MODEL / "heldout.txt"), str(tmp_path / "out"), "--steps", "2", "--length", "160"]
    assert run_example("train_with_trainer").main(arguments) == 0
    assert "at the first step" in capsys.readouterr().out
    before, after = load_model(MODEL).state_dict(), load_model(tmp_path / "out").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("q_proj", "v_proj", "experts.gate_up_proj", "gate.group_centroid", "embed_tokens", "word_router"):
        assert any(part in name for name in changed), part


def test_a_text_that_is_shorter_than_a_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("import os\n")
    example = run_example("train_with_trainer")
    with pytest.raises(example.ConfigError, match="the text has 3 tokens, but a row needs 65"):
        example.rows(example.Tokenizer.from_file(str(MODEL / "tokenizer.json")), text.read_text(), 64)
