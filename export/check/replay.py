"""PyTorch and the parts of the graph side by side, with PyTorch's choices and hidden states going in.

Every part of the graph (``graph_parts``) gets the hidden state that plain PyTorch of the bundle's precision computed, and
PyTorch's choices. So does PyTorch in fp64 with the same weights, which is the reference; plain PyTorch's own error is the
floor. A fault therefore shows in its own part only, and the first entry that fails, in graph order, is where it starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner

from bilevel.errors import BundleError
from bilevel.export.check.compare import Comparison, Where, numpy
from bilevel.export.check.graph_parts import ROUNDING, GraphParts, Part, RoutedNode, infer
from bilevel.export.check.judge import ALLOWED_FACTOR, COMPUTATION_LIMIT, ROUNDOFF, Array, relative_error
from bilevel.export.check.layered import LayeredModel, Passage, Text
from bilevel.export.graph.nodes import ATTENTION
from bilevel.export.graph.sessions import Arrays
from bilevel.export.report.judgements import Invariant
from bilevel.model import hidden_name
from bilevel.state import Trace, empty_cache


class Replay:
    """Runs one text through both sides. Raises BundleError for a graph that has no such parts.

    plain: PyTorch in the bundle's precision; exact: in fp64 with the same weights. comparison: gets every call of every part.
    on_stage is told which part is being compared. reordered: what became of the routes given in another order and with
    repetitions, {name: largest error}.
    """

    def __init__(
        self,
        plain: LayeredModel,
        exact: LayeredModel,
        parts: GraphParts,
        comparison: Comparison,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.plain, self.exact, self.parts, self.comparison = plain, exact, parts, comparison
        self.config = plain.config
        self.reordered: dict[str, float] = {}
        self._on_stage = on_stage

    def run(self, text: Text) -> list[Passage]:
        """Compare every part on ``text``; returns PyTorch's passages behind the last layer."""
        self._on_stage("comparing the embedding and level 1")
        plain, exact = self.words(text)
        for index in range(self.config.num_hidden_layers):
            self._on_stage(f"comparing layer {index} of {self.config.num_hidden_layers}")
            plain = self.layer(index, text, plain, exact)
        self._on_stage("comparing the head")
        self.head(text, plain)
        return plain

    def words(self, text: Text) -> tuple[list[Passage], list[Passage]]:
        """Compare the embedding and level 1; returns the passages of both precisions in front of layer 0."""
        plain = self.plain.words(text)
        exact = self.exact.words(text, [passage.trace for passage in plain])
        part = self.parts.words()
        for execution in self.parts.executions:
            with self._noting(part, Where(None, execution, 0, text.calls[0])):
                for number, got in self._calls(part, execution, text, None, plain, plain):
                    where = Where(None, execution, number, text.calls[number])
                    self.comparison.words(where, part, got, plain[number], exact[number])
        return plain, exact

    def layer(self, index: int, text: Text, plain: list[Passage], exact: list[Passage]) -> list[Passage]:
        """Compare one layer; returns PyTorch's passages behind it."""
        after = self.plain.layer(index, plain, text)
        given = [dataclasses.replace(e, x=p.x) for e, p in zip(exact, plain, strict=True)]
        precise = self.exact.layer(index, given, text, obeyed=[passage.trace for passage in after])
        part = self.parts.layer(index)
        for execution in self.parts.executions:
            with self._noting(part, Where(index, execution, 0, text.calls[0])):
                for number, got in self._calls(part, execution, text, index, plain, after):
                    where = Where(index, execution, number, text.calls[number])
                    self.comparison.layer(where, part, got, after[number], precise[number])
        return after

    @contextmanager
    def _noting(self, part: Part, where: Where) -> Iterator[None]:
        """A part that cannot run, or lacks what the model computes there, fails as a whole."""
        try:
            yield
        except BundleError as error:
            self.comparison.broken(where, part, str(error))

    def head(self, text: Text, plain: list[Passage]) -> None:
        """Compare the logits of every call's last tokens."""
        one, two = self.plain.last_logits(plain), self.exact.last_logits(plain)
        part, execution = self.parts.head(), next(iter(self.parts.executions))  # the head holds no routed node
        with self._noting(part, Where(None, execution, 0, text.calls[0])), self.parts.runner(part, execution) as runner:
            for number, call in enumerate(text.calls):
                feeds = {hidden_name(self.config.num_hidden_layers): numpy(plain[number].x), "new_len": call.new}
                got = infer(runner, part, feeds | {"input_ids": call.ids, "past_len": call.past})["logits"]
                rows, where = call.new > 0, Where(None, execution, number, call)
                self.comparison.computed("logits", where, None, "logits", got[rows], two[number][rows], one[number][rows])

    def _calls(
        self, part: Part, execution: str, text: Text, layer: int | None, before: list[Passage], after: list[Passage]
    ) -> Iterator[tuple[int, Arrays]]:
        """(call, what the graph's part gave) of every call, with the part's own caches carried along."""
        caches = {name: self._zeros(name, text) for name in part.inputs if name.startswith("past.")}
        # The longest call takes the path of prefill, the last one usually that of a single token.
        tried = {int(np.argmax(text.sizes)), len(text.calls) - 1}
        with self.parts.runner(part, execution) as runner:
            for number, call in enumerate(text.calls):
                feeds: Arrays = {"input_ids": call.ids, "past_len": call.past, "new_len": call.new, **caches}
                if layer is not None:
                    feeds[hidden_name(layer)] = numpy(before[number].x)
                feeds |= self._forced(after[number])
                got = infer(runner, part, feeds)
                if number in tried:
                    self._reorder(part, execution, runner, feeds)
                given = {**feeds, **got}  # a packed cache is given, not computed
                caches = {name: given.get(name.replace("past.", "present.", 1), cache) for name, cache in caches.items()}
                yield number, got

    def _zeros(self, name: str, text: Text) -> Array:
        kind = name.split(".")[1]
        config, rows, blocks = self.config, len(text.ids), text.capacity // text.block_size
        if kind == "token_ids":
            return np.zeros((rows, text.capacity), np.int64)
        if kind == "word_block_key":
            return np.zeros((rows, 1, blocks, config.route_dim), np.float32)
        if kind == "block_key":
            return np.zeros((rows, config.num_key_value_heads, blocks, config.block_key_width), np.float32)
        return numpy(empty_cache(config, rows, text.capacity, torch.float32, self.plain.caches))

    def _forced(self, passage: Passage) -> Arrays:
        """PyTorch's choices and packed caches by the names of the parts' inputs; those of other layers are never asked for."""
        trace, candidates = passage.trace, passage.step.candidates
        forced: Arrays = {}
        for node in self.parts.nodes:
            if node.op_type == ROUNDING:
                forced |= {name: numpy(packed) for name, packed in zip(node.outputs, _packed(node, trace), strict=False)}
                continue
            if node.op_type == "ExpertRoute":
                choices: tuple[Any, ...] = (*trace.expert_ids[:1], *trace.expert_weights[:1])
            elif node.layer is None:
                choices = () if candidates is None else (candidates,)
            else:
                choices = tuple(trace.routes[:1])
            if node.selected:
                forced |= {name: numpy(tensor) for name, tensor in zip(node.outputs, choices, strict=False)}
        return forced

    def _reorder(self, part: Part, execution: str, runner: BaseRunner, feeds: Arrays) -> None:
        """Run the call twice more with every list of blocks a block shorter: as a router would write it, then reversed and
        filled up with a block that it holds already. The two name the same blocks."""
        lists = {name for node in self.parts.nodes if node.op_type in ("CoarseRoute", "FineRoute") for name in node.outputs}
        shorter = {name: _shorter(feeds[name]) for name in part.inputs if name in lists}
        if not shorter:
            return
        once = infer(runner, part, feeds | shorter)
        again = infer(runner, part, feeds | {name: _repeated(routes) for name, routes in shorter.items()})
        for node in part.nodes:
            for name in node.selected if node.op_type == "FineRoute" else node.outputs if node.op_type in ATTENTION else ():
                key = f"layer {node.layer} {node.op_type}, {execution}"
                error = relative_error(again[name], once[name].astype(np.float64))
                self.reordered[key] = max(self.reordered.get(key, 0.0), error)

    def order_invariant(self) -> Invariant | None:
        """The invariant "order and repetition of routes", None where nothing is routed."""
        if not self.reordered:
            return None
        precision = self.comparison.precision
        limit = COMPUTATION_LIMIT if precision == "float32" else ALLOWED_FACTOR * ROUNDOFF[precision]
        worst = max(self.reordered, key=lambda name: self.reordered[name])
        detail = (
            f"every list reversed and filled up with repetitions: largest change {self.reordered[worst]:.1e} ({worst}), "
            f"{limit:.0e} allowed"
        )
        return Invariant("order and repetition of routes", self.reordered[worst] <= limit, detail)


def _packed(node: RoutedNode, trace: Trace) -> list[torch.Tensor]:
    """The packed cache that ``node`` writes, as PyTorch has it behind this call; nothing for a cache of floats."""
    index = 1 if ".value." in node.outputs[0] else 0
    return trace.packed[index : index + 1]


def _shorter(routes: Array) -> Array:
    """Routes [..., K] without the last block of every list that holds several."""
    count = (routes >= 0).sum(-1, keepdims=True)
    return np.where((np.arange(routes.shape[-1]) == count - 1) & (count > 1), -1, routes).astype(routes.dtype)


def _repeated(routes: Array) -> Array:
    """Routes [..., K] backwards, -1 replaced by the list's second block: the first is often kept whatever is proposed."""
    filling = np.where(routes[..., 1:2] >= 0, routes[..., 1:2], routes[..., :1])
    return np.ascontiguousarray(np.where(routes < 0, filling, routes)[..., ::-1])
