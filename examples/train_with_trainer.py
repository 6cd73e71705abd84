"""Train a two-level model with transformers' Trainer: ``python examples/train_with_trainer.py examples/model TEXT OUT``.

``bilevel.training`` is losses and steps, so any loop will do; the Trainer asks only for a module that returns its loss and for
rows of ``input_ids`` and ``labels``. It needs accelerate beside transformers: ``pip install 'transformers[torch]'``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bilevel.checkpoint import load_model, save_model
from bilevel.errors import BilevelError, ConfigError, require
from bilevel.model import CausalLM
from bilevel.training import LossWeights, training_loss


class WithLoss(nn.Module):
    """The model as the Trainer calls it."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """input_ids, labels: int64 [B, L], labels one token ahead."""
        return {"loss": training_loss(self.model, input_ids, labels, LossWeights())[0]}


def rows(tokenizer: Tokenizer, text: str, length: int) -> list[dict[str, Tensor]]:
    """The text's tokens, cut into rows of ``length`` and their targets."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    if len(ids) <= length:
        raise ConfigError(
            f"the text has {len(ids)} tokens, but a row needs {length + 1}; give a longer text, or a smaller --length"
        )
    return [{"input_ids": row[:-1], "labels": row[1:]} for row in ids.unfold(0, length + 1, length)]


def train(folder: Path, text: Path, out: Path, *, steps: int, length: int) -> list[float]:
    """Train the checkpoint in ``folder`` and write the result to ``out``; the losses, step by step."""
    transformers = require("transformers")
    model = load_model(folder).train()
    model.model.recomputes_layers = True
    arguments = transformers.TrainingArguments(
        output_dir=str(out.parent / f"{out.name}.trainer"), max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-4,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    data = rows(tokenizer, text.read_text(encoding="utf-8"), length)
    trainer = transformers.Trainer(model=WithLoss(model), args=arguments, train_dataset=data)
    trainer.train()
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model(model, out, files=files, overwrite=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Train a checkpoint with transformers' Trainer.")
    parser.add_argument("folder", type=Path, metavar="CHECKPOINT")
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    options = parser.parse_args(arguments)
    try:
        losses = train(options.folder, options.text, options.out, steps=options.steps, length=options.length)
    except (BilevelError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; the model is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
