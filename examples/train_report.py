"""Compare two finished runs of train.py: ``python examples/train_report.py TWO_LEVEL DENSE OUT``.

Writes into OUT the trained two-level model with its tokenizer and held-out text, both logs, ``report.json`` (held-out losses,
recall of level 1, expert load) and ``loss_curve.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch

from bilevel.checkpoint import load_model
from bilevel.config import Routing
from bilevel.errors import BilevelError, CheckpointError
from bilevel.model import CausalLM
from bilevel.training import candidate_recall, expert_loads, heldout_loss

LENGTHS = (512, 1024, 2048)


def read_log(run: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def without_level1(model: CausalLM) -> CausalLM:
    """The same weights with every visible block a candidate: what level 1's shortlist costs is the difference."""
    config = dataclasses.replace(model.config, routing=dataclasses.replace(model.config.routing, preset="moba_gqa"))
    free = CausalLM(config)
    free.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "word_router" not in name})
    return free


def with_every_block(model: CausalLM) -> CausalLM:
    """The same weights with ordinary attention over every token."""
    dense = CausalLM(dataclasses.replace(model.config, routing=Routing(preset="dense")))
    dense.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "word_router" not in name})
    return dense


def evaluate(two_level: CausalLM, dense: CausalLM, tokens: np.ndarray) -> dict[str, Any]:
    """Losses at every length, recall at the shortest and the longest, expert loads; each over the whole held-out text."""
    models = {
        "two_level": two_level,
        "dense_twin": dense,
        "two_level_weights_without_level1": without_level1(two_level),
        "two_level_weights_dense_attention": with_every_block(two_level),
    }
    losses: dict[str, Any] = {}
    for length in LENGTHS:
        windows = torch.from_numpy(corpus.cut(tokens, length))
        values = {name: heldout_loss(model, windows) for name, model in models.items()}
        losses[str(length)] = {
            "tokens": values["dense_twin"][1],
            **{name: round(value[0], 4) for name, value in values.items()},
        }
    recall = {}
    for length in (LENGTHS[0], LENGTHS[-1]):
        layers = candidate_recall(two_level, torch.from_numpy(corpus.cut(tokens, length))[:, :-1])
        recall[str(length)] = [_rounded(dataclasses.asdict(layer)) for layer in layers]
    windows = torch.from_numpy(corpus.cut(tokens, LENGTHS[0]))[:, :-1]
    load = {
        name: {str(layer): [round(share, 4) for share in shares] for layer, shares in expert_loads(model, windows).items()}
        for name, model in (("two_level", two_level), ("dense_twin", dense))
    }
    return {"heldout_nats_per_token": losses, "level1_recall": recall, "expert_load": load}


def _rounded(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: a share of no choices is null."""
    return {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}


def describe(two_level: Path, dense: Path, models: dict[str, CausalLM], tokens: np.ndarray) -> dict[str, Any]:
    """What was trained, and on what."""
    plans = [torch.load(run / "state.pt", weights_only=True)["plan"] for run in (two_level, dense)]
    if plans[0] != plans[1]:
        raise CheckpointError(f"{two_level} followed the plan {plans[0]} and {dense} the plan {plans[1]}; train both alike")
    train = np.load(two_level / "data" / "train.npy", mmap_mode="r")
    text = (two_level / "data" / "heldout.txt").read_bytes()
    return {
        "training": {
            **plans[0],
            "tokens_seen": plans[0]["tokens_per_step"] * plans[0]["steps"],
            "tokens_in_text": len(train),
            "text": f"standard library of Python {platform.python_version()}",
            "torch": torch.__version__,
        },
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "heldout_text": {"file": "heldout.txt", "bytes": len(text), "tokens": len(tokens)},
    }


def draw(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Both models' training loss (mean of 20 logged steps, drawn at their middle) and held-out loss by step, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, log), colour in zip(logs.items(), ("tab:blue", "tab:orange"), strict=True):
        window = np.ones(min(20, len(log))) / min(20, len(log))
        step, loss = (np.convolve([line[key] for line in log], window, mode="valid") for key in ("step", "cross_entropy"))
        axes.plot(step, loss, color=colour, alpha=0.5, label=f"{name}, training")
        marked = [(line["step"], line["heldout"]) for line in log if "heldout" in line]
        axes.plot(*zip(*marked, strict=True), "o-", color=colour, markersize=3, label=f"{name}, held-out ({marked[-1][1]:.3f})")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)", title="Two-level routing and its dense twin")
    axes.set_ylim(top=6.5)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare a two-level run with its dense twin.")
    for name in ("two_level", "dense", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    try:
        two_level, dense = load_model(options.two_level / "model"), load_model(options.dense / "model")
        tokens = np.load(options.two_level / "data" / "heldout.npy")
        report = describe(options.two_level, options.dense, {"two_level": two_level, "dense_twin": dense}, tokens)
        report.update(evaluate(two_level.eval(), dense.eval(), tokens))
        logs = {"two-level": read_log(options.two_level), "dense twin": read_log(options.dense)}
    except BilevelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for path in [*(options.two_level / "model").iterdir(), options.two_level / "data" / "heldout.txt"]:
        (options.out / path.name).write_bytes(path.read_bytes())
    (options.out / "train.jsonl").write_bytes((options.two_level / "log.jsonl").read_bytes())
    (options.out / "dense_train.jsonl").write_bytes((options.dense / "log.jsonl").read_bytes())
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(logs, options.out / "loss_curve.png")
    print(json.dumps(report["heldout_nats_per_token"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
