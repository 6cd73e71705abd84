"""The folder of a run that may be killed: what decides the result, the teacher's files, the training's state and log."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import CheckpointError
from bilevel.folders import write_json

TUNE = "tune.pt"
_CHANGEABLE = ("rows", "passes", "rows_per_update", "peak", "power")  # before the first update


@dataclass(frozen=True)
class Plan:
    """What decides the result: a run goes on only under the plan that it began with.

    base: the model's fingerprint. texts: SHA-256 of the training text. rows: of tokens that the teacher reads, lengths and
    words per row. passes over them, rows per update, peak learning rate and power: of the training.
    """

    base: str
    texts: str
    seed: int
    rows: int
    lengths: tuple[int, ...]
    words: int
    block_size: int
    passes: int
    rows_per_update: int
    peak: float
    power: float
    precision: str

    @property
    def updates(self) -> int:
        """Of the whole training."""
        return self.passes * self.rows // self.rows_per_update


class Work:
    """A run's folder. Raises CheckpointError where it belongs to another run."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        path = folder / "plan.json"
        stored = {**dataclasses.asdict(plan), "lengths": list(plan.lengths)}
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                before = {}
            begun = (folder / "state.pt").exists()
            for name, value in stored.items():
                if before.get(name) != value and (begun or name not in _CHANGEABLE):
                    raise CheckpointError(
                        f"{folder} holds an unfinished run with another {name} ({before.get(name)}, now {value}); "
                        "give the options of then, or remove the folder to begin anew"
                    )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder}, where a run keeps its progress, holds something else; move it away, or name another OUT"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, stored)

    @staticmethod
    def precision_of(folder: Path) -> str | None:
        """What the teacher of an unfinished run computes in; another machine's speed must not change that."""
        path = folder / "plan.json"
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["precision"]) if path.is_file() else None
        except (ValueError, KeyError, TypeError):
            return None

    def lesson(self, index: int) -> Path:
        """The teacher's file of a row."""
        return self.folder / "lessons" / f"{index:05d}.safetensors"

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.folder / "log.jsonl"

    def write_log(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()] if self.log.exists() else []

    def save(self, step: int, gates: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state."""
        state = {
            "step": step,
            "gates": gates.state_dict(),
            "optimizer": optimizer.state_dict(),
            "log_bytes": self.log.stat().st_size if self.log.exists() else 0,
        }
        write_state(self.folder / "state.pt", state)

    def restore(self, gates: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """The update to go on with; log lines of updates that are done again are dropped."""
        path = self.folder / "state.pt"
        if not path.exists():
            self.log.unlink(missing_ok=True)
            return 0
        state = read_state(path)
        gates.load_state_dict(state["gates"])
        optimizer.load_state_dict(state["optimizer"])
        if self.log.exists():
            os.truncate(self.log, state["log_bytes"])
        return int(state["step"])

    @staticmethod
    def remove(folder: Path) -> None:
        """The folder of a finished run."""
        shutil.rmtree(folder, ignore_errors=True)


def check_empty(folder: Path) -> None:
    """Refuse to keep the progress of low-rank updates in a folder that holds something else. Raises CheckpointError."""
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(TUNE) for path in folder.iterdir())):
        raise CheckpointError(
            f"{folder}, where a run keeps its progress, holds something else; move it away, or name another OUT"
        )


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write to a temporary name, then rename: a kill leaves the old state or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_state(path: Path) -> dict[str, Any]:
    """What ``write_state`` wrote. Raises CheckpointError."""
    try:
        return dict(torch.load(path, weights_only=True))
    except (RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError):
        raise CheckpointError(f"{path} is damaged; remove it to train anew") from None
