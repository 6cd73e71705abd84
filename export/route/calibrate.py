"""Which layers stay dense, which keys and which budget, by what hidden facts and repeated passages cost in nats.

A context is read once by the dense model; only the questions behind it are then asked again and again, with one layer after
the other dense or routed. What is found so is judged anew by ``facts.evaluate``, where the context is read routed too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel.config import ModelConfig, Routing
from bilevel.errors import ConfigError
from bilevel.export.route.facts import Score, answer_nats, pack, score
from bilevel.export.route.rows import Case
from bilevel.export.route.walk import Chooser, Choosers, Packed, Prefix, ask, make_choosers, read, word_level
from bilevel.export.route.words import WordLevel
from bilevel.model import CausalLM

# Of gates unless told otherwise: on SmolLM2 blocks of 16 keep the facts of a text that as many tokens in blocks of 64 lose.
GATE_BLOCK = 16
_CONTENDERS = 6  # layers that are tried again after the first round
Gates = Mapping[int, Mapping[str, Tensor]]
# A routing of level 2 -> the same behind level 1, and that level.
Words = Callable[[Routing], tuple[Routing, WordLevel]]


@dataclass(frozen=True)
class Tried:
    """One choice and what it scored, for the log."""

    routing: Routing
    score: Score


@dataclass
class Calibration:
    """The choice, the share of the context's tokens that it reads, and everything that was tried.

    routing: of level 2 alone. whole: with level 1 in front, where there is one.
    """

    routing: Routing
    whole: Routing
    share: float
    dense: Score
    tried: list[Tried] = field(default_factory=list)


def share_read(routing: Routing, num_layers: int, context: int) -> float:
    """The share of ``context`` tokens that a word behind them reads, over all layers."""
    blocks = context / routing.block_size
    dense = len(routing.dense_layers)
    return (dense + (num_layers - dense) * min(1.0, routing.topk / blocks)) / num_layers


def budget(share: float, num_layers: int, dense: int, context: int, block_size: int) -> int:
    """The most blocks per routed layer that keep ``share`` where ``dense`` layers read everything; 0 or less: impossible."""
    return int((share * num_layers - dense) / (num_layers - dense) * (context // block_size) + 1e-9)


class Questioner:
    """The questions of some cases behind contexts that the dense model has read."""

    def __init__(self, model: CausalLM, cases: Sequence[Case]) -> None:
        self.model = model
        self._asked: list[tuple[Case, Packed, Prefix]] = []
        for case in cases:
            prefix = read(model, torch.from_numpy(case.context), {})
            prefix.hidden = None
            self._asked.append((case, pack(case), prefix))

    def score(self, choosers: Choosers) -> Score:
        """What the questions score with these choosers."""
        return self.start(choosers)[0]

    def start(self, choosers: Choosers) -> tuple[Score, list[list[Tensor]]]:
        """The score, and each case's input of every layer."""
        told, streams, words = [], list[list[Tensor]](), word_level(choosers)
        for case, packed, prefix in self._asked:
            streams.append([])
            if words is not None:
                prefix.word_keys = words.read(prefix.ids)[1]
            told += answer_nats(self.model, ask(self.model, prefix, packed, choosers, streams=streams[-1]), case, packed)
        return score(told), streams

    def change(self, choosers: Choosers, streams: list[list[Tensor]], layer: int, cases: int | None = None) -> Score:
        """The score with choosers that differ from those of ``streams`` in ``layer`` alone. cases: of the first ones only."""
        told = []
        for (case, packed, prefix), inputs in list(zip(self._asked, streams, strict=True))[:cases]:
            stream = ask(self.model, prefix, packed, choosers, start=(layer, inputs[layer]))
            told += answer_nats(self.model, stream, case, packed)
        return score(told)


def rank_layers(
    questioner: Questioner, choosers: dict[int, Chooser], count: int, on_stage: Callable[[str], None] = lambda stage: None
) -> list[int]:
    """The ``count`` layers that are most worth being dense: each next one lowers the nats most beside those before it.

    All layers are tried on the first case alone, and the best of them on all cases.
    """
    chosen: list[int] = []
    contenders = list(choosers)
    for place in range(count):
        current = {layer: each for layer, each in choosers.items() if layer not in chosen}
        start = questioner.start(current)
        title = f"dense layer {place + 1} of at most {count}"
        if place == 0:
            contenders = _ordered(questioner, current, start, contenders, 1, title, on_stage)[: _CONTENDERS + count]
        contenders = _ordered(questioner, current, start, contenders, None, title, on_stage)
        chosen.append(contenders[0])
        contenders = contenders[1 : max(1 + _CONTENDERS, count - place)]
    return chosen


def _ordered(
    questioner: Questioner,
    choosers: dict[int, Chooser],
    start: tuple[Score, list[list[Tensor]]],
    layers: Sequence[int],
    cases: int | None,
    title: str,
    on_stage: Callable[[str], None],
) -> list[int]:
    """The layers in the order of the nats that are left when one of them alone becomes dense."""
    before, streams = start
    nats = {}
    for layer in layers:
        on_stage(f"{title}: trying layer {layer} ({before.nats:.3f} nats now)")
        without = {each: chooser for each, chooser in choosers.items() if each != layer}
        nats[layer] = questioner.change(without, streams, layer, cases).nats
    return sorted(layers, key=lambda layer: nats[layer])


def calibrate(
    model: CausalLM,
    cases: Sequence[Case],
    candidates: Sequence[Routing],
    *,
    share: float,
    max_dense: int,
    dense_layers: tuple[int, ...] | None = None,
    gates: Gates | None = None,
    words: Words | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Calibration:
    """The routing of least nats that reads at most ``share`` of the contexts' tokens.

    candidates: kinds of keys and block sizes to choose among; the first one's layers are ranked, and all share its dense
    layers. max_dense: most layers that may stay dense. dense_layers: these and no others. words: puts level 1 in front of the
    kind of keys and block size that were chosen, whose numbers of dense layers are then compared anew. Raises ConfigError.
    """
    config, context = model.config, len(cases[0].context)
    layers = config.num_hidden_layers
    first = check_share(config, candidates[0], share, context, dense_layers)
    usual = _with_budget(candidates[0], share, layers, min(max_dense, 2), context) or first
    on_stage(f"reading {len(cases)} contexts of {context} tokens")
    questioner = Questioner(model, cases)
    if dense_layers is None:
        ranked = rank_layers(questioner, make_choosers(config, usual, gates), max_dense, on_stage)
        options = [tuple(ranked[:count]) for count in range(max_dense + 1)]
    else:
        options = [dense_layers]
    tried: list[Tried] = []

    def attempt(candidate: Routing, dense: tuple[int, ...]) -> None:
        routing = _with_budget(candidate, share, layers, len(dense), context)
        if routing is not None:
            routing = dataclasses.replace(routing, dense_layers=tuple(sorted(dense)))
            on_stage(f"trying {routing.key} keys, {routing.topk} blocks of {routing.block_size}, {len(dense)} dense layers")
            tried.append(Tried(routing, questioner.score(make_choosers(config, routing, gates))))

    for dense in options:
        attempt(candidates[0], dense)
    best = min(tried, key=lambda each: each.score.nats)
    for candidate in candidates[1:]:
        attempt(candidate, best.routing.dense_layers)
    best = min(tried, key=lambda each: each.score.nats)
    if (best.routing.key, best.routing.block_size) != (candidates[0].key, candidates[0].block_size):
        for dense in options:
            if set(dense) != set(best.routing.dense_layers):
                attempt(best.routing, dense)
        best = min(tried, key=lambda each: each.score.nats)
    whole = best.routing
    if words is not None:
        kind = (best.routing.key, best.routing.block_size)
        alike = [each.routing for each in tried if (each.routing.key, each.routing.block_size) == kind]
        behind = []
        for routing in alike:
            on_stage(
                f"trying {routing.topk} blocks of {routing.block_size} behind words, {len(routing.dense_layers)} dense layers"
            )
            whole, level = words(routing)
            behind.append((routing, Tried(whole, questioner.score(make_choosers(config, whole, gates, level)))))
        chosen, judged = min(behind, key=lambda pair: pair[1].score.nats)
        best, whole = dataclasses.replace(best, routing=chosen), judged.routing
        tried += [each for _, each in behind]
    return Calibration(best.routing, whole, share_read(best.routing, layers, context), questioner.score({}), tried)


def starting_routing(key: str, block_size: int) -> Routing:
    """Local blocks: at least the word's own and the one before it, and at least 48 tokens."""
    local = 1 + max(1, -(-48 // block_size))
    return Routing(preset="moba_gqa", key=key, block_size=block_size, local_blocks=local)


def check_share(
    config: ModelConfig, candidate: Routing, share: float, context: int, dense_layers: tuple[int, ...] | None
) -> Routing:
    """The routing with the blocks that the share allows beside the dense layers (None: beside none). Raises ConfigError."""
    named = dense_layers or ()
    dataclasses.replace(config, routing=dataclasses.replace(candidate, dense_layers=named))  # which names what does not exist
    routing = _with_budget(candidate, share, config.num_hidden_layers, len(named), context)
    if routing is None:
        least = candidate.init_blocks + candidate.local_blocks + 1
        beside = f" beside {len(named)} dense ones" if named else ""
        raise ConfigError(
            f"--share {share} of {context} tokens is less than {least} blocks of {candidate.block_size} in every layer{beside}"
            "; raise it, or give smaller blocks by --block-size"
        )
    return routing


def _with_budget(routing: Routing, share: float, layers: int, dense: int, context: int) -> Routing | None:
    """The routing with as many blocks as the share allows beside ``dense`` dense layers; None where that leaves no choice."""
    topk = budget(share, layers, dense, context, routing.block_size) if dense < layers else 0
    if topk <= routing.init_blocks + routing.local_blocks:
        return None
    return dataclasses.replace(routing, topk=topk, dense_layers=())
