"""From a dense checkpoint to an adapter: ``route`` without training, or with gates that are trained; resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bilevel.checkpoint import Checkpoint
from bilevel.config import ModelConfig, Routing
from bilevel.errors import CheckpointError, ConfigError
from bilevel.export.route import texts
from bilevel.export.route.adapter import Adapter, describe_base
from bilevel.export.route.calibrate import Calibration, calibrate, check_share, share_read
from bilevel.export.route.distil import measure, step
from bilevel.export.route.facts import Score, evaluate
from bilevel.export.route.gates import GateStack
from bilevel.export.route.rows import Case, evaluation_case, training_row
from bilevel.export.route.teacher import lesson, read_lesson, write_lesson
from bilevel.export.route.walk import make_choosers
from bilevel.export.route.words import WordLevel, fit_words, with_words
from bilevel.export.route.work import Plan, Work
from bilevel.model import CausalLM
from bilevel.training import learning_rate

HELDOUT_ROWS = 16  # lessons from held-out documents, which measure and do not train
_LENGTHS, _SHARES = (2048, 4096, 8192), (0.65, 0.30, 0.05)
_WORDS = 440  # per row
_MEASURE_UPDATES = 50
_WARMUP = 20
_COUNTED = 2_000_000  # tokens in which words are counted
_MAX_DENSE = 4  # most layers that a calibration leaves dense, of 30; a seventh of the layers


@dataclass(frozen=True)
class Options:
    """What the user decides (``bilevel route --help`` explains them). block_size, dense_layers: None: found by calibration.
    words: the share of the context's blocks that level 1 proposes; None: no level 1."""

    method: str = "bounds"
    text: tuple[Path, ...] = ()
    share: float = 0.25
    context: int = 4096
    block_size: int | None = None
    dense_layers: tuple[int, ...] | None = None
    key: str | None = None
    words: float | None = None
    rows: int = 400
    passes: int = 6
    seed: int = 0
    save_seconds: float = 45.0


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


def fast_precision() -> torch.dtype:
    """bfloat16 where this machine multiplies it at least half again as fast as float32."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.randn(1024, 1024, dtype=dtype)
        x @ x
        best = 1e9
        for _ in range(3):
            started = time.perf_counter()
            x @ x
            best = min(best, time.perf_counter() - started)
        return best

    return torch.bfloat16 if seconds(torch.bfloat16) * 1.5 < seconds(torch.float32) else torch.float32


def route(checkpoint: Path, work: Path, options: Options, report: Report | None = None) -> Adapter:
    """The adapter that routes the dense model in ``checkpoint``. ``work``: the folder of a run that trains."""
    report = report or Report()
    started = time.monotonic()
    largest = max(each.block_size for each in _candidates(options))
    whole = dataclasses.replace(options, context=options.context - options.context % largest)  # of blocks
    if options.method == "bounds":
        source = open_source(checkpoint, options, fast_precision(), report)
        _check(source, whole, _candidates(options)[0])
        found = _calibrated(source, whole, _candidates(options), None, report)
        gates: dict[int, dict[str, torch.Tensor]] = {}
        log: dict[str, Any] = {}
    else:
        source, stack, log = _trained(checkpoint, work, options, report)
        gates = {layer: stack.state(layer) for layer in stack.layers}
        found = _calibrated(source, whole, _candidates(options), gates, report)
    options = whole
    routing, words, level = found.routing, dict[str, torch.Tensor](), None
    if options.words is not None:
        report.stage("weighing words for level 1")
        routing = with_words(routing, source.config, options.words, options.context)
        table = source.model.model.embed_tokens.weight.float()
        words = fit_words(table, source.encoded(), dataclasses.replace(source.config, routing=routing))
        level = WordLevel.of(dataclasses.replace(source.config, routing=routing), words, table)
    report.stage("judging the result on other facts")
    cases = source.cases(options.context, options.seed + 1, 2, 16)
    scores = {"dense": evaluate(source.model, cases, {})}
    if level is not None:
        scores["without words"] = evaluate(source.model, cases, make_choosers(source.config, found.routing, gates or None))
    scores["routed"] = evaluate(source.model, cases, make_choosers(source.config, routing, gates or None, level))
    log |= {
        "method": options.method,
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
        "precision": str(source.model.lm_head.weight.dtype).removeprefix("torch."),
        "context": options.context,
        "share": round(found.share, 4),
        "calibration": [{"routing": _section(each.routing), "score": dataclasses.asdict(each.score)} for each in found.tried],
        "judgement": {name: dataclasses.asdict(score) for name, score in scores.items()},
    }
    return Adapter(routing, source.base, gates, log, words)


def _section(routing: Routing) -> dict[str, Any]:
    return {name: getattr(routing, name) for name in ("key", "block_size", "topk", "dense_layers")}


def _candidates(options: Options) -> list[Routing]:
    """Kinds of keys and sizes of blocks to choose among, the first of which ranks the layers.

    Gates that were trained on blocks of 64 choose smaller ones well too (SmolLM2: better, for the same number of tokens).
    """
    sizes = (options.block_size,) if options.block_size else (64, 32, 16)
    keys = (options.key,) if options.key else ("gate",) if options.method == "gate" else ("bounds", "mean")
    return [starting_routing(key, size) for size in sizes for key in keys]


def starting_routing(key: str, block_size: int) -> Routing:
    """Local blocks: at least the word's own and the one before it, and at least 48 tokens."""
    local = 1 + max(1, -(-48 // block_size))
    return Routing(preset="moba_gqa", key=key, block_size=block_size, local_blocks=local)


def _check(source: Source, options: Options, candidate: Routing) -> None:
    """What a calibration would refuse is refused before hours of training."""
    check_share(source.config, candidate, options.share, options.context, options.dense_layers)


def _calibrated(source: Source, options: Options, candidates: Sequence[Routing], gates: Any, report: Report) -> Calibration:
    return calibrate(
        source.model,
        source.cases(options.context, options.seed, 2, 12),
        candidates,
        share=options.share,
        max_dense=max(1, round(source.config.num_hidden_layers * _MAX_DENSE / 30)),
        dense_layers=options.dense_layers,
        gates=gates,
        on_stage=report.stage,
    )


def _trained(checkpoint: Path, work_folder: Path, options: Options, report: Report) -> tuple[Source, GateStack, dict[str, Any]]:
    """Gates for every layer, trained as far as the plan says; goes on where an earlier run was killed."""
    precision = Work.precision_of(work_folder) or str(fast_precision()).removeprefix("torch.")
    source = open_source(checkpoint, options, getattr(torch, precision), report)
    routing = dataclasses.replace(starting_routing("gate", options.block_size or 64), topk=8)
    _check(source, options, routing)
    config = dataclasses.replace(source.config, routing=routing)
    longest = source.config.max_position_embeddings
    lengths = tuple(length for length in _LENGTHS if length <= longest) or (longest,)
    lengths = tuple(length - length % routing.block_size for length in lengths)
    digest = hashlib.sha256("".join(source.training).encode()).hexdigest()
    plan = Plan(
        base=source.base["sha256"], texts=digest, seed=options.seed, rows=options.rows, lengths=lengths, words=_WORDS,
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


def summary(adapter: Adapter, config: ModelConfig) -> dict[str, Any]:
    """What was chosen and what it costs, for people and programs."""
    log = adapter.log
    dense, routed = (Score(**log["judgement"][name]) for name in ("dense", "routed"))
    return {
        "routing": dataclasses.asdict(adapter.routing),
        "share": share_read(adapter.routing, config.num_hidden_layers, log["context"]),
        "context": log["context"],
        "dense": dataclasses.asdict(dense),
        "routed": dataclasses.asdict(routed),
        "seconds": log["seconds"],
    }
