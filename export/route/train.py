"""Training gates: the teacher reads, the gates learn from what it wrote; resumable after a kill at any moment."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bilevel.config import ModelConfig
from bilevel.export.route.calibrate import GATE_BLOCK, check_share, starting_routing
from bilevel.export.route.distil import measure, step
from bilevel.export.route.gates import GateStack
from bilevel.export.route.rows import training_row
from bilevel.export.route.source import Options, Report, Source, fast_precision, open_source
from bilevel.export.route.teacher import lesson, read_lesson, write_lesson
from bilevel.export.route.work import Plan, Work
from bilevel.training import learning_rate

HELDOUT_ROWS = 16  # lessons from held-out documents, which measure and do not train
_LENGTHS, _SHARES = (2048, 4096, 8192), (0.65, 0.30, 0.05)
_WORDS = 440  # per row
_MEASURE_UPDATES = 50
_WARMUP = 20


def train_gates(
    checkpoint: Path, work_folder: Path, options: Options, share: float, report: Report
) -> tuple[Source, GateStack, dict[str, Any]]:
    """Gates for every layer, trained as far as the plan says; goes on where an earlier run was killed."""
    precision = Work.precision_of(work_folder) or str(fast_precision()).removeprefix("torch.")
    source = open_source(checkpoint, options, getattr(torch, precision), report)
    routing = dataclasses.replace(starting_routing("gate", options.block_size or GATE_BLOCK), topk=8)
    check_share(source.config, routing, share, options.context, options.dense_layers)  # before hours of training
    config = dataclasses.replace(source.config, routing=routing)
    longest = source.config.max_position_embeddings
    lengths = tuple(length for length in _LENGTHS if length <= longest) or (longest,)
    lengths = tuple(length - length % routing.block_size for length in lengths)
    plan = Plan(
        base=source.base["sha256"], texts=source.digest, seed=options.seed, rows=options.rows, lengths=lengths, words=_WORDS,
        block_size=routing.block_size, passes=options.passes, rows_per_update=2, peak=3e-3, power=1.0, precision=precision,
    )  # fmt: skip
    work = Work(work_folder, plan)
    _teach(source, config, work, report)
    gates = _train(config, work, options.save_seconds, report)
    return source, gates, {"plan": dataclasses.asdict(plan), "training": work.read_log()}


def _teach(source: Source, config: ModelConfig, work: Work, report: Report) -> None:
    """Write every lesson that is not there yet."""
    plan, total = work.plan, HELDOUT_ROWS + work.plan.rows
    shares = np.array(_SHARES[: len(plan.lengths)])
    work.lesson(0).parent.mkdir(exist_ok=True)
    for index in range(total):
        report.advance("reading", index, total, f"row {index + 1} of {total}")
        if work.lesson(index).exists():
            continue
        rng = np.random.default_rng([plan.seed, index, 2])
        length = int(rng.choice(plan.lengths, p=shares / shares.sum()))
        documents = source.heldout if index < HELDOUT_ROWS else source.training
        row = training_row(documents, source.tokenizer, length, plan.seed, index)
        write_lesson(work.lesson(index), lesson(source.model, config, row, plan.words, rng))
    report.advance("reading", total, total, "")


def _train(config: ModelConfig, work: Work, save_seconds: float, report: Report) -> GateStack:
    """Every update of the plan, from the last state on."""
    plan = work.plan
    torch.manual_seed(plan.seed)
    gates = GateStack(config, range(config.num_hidden_layers))
    optimizer = torch.optim.AdamW(gates.parameters(), lr=plan.peak, weight_decay=0.0, betas=(0.9, 0.98))
    first = work.restore(gates, optimizer)
    heldout = [read_lesson(work.lesson(index)) for index in range(min(HELDOUT_ROWS, 8))]
    saved = time.monotonic()
    if first == 0:
        _measured(gates, heldout, work, 0, None)
    for update in range(first, plan.updates):
        value = _update(gates, optimizer, work, update)
        done = update + 1
        report.advance("training", done, plan.updates, f"loss {value:.3f}")
        if done % _MEASURE_UPDATES == 0 or done == plan.updates:
            _measured(gates, heldout, work, done, value)
        if time.monotonic() - saved >= save_seconds or done == plan.updates:
            work.save(done, gates, optimizer)
            saved = time.monotonic()
    return gates


def _update(gates: GateStack, optimizer: torch.optim.Optimizer, work: Work, update: int) -> float:
    """One step of AdamW; which rows it sees depends on its number and the seed alone."""
    plan, value = work.plan, 0.0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(update, plan.updates, peak=plan.peak, warmup=min(_WARMUP, plan.updates // 2))
    for place in range(update * plan.rows_per_update, (update + 1) * plan.rows_per_update):
        turn, index = divmod(place, plan.rows)
        order = np.random.default_rng([plan.seed, turn, 3]).permutation(plan.rows)
        part = step(gates, read_lesson(work.lesson(HELDOUT_ROWS + int(order[index]))), power=plan.power) / plan.rows_per_update
        part.backward()
        value += part.item()
    torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return value


def _measured(gates: GateStack, heldout: list[dict[str, torch.Tensor]], work: Work, update: int, value: float | None) -> None:
    """Write a line of the log: how well the gates choose on held-out rows; at the end head by head."""
    found = measure(gates, heldout)
    line: dict[str, Any] = {"update": update, "recall": round(found.recall, 4), "needle": round(found.needle, 4)}
    if value is not None:
        line["loss"] = round(value, 4)
    if update in (0, work.plan.updates):
        line["needle_heads"] = [[round(share, 3) for share in heads] for heads in found.needle_heads.tolist()]
    work.write_log(line)
