"""What an adapter finds, beside the dense model and untrained keys: ``python examples/route_report.py BASE ADAPTER OUT``.

At every context and share, with the dense layers given for that share: hidden facts found, nats of their answers, of passages
said before and of the text, and how much of the attention to the answers' places the choice keeps. Writes ``report.json`` and,
for an adapter that was trained, ``curve.png`` into OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot

from bilevel.config import Routing
from bilevel.errors import BilevelError, ConfigError
from bilevel.export.route.adapter import LOG, Adapter, load_adapter
from bilevel.export.route.calibrate import budget, share_read, starting_routing
from bilevel.export.route.facts import evaluate
from bilevel.export.route.needles import needles
from bilevel.export.route.rows import Case
from bilevel.export.route.source import Options, Source, fast_precision, open_source
from bilevel.export.route.source import Report as Stages
from bilevel.export.route.walk import make_choosers
from bilevel.folders import write_json

SEED = 77  # of the cases: neither the training's nor the calibration's
STRONGEST = 8  # heads that are listed


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is measured: a share, the layers that stay dense under it, tokens per block (0: the adapter's), kinds of keys."""

    share: float
    dense: tuple[int, ...]
    block_size: int = 0
    keys: tuple[str, ...] = ("gate", "bounds", "mean")

    @classmethod
    def parse(cls, text: str) -> Arm:
        """``0.22:7,17,18:16:gate,mean``, from the end of which parts may be left out."""
        share, layers, size, keys = [*text.split(":"), "", "", ""][:4]
        dense = tuple(int(layer) for layer in layers.split(",") if layer)
        return cls(float(share), dense, int(size or 0), tuple(keys.split(",")) if keys else cls.keys)


def routings(adapter: Adapter, num_layers: int, context: int, arm: Arm) -> list[Routing]:
    """The kinds of keys with as many blocks as the share allows."""
    base = starting_routing("gate", arm.block_size or adapter.routing.block_size)
    topk = budget(arm.share, num_layers, len(arm.dense), context, base.block_size)
    if topk <= base.init_blocks + base.local_blocks:
        raise ConfigError(
            f"{arm.share} of {context} tokens leaves {topk} blocks beside {len(arm.dense)} dense layers; give fewer layers"
        )
    chosen = dataclasses.replace(base, topk=topk, dense_layers=arm.dense)
    return [dataclasses.replace(chosen, key=key) for key in arm.keys if key != "gate" or adapter.gates]


def measure(source: Source, adapter: Adapter, cases: list[Case], routing: Routing | None) -> dict[str, Any]:
    """One choice on some cases; no routing: the dense model."""
    if routing is None:
        return {"key": "dense", "share": 1.0, **_rounded(dataclasses.asdict(evaluate(source.model, cases, {})))}
    choosers = make_choosers(source.config, routing, adapter.gates if routing.key == "gate" else None)
    kept = needles(source.model, cases[:1], choosers)
    return {
        "key": routing.key,
        "blocks": routing.topk,
        "block_size": routing.block_size,
        "dense_layers": routing.dense_layers,
        "share": round(share_read(routing, source.config.num_hidden_layers, len(cases[0].context)), 4),
        **_rounded(dataclasses.asdict(evaluate(source.model, cases, choosers))),
        "needle_mass_kept": round(kept.total, 4),
        "needle_mass_kept_by_head": {
            f"{layer}.{head}": round(float(kept.kept[layer, head]), 3) for layer, head in kept.strongest(STRONGEST)
        },
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def draw(log: dict[str, Any], path: Path) -> None:
    """Recall and needle mass of held-out rows against updates; a single update's loss depends on its rows' lengths too much."""
    lines = log["training"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("recall", "of the attention's peaks"), ("needle", "of the answers' blocks, weighted by their peaks")):
        axes.plot([line["update"] for line in lines], [line[name] for line in lines], label=label)
    axes.set_xlabel("updates")
    axes.set_ylabel("share that the gates choose, held-out rows")
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="What an adapter of bilevel route finds, beside dense and untrained keys.")
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--contexts", default="4096,8192", help="tokens (default 4096,8192)")
    parser.add_argument("--arm", action="append", metavar="SHARE[:LAYERS[:SIZE[:KEYS]]]", help="a share; repeatable")
    parser.add_argument("--cases", type=int, default=2, help="contexts of 16 hidden facts each (default 2)")
    parser.add_argument("--fp32", action="store_true", help="not bfloat16, where that is faster")
    options = parser.parse_args(arguments)
    try:
        adapter = load_adapter(options.adapter)
        longest = max(int(length) for length in options.contexts.split(","))
        precision = torch.float32 if options.fp32 else fast_precision()
        source = open_source(options.base, Options(context=longest), precision, Stages())
        arms = [Arm.parse(arm) for arm in options.arm or ()] or [Arm(0.22, adapter.routing.dense_layers)]
        report: dict[str, Any] = {"precision": str(precision).removeprefix("torch."), "contexts": {}}
        options.out.mkdir(parents=True, exist_ok=True)
        for length in map(int, options.contexts.split(",")):
            cases = source.cases(length, SEED, options.cases, 16)
            chosen = [r for arm in arms for r in routings(adapter, source.config.num_hidden_layers, length, arm)]
            rows = report["contexts"].setdefault(str(length), [])
            for routing in (None, *chosen):
                rows.append(measure(source, adapter, cases, routing))
                print(length, json.dumps(rows[-1]), file=sys.stderr, flush=True)
                write_json(options.out / "report.json", report)
        log = json.loads((options.adapter / LOG).read_text(encoding="utf-8"))
        if log.get("training"):
            draw(log, options.out / "curve.png")
    except (BilevelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
