"""What a run of ``bilevel route`` starts from: the user's choices, the dense model, its tokenizer and the text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bilevel.checkpoint import Checkpoint
from bilevel.config import ModelConfig
from bilevel.errors import CheckpointError, ConfigError
from bilevel.export.route import texts
from bilevel.export.route.adapter import describe_base
from bilevel.export.route.rows import Case, evaluation_case
from bilevel.model import CausalLM

_COUNTED = 2_000_000  # tokens in which words are counted


@dataclass(frozen=True)
class Options:
    """What the user decides (``bilevel route --help`` explains them). block_size, dense_layers: None: found by calibration.

    share: None: the usual one, or as in ``start``. words: the share of the context's blocks that level 1 proposes; None: no
    level 1, or as in ``start``. start: an adapter to go on from. tune: texts that low-rank updates learn from.
    """

    method: str = "bounds"
    text: tuple[Path, ...] = ()
    share: float | None = None
    context: int = 4096
    block_size: int | None = None
    dense_layers: tuple[int, ...] | None = None
    key: str | None = None
    words: float | None = None
    rows: int = 400
    passes: int = 6
    seed: int = 0
    save_seconds: float = 45.0
    start: Path | None = None
    tune: int = 0


@dataclass(frozen=True)
class Report:
    """Told while a run goes on. stage: what is being done; advance: (what, done, of how many, note)."""

    stage: Callable[[str], None] = lambda stage: None
    advance: Callable[[str, int, int, str], None] = lambda what, done, total, note: None


@dataclass
class Source:
    """The model and the text of a run."""

    model: CausalLM
    base: dict[str, Any]
    training: list[str]
    heldout: list[str]
    tokenizer: Any

    @property
    def config(self) -> ModelConfig:
        """Of the dense model."""
        return self.model.config

    @property
    def precision(self) -> str:
        """What the model computes in, as in ``float32``."""
        return str(self.model.lm_head.weight.dtype).removeprefix("torch.")

    @property
    def digest(self) -> str:
        """SHA-256 of the training text."""
        return hashlib.sha256("".join(self.training).encode()).hexdigest()

    def encoded(self) -> list[list[int]]:
        """The training text in tokens, as much of it as tells common words from rare ones."""
        texts, count = list[list[int]](), 0
        for document in self.training:
            if count > _COUNTED:
                break
            texts.append(list(self.tokenizer.encode(document, add_special_tokens=False).ids))
            count += len(texts[-1])
        return texts

    def cases(self, length: int, seed: int, count: int, facts: int) -> list[Case]:
        """Contexts with hidden facts from held-out documents."""
        return [evaluation_case(self.heldout, self.tokenizer, length, seed, i, facts=facts) for i in range(count)]


def open_source(checkpoint: Path, options: Options, precision: torch.dtype, report: Report) -> Source:
    """Read model, tokenizer and text. Raises BilevelError."""
    opened = Checkpoint(checkpoint)
    if not opened.config.routing.is_dense:
        raise CheckpointError(
            f"{checkpoint} is routed already (routing.preset={opened.config.routing.preset!r}); give the dense checkpoint, or "
            'remove "routing" from its config.json'
        )
    if options.context > opened.config.max_position_embeddings:
        raise ConfigError(
            f"--context {options.context} exceeds the model's {opened.config.max_position_embeddings} positions; give less"
        )
    tokenizer = texts.read_tokenizer(checkpoint)
    report.stage("reading the text")
    training, heldout = texts.split(texts.read_documents(options.text))
    report.stage(f"loading {checkpoint}")
    base = describe_base(opened)
    model = opened.skeleton()
    opened.fill(model, dtype=precision)
    return Source(model.requires_grad_(False), base, training, heldout, tokenizer)


@lru_cache
def fast_precision() -> torch.dtype:
    """bfloat16 where this machine multiplies it at least half again as fast as float32."""

    def seconds(dtype: torch.dtype, size: int) -> float:
        x = torch.randn(size, size, dtype=dtype)
        x @ x
        best = 1e9
        for _ in range(3):
            started = time.perf_counter()
            x @ x
            best = min(best, time.perf_counter() - started)
        return best

    # Without instructions for it, bfloat16 takes a hundred times as long: that shows on small products, and soon.
    if all(seconds(torch.bfloat16, size) * factor < seconds(torch.float32, size) for size, factor in ((192, 1), (1024, 1.5))):
        return torch.bfloat16
    return torch.float32
