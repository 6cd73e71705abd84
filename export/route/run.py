"""From a dense checkpoint to an adapter: calibrated, with gates that are trained or given, and low-rank updates on top."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.config import ModelConfig, Routing
from bilevel.errors import CheckpointError
from bilevel.export.route.adapter import LOG, Adapter, check_base, load_adapter
from bilevel.export.route.calibrate import GATE_BLOCK, Calibration, calibrate, check_share, share_read, starting_routing
from bilevel.export.route.facts import Score, evaluate
from bilevel.export.route.source import Options, Report, Source, fast_precision, open_source
from bilevel.export.route.train import train_gates
from bilevel.export.route.tune import apply, precision_of, tune
from bilevel.export.route.walk import make_choosers
from bilevel.export.route.words import WordLevel, fit_words, with_words
from bilevel.export.route.work import check_empty

_MAX_DENSE = 4  # most layers that a calibration leaves dense, of 30; a seventh of the layers
_SHARE = 0.25


@dataclass
class _Found:
    """What a run has so far. routing: without level 1 (blocks) and with it, where there is one (whole)."""

    blocks: Routing
    whole: Routing
    gates: dict[int, dict[str, Tensor]]
    words: dict[str, Tensor] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)


def route(checkpoint: Path, work: Path, options: Options, report: Report | None = None) -> Adapter:
    """The adapter that routes the dense model in ``checkpoint``. ``work``: the folder of a run that trains."""
    report = report or Report()
    started = time.monotonic()
    if options.tune and options.method != "gate":
        check_empty(work)
    start = None if options.start is None else load_adapter(options.start)
    if start is None:
        source, found = _from_nothing(checkpoint, work, options, report)
    else:
        check_base(start, checkpoint)
        asked, options = options, dataclasses.replace(options, block_size=options.block_size or start.routing.block_size)
        source, found = _from_adapter(checkpoint, start, work, asked, options, report)
    config, length = source.config, _whole(options).context
    level = None
    if found.words:
        table = source.model.model.embed_tokens.weight.float()
        level = WordLevel.of(dataclasses.replace(config, routing=found.whole), found.words, table)
    report.stage("judging the result on other facts")
    cases = source.cases(length, options.seed + 1, 2, 16)
    gates = found.gates or None
    scores = {"dense": evaluate(source.model, cases, {})}
    if level is not None:
        scores["without words"] = evaluate(source.model, cases, make_choosers(config, found.blocks, gates))
    scores["routed"] = evaluate(source.model, cases, make_choosers(config, found.whole, gates, level))
    tuned: dict[str, Tensor] = {}
    if options.tune:
        tuned, found.log["tuning"] = tune(source, found.whole, found.gates, found.words, work, options, report)
        report.stage("judging the tuned model")
        apply(source.model, tuned)
        scores["untuned"] = scores["routed"]
        scores["routed"] = evaluate(source.model, cases, make_choosers(config, found.whole, gates, level))
    found.log |= {
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
        "precision": source.precision,
        "context": length,
        "share": round(share_read(found.whole, config.num_hidden_layers, length), 4),
        "judgement": {name: dataclasses.asdict(score) for name, score in scores.items()},
    }
    return Adapter(found.whole, source.base, found.gates, found.log, found.words, tuned)


def _from_nothing(checkpoint: Path, work: Path, options: Options, report: Report) -> tuple[Source, _Found]:
    if options.method == "bounds":
        source = open_source(checkpoint, options, precision_of(work) or fast_precision(), report)
        check_share(source.config, _candidates(options)[0], _share(options), _whole(options).context, options.dense_layers)
        gates: dict[int, dict[str, Tensor]] = {}
        log: dict[str, Any] = {}
    else:
        source, stack, log = train_gates(checkpoint, work, options, _share(options), report)
        gates = {layer: stack.state(layer) for layer in stack.layers}
    level = None if options.words is None else _Words(source, options.words, _whole(options).context, report)
    calibration = _calibrated(source, options, _candidates(options), gates or None, level, report)
    log = {"method": options.method, **log, **_tried(calibration)}
    words = {} if level is None else level.parameters(calibration.whole)
    return source, _Found(calibration.routing, calibration.whole, gates, words, log)


def _from_adapter(
    checkpoint: Path, start: Adapter, work: Path, asked: Options, options: Options, report: Report
) -> tuple[Source, _Found]:
    """The adapter as it is, or its gates calibrated anew where the user asks for another share, block size or dense layers.

    options: as asked for, with the adapter's block size where none was.
    """
    if start.tuned:
        raise CheckpointError(
            f"{options.start} is tuned already, for the choice that it makes; start from the adapter before that"
        )
    source = open_source(checkpoint, options, precision_of(work) or fast_precision(), report)
    routing, context = start.routing, _whole(options).context
    blocks = dataclasses.replace(routing, preset="moba_gqa", **_NO_WORDS) if start.words else routing
    found = _Found(blocks, routing, start.gates, start.words, _log_of(options.start))
    proposed = routing.coarse_topk * routing.block_size / context if start.words else None
    share = options.words if options.words is not None else proposed
    level = None if share is None else _Words(source, share, context, report)
    if level is not None and start.words and options.words is None:
        level.made[routing.block_size] = dict(start.words)
    if any(each is not None for each in (asked.share, asked.block_size, asked.dense_layers)):
        candidates = [starting_routing(routing.key, options.block_size or routing.block_size)]
        calibration = _calibrated(source, options, candidates, start.gates or None, level, report)
        found.blocks, found.whole = calibration.routing, calibration.whole
        found.log |= _tried(calibration)
    elif options.words is not None and level is not None:
        found.whole, _ = level(found.blocks)
    else:
        return source, found
    found.words = {} if level is None else level.parameters(found.whole)
    return source, found


class _Words:
    """Level 1 in front of any choice of blocks; what it is made of depends on their size alone.

    made: the parameters by block size, as far as there are any yet.
    """

    def __init__(self, source: Source, share: float, context: int, report: Report) -> None:
        self._source, self._share, self._context, self._report = source, share, context, report
        self._table = source.model.model.embed_tokens.weight.float()
        self.made: dict[int, dict[str, Tensor]] = {}

    def __call__(self, routing: Routing) -> tuple[Routing, WordLevel]:
        config = self._source.config
        whole = with_words(routing, config, self._share, self._context)
        return whole, WordLevel.of(dataclasses.replace(config, routing=whole), self.parameters(whole), self._table)

    def parameters(self, whole: Routing) -> dict[str, Tensor]:
        """Level 1's, of a routing with it."""
        if whole.block_size not in self.made:
            self._report.stage("weighing words for level 1")
            config = dataclasses.replace(self._source.config, routing=whole)
            self.made[whole.block_size] = fit_words(self._table, self._source.encoded(), config)
        return self.made[whole.block_size]


_NO_WORDS: dict[str, Any] = {
    each.name: each.default
    for each in dataclasses.fields(Routing)
    if each.name in ("coarse_topk", "coarse_local_blocks", "window", "route_dim", "weighted_words")
}


def _log_of(folder: Path | None) -> dict[str, Any]:
    """What an adapter tells of how it was made."""
    path = None if folder is None else folder / LOG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.is_file() else {}
    except (ValueError, TypeError):
        return {}


def _tried(calibration: Calibration) -> dict[str, Any]:
    names = ("preset", "key", "block_size", "topk", "dense_layers")
    return {
        "calibration": [
            {"routing": {name: getattr(each.routing, name) for name in names}, "score": dataclasses.asdict(each.score)}
            for each in calibration.tried
        ]
    }


def _share(options: Options) -> float:
    return _SHARE if options.share is None else options.share


def _whole(options: Options) -> Options:
    """With a context of whole blocks."""
    largest = max(each.block_size for each in _candidates(options))
    return dataclasses.replace(options, context=options.context - options.context % largest)


def _candidates(options: Options) -> list[Routing]:
    """Kinds of keys and sizes of blocks to choose among, the first of which ranks the layers."""
    if options.method == "gate":
        return [starting_routing("gate", options.block_size or GATE_BLOCK)]
    sizes = (options.block_size,) if options.block_size else (64, 32, 16)
    keys = (options.key,) if options.key else ("bounds", "mean")
    return [starting_routing(key, size) for size in sizes for key in keys]


def _calibrated(
    source: Source, options: Options, candidates: Sequence[Routing], gates: Any, words: _Words | None, report: Report
) -> Calibration:
    return calibrate(
        source.model,
        source.cases(_whole(options).context, options.seed, 2, 12),
        candidates,
        share=_share(options),
        max_dense=max(1, round(source.config.num_hidden_layers * _MAX_DENSE / 30)),
        dense_layers=options.dense_layers,
        gates=gates,
        words=words,
        on_stage=report.stage,
    )


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
