"""A dense model of a few kilobytes with a tokenizer that knows every byte, and text for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from bilevel.checkpoint import save_model
from bilevel.config import ModelConfig, Routing
from bilevel.model import CausalLM
from tests.doubles.bundle import EOS, VOCAB_SIZE, make_tokenizer

BLOCK_SIZE = 16
CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
    eos_token_ids=(EOS,),
)


def routing(key: str, **changes: object) -> Routing:
    """Few blocks, so that there is something to leave out."""
    base = Routing(preset="moba_gqa", key=key, block_size=BLOCK_SIZE, topk=4, local_blocks=2)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def make_model(config: ModelConfig = CONFIG, seed: int = 0) -> CausalLM:
    """Weights large enough for attention to have preferences."""
    torch.manual_seed(seed)
    model = CausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def save_checkpoint(folder: Path, config: ModelConfig = CONFIG, seed: int = 0) -> Path:
    """The model as a checkpoint folder."""
    save_model(make_model(config, seed), folder, files={"tokenizer.json": make_tokenizer().to_str().encode()})
    return folder


def write_text(folder: Path) -> Path:
    """Documents of plain sentences, enough that some of them are held out."""
    folder.mkdir()
    for number in range(24):
        lines = [f"Line {line} of paper {number} says that {line * number} is a number like any other." for line in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
