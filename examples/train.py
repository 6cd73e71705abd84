"""Train the example model (or its dense twin) on Python's standard library: ``python examples/train.py OUT [--dense]``.

Everything lies in OUT: the prepared text (``data/``), ``state.pt``, ``log.jsonl`` and, at the end, ``model/`` in Hugging
Face's format. Start the same command again after a kill or Ctrl-C: it continues where it was, and the result is the same to
the last bit. ``train_report.py`` compares two finished runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import corpus
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bilevel.checkpoint import save_model
from bilevel.config import Experts, ModelConfig, Routing
from bilevel.config_json import load_config
from bilevel.errors import BilevelError, CheckpointError
from bilevel.model import CausalLM
from bilevel.training import LossWeights, heldout_loss, initialise, learning_rate, make_optimizer, train_step

PROBE_STEPS = 8  # timed (after as many to warm up) when the length of the run is given in minutes
SHORT, LONG = 512, 1024  # tokens per row
LONG_SHARE = 0.1  # of the steps, at the end, are on long rows

EXAMPLE = ModelConfig(
    model_type="qwen3",
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=448,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=corpus.BOS_ID,
    eos_token_ids=(corpus.EOS_ID,),
    routing=Routing(preset="two_level", block_size=32, coarse_topk=8, topk=4, window=8, route_dim=64),
    experts=Experts(num_experts=8, n_group=4, topk_group=2, top_k=2, intermediate_size=128, layers=(2, 4)),
)


@dataclass(frozen=True)
class Plan:
    """What decides the result: stored with the first checkpoint and used again when the run is resumed."""

    steps: int
    seed: int
    tokens_per_step: int
    peak: float

    def length(self, step: int) -> int:
        """Tokens per row at this step."""
        return LONG if step >= self.steps * (1 - LONG_SHARE) else SHORT


@dataclass
class Run:
    """One training run in its folder."""

    folder: Path
    plan: Plan
    model: CausalLM
    optimizer: torch.optim.Optimizer
    tokens: np.ndarray
    heldout: torch.Tensor
    step: int = 0

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def save(self) -> None:
        """Write the state to a temporary name, then rename: a kill leaves the old state or the new one."""
        state = {
            "plan": dataclasses.asdict(self.plan),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "log_bytes": self.log.stat().st_size if self.log.exists() else 0,
        }
        partial = self.folder / "state.pt.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / "state.pt")

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; log lines written after it are dropped, as their steps are done again."""
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError:
            raise CheckpointError(
                f"{self.folder / 'state.pt'} belongs to a model of other sizes; give another folder, or the options of then"
            ) from None
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        if self.log.exists():
            os.truncate(self.log, state["log_bytes"])

    def advance(self) -> dict[str, float]:
        """One step; returns its losses and learning rate."""
        length = self.plan.length(self.step)
        rows = self.plan.tokens_per_step // length
        inputs, targets = corpus.batch(self.tokens, self.step, rows=rows, length=length, seed=self.plan.seed)
        lr = learning_rate(self.step, self.plan.steps, peak=self.plan.peak)
        losses = train_step(
            self.model, self.optimizer, torch.from_numpy(inputs), torch.from_numpy(targets), lr=lr, weights=LossWeights()
        )
        self.step += 1
        return {**losses, "lr": lr}

    def write(self, line: dict[str, float]) -> None:
        rounded = {key: value if isinstance(value, int) else float(f"{value:.5g}") for key, value in line.items()}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


def open_run(folder: Path, config: ModelConfig, options: argparse.Namespace, console: Console) -> Run:
    """Prepare the data and the model, and continue from ``state.pt`` where there is one."""
    console.print(f"reading and tokenising {options.text}" if not (folder / "data").exists() else f"continuing in {folder}")
    corpus.prepare(folder / "data", options.text, config.vocab_size, config.max_position_embeddings)
    torch.manual_seed(options.seed)
    model = CausalLM(config)
    initialise(model)
    path = folder / "state.pt"
    state = _load_state(path) if path.exists() else None
    if state is not None:
        plan = Plan(**state["plan"])
        plan = dataclasses.replace(plan, steps=options.steps or plan.steps)
    else:
        plan = Plan(options.steps or 0, options.seed, options.tokens_per_step, options.peak)
    tokens = np.load(folder / "data" / "train.npy")
    heldout = torch.from_numpy(corpus.cut(np.load(folder / "data" / "heldout.npy"), SHORT)[:16])
    run = Run(folder, plan, model, make_optimizer(model, peak=plan.peak), tokens, heldout)
    if state is not None:
        run.restore(state)
    else:
        run.log.unlink(missing_ok=True)  # left by a run that was killed before its first save
        if not plan.steps:
            run.plan = dataclasses.replace(plan, steps=_steps_in(options.minutes, config, run))
    return run


def _load_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise CheckpointError(f"{path} is damaged; remove it to train anew") from None


def _steps_in(minutes: float, config: ModelConfig, run: Run) -> int:
    """How many steps fit, from the time that some take on a scratch copy of the model."""
    scratch = CausalLM(config)
    scratch.load_state_dict(run.model.state_dict())
    probe = dataclasses.replace(
        run, plan=dataclasses.replace(run.plan, steps=10**6), model=scratch, optimizer=make_optimizer(scratch, peak=1e-4)
    )
    for _ in range(PROBE_STEPS):
        probe.advance()
    start = time.perf_counter()
    for _ in range(PROBE_STEPS):
        probe.advance()
    return max(1, int(minutes * 60 * PROBE_STEPS / (time.perf_counter() - start)))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that fills when the user asks to stop (Ctrl-C, SIGTERM); a second Ctrl-C stops at once."""
    stop: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run: Run, *, save_seconds: float, log_steps: int, heldout_steps: int, console: Console) -> bool:
    """Train to the end of the plan; False when the user stopped it before. The state is saved at least every minute."""
    columns = ("steps", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    saved = started = time.monotonic()
    tokens = 0
    with _stop_signals() as stop, Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task("train", total=run.plan.steps, completed=run.step, note="")
        while run.step < run.plan.steps and not stop:
            line: dict[str, float] = {"step": run.step + 1, **run.advance()}
            tokens += run.plan.tokens_per_step
            last = run.step == run.plan.steps
            speed = tokens / (time.monotonic() - started)
            progress.update(task, completed=run.step, note=f"loss {line['cross_entropy']:.3f} · {speed:,.0f} tokens/s")
            if run.step % heldout_steps == 0 or last:
                line["heldout"] = heldout_loss(run.model, run.heldout)[0]
                if not console.is_terminal:
                    console.print(f"step {run.step}/{run.plan.steps} held-out {line['heldout']:.3f} {speed:.0f} tokens/s")
            if run.step % log_steps == 0 or "heldout" in line:
                run.write({**line, "tokens_per_s": speed})
            if time.monotonic() - saved >= save_seconds or last or stop:
                run.save()
                saved = time.monotonic()
    return run.step == run.plan.steps


def export_model(run: Run) -> Path:
    """Write ``model/``: config.json, model.safetensors and the tokenizer's files."""
    data = run.folder / "data"
    files = {name: (data / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model(run.model, run.folder / "model", files=files, overwrite=True)
    return run.folder / "model"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the example model; run again to continue.")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--dense", action="store_true", help="the dense twin: the same model without attention routing")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="length of the run; a later --steps changes it")
    length.add_argument("--minutes", type=float, default=45.0, help="length of a new run, from a measured step time")
    parser.add_argument(
        "--text", type=Path, default=corpus.library_folder(), help="folder of *.py files (default: Python's own)"
    )
    parser.add_argument("--config", type=Path, help="folder with a config.json, for another model than the example")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-per-step", type=int, default=2048, help="a multiple of 1024")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--save-seconds", type=float, default=45.0, help="most seconds of work that a kill may lose")
    parser.add_argument("--log-steps", type=int, default=5)
    parser.add_argument("--heldout-steps", type=int, default=100)
    options = parser.parse_args(arguments)
    for name in ("steps", "minutes", "tokens_per_step", "peak", "log_steps", "heldout_steps"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} {value} must be greater than 0")
    if options.tokens_per_step % LONG:
        parser.error(f"--tokens-per-step {options.tokens_per_step} must be a multiple of {LONG}, the longest row")
    return options


def main(arguments: list[str]) -> int:
    options, console = parse(arguments), Console(stderr=True)
    try:
        config = load_config(options.config) if options.config else EXAMPLE
        if options.dense:
            config = dataclasses.replace(config, routing=Routing(preset="dense"))
        run = open_run(options.folder, config, options, console)
        finished = train(
            run,
            save_seconds=options.save_seconds,
            log_steps=options.log_steps,
            heldout_steps=options.heldout_steps,
            console=console,
        )
        if not finished:
            console.print(f"stopped at step {run.step} of {run.plan.steps}; the same command continues")
            return 130
        console.print(f"trained {run.step} steps; the model is in {export_model(run)}")
    except BilevelError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except OSError as error:
        console.print(
            f"error: {error}; when that is mended, the same command continues", style="red", markup=False, soft_wrap=True
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
