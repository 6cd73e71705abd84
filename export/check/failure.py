"""Where a failure starts: the first layer and operator, the graph's nodes in question, and the smallest input that shows it.

Every part of the graph was fed PyTorch's own hidden state and choices, so that the first failing entry in graph order is a
cause and no consequence. Its input is then cut down: one row, as few calls and as few tokens as still fail.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import onnx_ir as ir

from bilevel.config import ModelConfig
from bilevel.errors import BilevelError
from bilevel.export.check.compare import Comparison, Entry
from bilevel.export.check.graph_parts import Part
from bilevel.export.check.judge import Array, Selection
from bilevel.export.check.layered import Text
from bilevel.export.check.replay import Replay
from bilevel.export.report.judgements import StructureDifference
from bilevel.export.report.model import Failure, SmallestInput

_MOST_NODES = 16
Decode = Callable[[Array], str]


def first_failing(entries: list[Entry]) -> Entry | None:
    """The failing entry that comes first in the graph."""
    return next((entry for entry in entries if not entry.judged.passed), None)


def describe_structure(difference: StructureDifference) -> Failure:
    """A failure that starts with a node which is not what the model means."""
    name, attribute = difference.name, difference.attribute
    what = f"{attribute}={difference.graph}" if attribute else f"{difference.graph} {difference.operator} nodes"
    meant = f"{attribute}={difference.model}" if attribute else str(difference.model)
    return Failure(
        name=name,
        layer=layer_of(name),
        operator=difference.operator,
        execution="",
        judgement="structure",
        message=f"{name}: the graph has {what}, the model {meant}",
        nodes=(),
        input=SmallestInput((), "", (), 0),
        difference="",
        outliers="",
    )


def layer_of(name: str) -> int | None:
    """The layer in the name of an entry, None where it belongs to none."""
    words = name.split(" ", 2)
    return int(words[1]) if words[0] == "layer" else None


def where_it_starts(
    replay: Replay, text: Text, structure: list[StructureDifference], decode: Decode, *, shrink: bool = True
) -> Failure | None:
    """The failing entry or the difference of structure that comes first in the graph; None if all is well.

    decode: token ids -> text. shrink: look for the smallest input that shows it.
    """
    comparison = replay.comparison
    entry = first_failing(comparison.entries)
    orders = [comparison.order(_part_of(difference.name), layer_of(difference.name)) for difference in structure]
    first = min(range(len(orders)), key=orders.__getitem__, default=None)
    if first is not None and (entry is None or orders[first] < entry.order):
        return describe_structure(structure[first])
    return None if entry is None else describe(replay, text, entry, decode, shrink)


def _part_of(name: str) -> str:
    return name if layer_of(name) is None else (name.split(" ", 2)[2:] or ["output"])[0]


def describe(replay: Replay, text: Text, entry: Entry, decode: Decode, shrink: bool) -> Failure:
    """A failure that starts with ``entry``."""
    assert entry.first is not None
    execution = entry.first.execution
    shrunk = _shrink(_Part(replay, entry), text, entry) if shrink else None
    judged, sizes, tokens = shrunk if shrunk is not None else (entry, text.sizes, text.ids[0, : text.lengths[0]])
    part = _Part(replay, entry).graph_part()
    nodes = _nodes_between(part, judged.value or entry.value)
    kind = "selection" if isinstance(entry.judged, Selection) else "computation"
    needs = f"{len(tokens)} tokens in {len(sizes)} call{'s' if len(sizes) > 1 else ''}"
    smaller = f"{needs} show it" if shrunk is not None or not shrink else "no smaller input than the whole text shows it"
    token_ids, calls = (tuple(int(number) for number in numbers) for numbers in (tokens, sizes))
    return Failure(
        name=entry.name,
        layer=entry.layer,
        operator=entry.operator,
        execution=execution,
        judgement=kind,
        message=f"{entry.name} differs first, in the {execution}; {smaller}",
        nodes=tuple(nodes),
        input=SmallestInput(token_ids, decode(tokens), calls, max(len(tokens) - 1, 0)),
        difference=judged.judged.example if isinstance(judged.judged, Selection) else _largest(judged),
        outliers=_outliers(judged),
    )


class _Part:
    """The part of the model that an entry belongs to, compared alone."""

    def __init__(self, replay: Replay, entry: Entry) -> None:
        assert entry.first is not None
        self._replay, self._entry = replay, entry
        self._parts = replay.parts.only(entry.first.execution)
        self.config: ModelConfig = replay.config

    def graph_part(self) -> Part:
        """The graph's part."""
        if self._entry.part == "logits":
            return self._parts.head()
        return self._parts.words() if self._entry.layer is None else self._parts.layer(self._entry.layer)

    def failing(self, text: Text) -> Entry | None:
        """The entry as ``text`` shows it, None where it passes."""
        old = self._replay
        comparison = Comparison(self.config, old.comparison.precision)
        replay = Replay(old.plain, old.exact, self._parts, comparison)
        layer, is_head = self._entry.layer, self._entry.part == "logits"
        if layer is None and not is_head:
            replay.words(text)
        else:
            plain = old.plain.words(text)
            exact = old.exact.words(text, [passage.trace for passage in plain])
            for index in range(self.config.num_hidden_layers if is_head else layer or 0):
                plain = old.plain.layer(index, plain, text, keep=False)
            if is_head:
                replay.head(text, plain)
            else:
                replay.layer(layer or 0, text, plain, exact)
        first = first_failing(comparison.entries)
        return first if first is not None and first.name == self._entry.name else None


def _shrink(part: _Part, text: Text, entry: Entry) -> tuple[Entry, list[int], Array] | None:
    """(the entry as the smallest input shows it, its calls, its tokens), or None where it takes the whole batch."""
    assert entry.first is not None
    number, call = entry.first.number, entry.first.call
    before = text.sizes[:number]
    for row in np.nonzero(call.new)[0]:
        end = int(call.past[row] + call.new[row])
        tokens = text.ids[row, :end]
        for sizes in ([], before) if before else ([],):
            failing = part.failing(_cut(tokens, sizes, text.block_size))
            if failing is not None:
                tokens, failing = _fewest(part, tokens, sizes, text.block_size, failing)
                return failing, _cut(tokens, sizes, text.block_size).sizes, tokens
    return None


def _fewest(part: _Part, tokens: Array, sizes: list[int], block_size: int, failing: Entry) -> tuple[Array, Entry]:
    """By bisection, the shortest beginning of ``tokens`` that still fails (of those tried, should failures come and go).

    sizes: of the calls before the one that fails. failing: the entry as all of ``tokens`` show it.
    """
    low, high = sum(sizes) + 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        try:
            shorter = part.failing(_cut(tokens[:middle], sizes, block_size))
        except BilevelError:
            shorter = None
        if shorter is None:
            low = middle + 1
        else:
            high, failing = middle, shorter
    return tokens[:high], failing


def _cut(tokens: Array, sizes: list[int], block_size: int) -> Text:
    return Text.cut(tokens[None], np.array([len(tokens)]), sizes, block_size)


def _nodes_between(part: Part, value: str) -> list[str]:
    """The nodes that make ``value`` out of what the part is given or what has its own entry, in graph order."""
    values = ir.convenience.create_value_mapping(part.graph)
    known = set(part.inputs) | {name for name in part.outputs if name != value}
    pending, nodes = [values.get(value)], set()
    while pending:
        wanted = pending.pop()
        node = wanted.producer() if wanted is not None else None
        if node is None or node in nodes:
            continue
        nodes.add(node)
        pending += [source for source in node.inputs if source is not None and source.name not in known]
    names = [f"{node.op_type} {node.name}".strip() for node in part.graph if node in nodes]
    return names if len(names) <= _MOST_NODES else [*names[-_MOST_NODES:]]


def _largest(entry: Entry) -> str:
    """The place of the largest difference in words, or why there is none to show."""
    if entry.sides is None:
        return entry.message
    exact, got = entry.sides
    if exact.shape != got.shape:
        return f"PyTorch's tensor has shape {list(exact.shape)}, the graph's {list(got.shape)}"
    difference = np.abs(got.astype(np.float64) - exact)
    difference = np.where(np.isnan(difference), np.inf, difference)
    place = np.unravel_index(int(difference.argmax()), difference.shape)
    index = ", ".join(str(int(i)) for i in place)
    return f"largest at [{index}]: PyTorch in fp64 has {exact[place]:.6g}, the graph {got[place]:.6g}"


def _outliers(entry: Entry) -> str:
    """Polygraphy's statistics and histogram of the differences, "" for a selection."""
    if entry.sides is None or entry.sides[0].shape != entry.sides[1].shape or not entry.sides[0].size:
        return ""
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

    assert entry.first is not None
    results = RunResults()
    for name, array in zip(("PyTorch fp64", entry.first.execution), entry.sides, strict=True):
        results.append((name, [IterationResult({entry.name: np.ascontiguousarray(array)}, runner_name=name)]))
    scale = float(np.abs(entry.sides[0]).max()) or 1.0
    limit = getattr(entry.judged, "limit", 0.0) * scale
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=limit, rtol=0, check_error_stat="max"))
    return printed.getvalue()
