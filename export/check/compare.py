"""What one call of one part of the graph gave, against PyTorch: operands and outputs as computation, choices as selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.bundle.cache_rows import CacheRows
from bilevel.config import ModelConfig
from bilevel.export.check.choices import block_choice, expert_choices, expert_weights, is_proper
from bilevel.export.check.graph_parts import ROUNDING, Part, RoutedNode
from bilevel.export.check.judge import WRONG, Array, Computation, Rows, ScoredChoices, Selection, judge_selection, loosen
from bilevel.export.check.layered import Passage, TextCall
from bilevel.export.check.structure import expected_attributes
from bilevel.export.graph.nodes import ATTENTION
from bilevel.export.graph.sessions import Arrays
from bilevel.export.report.judgements import Level, RouterResult, TensorResult
from bilevel.model import hidden_name
from bilevel.state import Trace

# What a report calls the entries of one part of the graph (behind the layer), in the order in which the graph computes them.
PARTS = (
    "embedding",
    "level 1 query",
    "level 1 block keys",
    "level 1",
    "level 2 query",
    "keys",
    "values",
    "level 2 block keys",
    "level 2",
    "attention",
    "experts logits",
    "experts group logits",
    "experts",
    "experts weights",
    "expert output",
    "output",
    "logits",
)
_LEVELS: dict[str, Level] = {"level 1": 1, "level 2": 2, "experts": "experts"}


@dataclass(frozen=True)
class Where:
    """One call under one execution. layer: None for the words and the head."""

    layer: int | None
    execution: str
    number: int
    call: TextCall

    @property
    def valid(self) -> Array:
        """bool [B, L]: the tokens of the call that are no padding."""
        return np.arange(self.call.ids.shape[1]) < self.call.new[:, None]


@dataclass
class Entry:
    """One line of the report: what it is called, where it stands, which operator made it, and the numbers.

    value: the graph's name for what failed first; first: where it did; sides: a failed tensor, (PyTorch's in fp64, the
    graph's). message: why the graph's part could not run.
    """

    name: str
    layer: int | None
    part: str
    order: int
    operator: str | None
    judged: Selection | Computation
    value: str = ""
    first: Where | None = None
    sides: tuple[Array, Array] | None = None
    message: str = ""

    def result(self) -> RouterResult | TensorResult:
        """As the report holds it."""
        if isinstance(self.judged, Selection):
            return self.judged.result(self.layer, _LEVELS[self.part], self.order, self.operator or "")
        return self.judged.result(self.layer, self.part, self.order, self.operator)


@dataclass(frozen=True)
class Judged:
    """What one selection did to the rows of one call. mask: bool [B, Hs, L] (experts: [B, 1, L]), the places of the rows."""

    entry: Entry
    where: Where
    mask: Array
    rows: Rows


def numpy(tensor: Any) -> Array:
    """fp64 stays, other floats become fp32, integers stay."""
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach()
    return np.asarray((tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy())


def _tokens(heads: Any, valid: Array) -> Array:
    """[N, H, D]: the valid tokens of [B, H, L, D]."""
    return numpy(heads).swapaxes(1, 2)[valid]


def _written(cache: Array, call: TextCall) -> Array:
    """The entries [B, H, L, D] that a call wrote into a cache [B, H, M, D]."""
    length = call.ids.shape[1]
    return np.stack([row[:, first : first + length] for row, first in zip(cache, call.past, strict=True)])


class Comparison:
    """Collects the entries. on_rows: gets every selection's rows, for whoever wants to know word by word."""

    def __init__(self, config: ModelConfig, precision: str, on_rows: Callable[[Judged], None] = lambda judged: None) -> None:
        self.config, self.precision, self._on_rows = config, precision, on_rows
        self._entries: dict[str, Entry] = {}

    @property
    def entries(self) -> list[Entry]:
        """Every entry, in graph order."""
        return sorted(self._entries.values(), key=lambda entry: entry.order)

    def words(self, where: Where, part: Part, got: Arrays, plain: Passage, exact: Passage) -> None:
        """The embedding and level 1."""
        name, valid = hidden_name(0), where.valid
        self.computed("embedding", where, "Gather", name, got[name][valid], exact.x[valid], plain.x[valid])
        for node in part.nodes:
            if node.op_type == "CoarseRoute" and plain.trace.word_query is not None:
                operands = plain.trace.word_query, plain.trace.word_block_key
                precise = exact.trace.word_query, exact.trace.word_block_key
                self._route("level 1", where, node, got, (operands, precise), plain.step.candidates, None)

    def layer(self, where: Where, part: Part, got: Arrays, plain: Passage, exact: Passage) -> None:
        """One layer, both sides from the same hidden state and with the same choices."""
        valid, index = where.valid, where.layer
        packed = [node for node in part.nodes if node.op_type == ROUNDING]
        for node in packed:
            self._rounded(node, where, got, plain, exact)
        for kind in ("key", "value") if not packed else ():
            name, sides = f"present.{kind}.{index}", (getattr(exact, kind), getattr(plain, kind))
            shown = _tokens(_written(got[name], where.call), valid)
            self.computed(f"{kind}s", where, None, name, shown, *(_tokens(side, valid) for side in sides))
        for node in part.nodes:
            self._routed(node, where, got, plain, exact)
        name = hidden_name((index or 0) + 1)
        self.computed("output", where, "Add", name, got[name][valid], exact.x[valid], plain.x[valid])

    def _rounded(self, node: RoutedNode, where: Where, got: Arrays, plain: Passage, exact: Passage) -> None:
        """A packed cache: every number of this call within half a step of the exact one, every older row as it was.

        What lies within the half step counts as equal: near the middle between two codes either is right.
        """
        kind = "value" if ".value." in node.outputs[0] else "key"
        numbers = numpy(getattr(exact, kind))
        rows, call = CacheRows.of_bytes(got[node.selected[0]].shape[-1], numbers.shape[-1]), where.call
        cache, shown = got[node.selected[0]], rows.unpack(_written(got[node.selected[0]], call)).astype(np.float64)
        allowed = (
            np.abs(numbers).reshape(*numbers.shape[:-1], rows.groups, -1).max(-1) / (2 ** (rows.bits - 1) - 1) * (129 / 256)
        )
        allowed = np.repeat(allowed, rows.width // rows.groups, -1)
        error = shown - numbers
        within = np.where(np.abs(error) <= allowed, numbers, shown - np.sign(error) * allowed)
        before = numpy(plain.trace.packed[0 if kind == "key" else 1])
        for row, past in enumerate(call.past):
            if call.new[row] and not np.array_equal(cache[row, :, :past], before[row, :, :past]):
                within[row] += np.abs(numbers).max()  # wrong beyond every limit
        self.computed(
            f"{kind}s", where, node.op_type, node.selected[0], *(_tokens(side, where.valid) for side in (within, numbers))
        )

    def _routed(self, node: RoutedNode, where: Where, got: Arrays, plain: Passage, exact: Passage) -> None:
        one, two, valid = plain.trace, exact.trace, where.valid
        if node.op_type in ("CoarseRoute", "FineRoute") and one.routes:
            candidates = plain.step.candidates if node.op_type == "FineRoute" else None
            sides = (one.query[0], one.block_key[0]), (two.query[0], two.block_key[0])
            self._route("level 2", where, node, got, sides, one.routes[0], candidates)
        elif node.op_type in ATTENTION and one.attention:
            name = node.outputs[0]
            arrays = (_tokens(x, valid) for x in (got[name], two.attention[0], one.attention[0]))
            self.computed("attention", where, node.op_type, name, *arrays)
        elif node.op_type == "ExpertRoute" and one.expert_ids:
            self._experts(node, where, got, one, two)
        elif node.op_type in ("RoutedExperts", "RoutedExpertsQuantized") and one.expert_out:
            name, flat = node.outputs[0], valid.reshape(-1)
            self.computed(
                "expert output", where, node.op_type, name, got[name][flat], two.expert_out[0][flat], one.expert_out[0][flat]
            )

    def broken(self, where: Where, part: Part, message: str) -> None:
        """A part of the graph that could not run: its output counts as infinitely wrong."""
        names = {"words": "embedding", "head": "logits"}
        entry = self._entry(names.get(part.name, "output"), where.layer, None)
        assert isinstance(entry.judged, Computation)
        entry.judged.error, entry.judged.worst, entry.message = float("inf"), where.execution, message
        self._note(entry, False, where, "")

    def computed(
        self, part: str, where: Where, operator: str | None, value: str, got: Array, exact: Any, plain: Any = None
    ) -> None:
        """Compare one tensor of the graph, whose name there is ``value``."""
        entry = self._entry(part, where.layer, operator)
        assert isinstance(entry.judged, Computation)
        passed = entry.judged.add(where.execution, got, numpy(exact), None if plain is None else numpy(plain))
        if not passed and entry.first is None:
            entry.sides = numpy(exact), got
        self._note(entry, passed, where, value)

    def _entry(self, part: str, layer: int | None, operator: str | None, is_selection: bool = False) -> Entry:
        name = part if layer is None else f"layer {layer} {part}"
        if name not in self._entries:
            judged = Selection(name) if is_selection else Computation(name, self.precision)
            self._entries[name] = Entry(name, layer, part, self.order(part, layer), operator, judged)
        return self._entries[name]

    def order(self, part: str, layer: int | None) -> int:
        """The place of an entry in the graph's order."""
        place = self.config.num_hidden_layers + 1 if part == "logits" else 0 if layer is None else layer + 1
        return place * len(PARTS) + PARTS.index(part)

    def _note(self, entry: Entry, passed: bool, where: Where, value: str) -> None:
        if not passed and entry.first is None:
            entry.first, entry.value = where, value

    def _route(
        self,
        part: str,
        where: Where,
        node: RoutedNode,
        got: Arrays,
        sides: tuple[tuple[Any, Any], tuple[Any, Any]],
        routes: torch.Tensor | None,
        candidates: torch.Tensor | None,
    ) -> None:
        """One block router: its operands as computation, its choice as selection. sides: (query, keys) of plain and exact."""
        (query, keys), (exact_query, exact_keys) = (tuple(numpy(tensor) for tensor in side) for side in sides)
        shown_query, shown_keys = got[node.operands[0]], got[node.operands[1]]
        for row in np.nonzero(where.call.new)[0]:
            # Only complete blocks count: what a cache holds for the others is never read.
            complete = (where.call.past[row] + where.call.new[row]) // self.config.routing.block_size
            arrays = [x[row, :, :complete] for x in (shown_keys, exact_keys, keys)]
            self.computed(f"{part} block keys", where, node.op_type, node.operands[1], *arrays)
            arrays = [x[row][:, where.valid[row]] for x in (shown_query, exact_query, query)]
            self.computed(f"{part} query", where, node.op_type, node.operands[0], *arrays)
        attributes = expected_attributes(self.config, node.op_type, where.layer)
        lengths = where.call.past.astype(np.int64), where.call.new.astype(np.int64)
        proposed, expected, selected = (None if candidates is None else numpy(candidates)), numpy(routes), got[node.selected[0]]
        reference = block_choice(query, keys, expected, proposed, *lengths, attributes)
        heads = np.broadcast_to(where.valid[:, None], expected.shape[:3])
        proper = None
        device = ScoredChoices(reference.score, reference.bound, np.zeros((0, 0), bool))
        if selected.shape == expected.shape and shown_keys.shape == keys.shape:
            device = block_choice(shown_query, shown_keys, selected, proposed, *lengths, attributes)
            proper = is_proper(selected)[heads]
        self._judge(
            self._entry(part, where.layer, node.op_type, True), where, node.selected[0], heads, reference, device, proper
        )

    def _judge(
        self,
        entry: Entry,
        where: Where,
        value: str,
        mask: Array,
        reference: ScoredChoices,
        device: ScoredChoices,
        proper: Array | None,
    ) -> None:
        stats = entry.judged
        assert isinstance(stats, Selection)
        place = f"{where.execution}, call {where.number}"
        rows = judge_selection(stats, reference, device, place)
        if proper is not None and not proper.all():
            first = int(np.nonzero(~proper)[0][0])
            stats.unexcused += int((~proper).sum())
            stats.example = (
                stats.example or f"{place}, row {first}: the indices are not ascending and unique with -1 behind them"
            )
            rows.state[~proper] = WRONG
        self._note(entry, stats.passed, where, value)
        self._on_rows(Judged(entry, where, mask, rows))

    def _experts(self, node: RoutedNode, where: Where, got: Arrays, plain: Trace, exact: Trace) -> None:
        flat, mask = where.valid.reshape(-1), where.valid[:, None]
        attributes = expected_attributes(self.config, node.op_type, where.layer)
        logits, groups, ids = (numpy(x[0])[flat] for x in (plain.expert_logits, plain.group_logits, plain.expert_ids))
        precise = numpy(exact.expert_logits[0])[flat]
        shown, shown_groups = (got[name][flat] for name in node.operands[:2])
        self.computed("experts logits", where, node.op_type, node.operands[0], shown, precise, logits)
        if attributes["group_score"] == "external":  # else nobody reads them
            outer_precise = numpy(exact.group_logits[0])[flat]
            self.computed("experts group logits", where, node.op_type, node.operands[1], shown_groups, outer_precise, groups)
        bias, shown_ids = numpy(plain.expert_bias[0]), got[node.selected[0]][flat]
        entry = self._entry("experts", where.layer, node.op_type, True)
        outer, inner = expert_choices(logits, groups, bias, ids, attributes)
        if shown_ids.shape != ids.shape:
            empty = ScoredChoices(inner.score, inner.bound, np.zeros((0, 0), bool))
            self._judge(entry, where, node.selected[0], mask, inner, empty, None)
            return
        device_outer, device = expert_choices(shown, shown_groups, bias, shown_ids, attributes)
        loosen(inner, outer, device_outer)
        self._judge(entry, where, node.selected[0], mask, inner, device, None)
        same = (ids == shown_ids).all(1)
        weights = got[node.selected[1]][flat][same], expert_weights(precise, ids, attributes)[same]
        own = numpy(plain.expert_weights[0])[flat][same]
        self.computed("experts weights", where, node.op_type, node.selected[1], *weights, own)
