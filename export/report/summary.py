"""A report in words and in columns: what the terminal and the page both show of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bilevel.export.report.judgements import Effect, RouterResult, StructureDifference, TensorResult
from bilevel.export.report.model import Report

Result = TypeVar("Result", bound=RouterResult | TensorResult)
LEVELS = {1: "level 1", 2: "level 2", "experts": "experts"}
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_EXPONENT = re.compile(r"(?<=\d)e([+-])0*(\d+)\b")


@dataclass(frozen=True)
class Line:
    """One judgement: its key in ``verdicts`` (empty where nothing is judged), its title, whether it holds, and a sentence."""

    key: str
    title: str
    passed: bool
    text: str


@dataclass
class Cell:
    """What one column says of one row of the map: entries of ``selection`` or of ``computation``."""

    entries: list[RouterResult | TensorResult] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(entry.passed for entry in self.entries)

    @property
    def worst(self) -> RouterResult | TensorResult:
        """The entry to show."""
        return worst(self.entries)


@dataclass(frozen=True)
class Column:
    """A column of the map. kind: "selection" or "computation"; members: levels, or parts."""

    title: str
    kind: str
    members: tuple[int | str, ...]


_BLOCKS = ("level 1 query", "level 1 block keys", "level 2 query", "keys", "values", "level 2 block keys")
_COLUMNS = (
    Column("operands", "computation", _BLOCKS),
    Column("blocks chosen", "selection", (1, 2)),
    Column("attention", "computation", ("attention",)),
    Column("expert scores", "computation", ("experts logits", "experts group logits", "experts weights")),
    Column("experts chosen", "selection", ("experts",)),
    Column("expert output", "computation", ("expert output",)),
    Column("output", "computation", ("embedding", "output", "logits")),
)


def visible(text: str, newlines: bool = True) -> str:
    """``text`` with control, direction and broken characters as symbols; tabs and (if ``newlines``) line feeds stay."""

    def symbol(match: re.Match[str]) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    shown = _HIDDEN.sub(symbol, text)
    return shown if newlines else shown.replace("\n", "\u2424").replace("\t", "\u2409")


def scientific(value: float | None, missing: str = "not finite") -> str:
    """A measured number with two digits; ``missing`` where there is none."""
    if value is None or not math.isfinite(value):
        return missing
    return "0" if value == 0 else f"{value:.1e}"


def short(value: float | None, missing: str = "not finite") -> str:
    """A measured number as the page shows it, with a minus that no line breaks at: 0.18, 1.6e−6."""
    if value is not None and 0.01 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    return shorten(scientific(value, missing))


def shorten(text: str) -> str:
    """``text`` with its numbers as ``short`` writes them, and percentages that no line break parts."""
    text = text.replace(" %", "\u00a0%")
    return _EXPONENT.sub(lambda match: f"e{match[1].replace('+', '').replace('-', '−')}{match[2]}", text)


def percent(rate: float | None) -> str:
    """A rate as a percentage that says 100 % only of 1."""
    if rate is None:
        return "-"
    digits = 1 if rate < 0.999 else 2
    text = f"{100 * rate:.{digits}f}"
    return "100 %" if rate == 1 else f"{'99.99' if float(text) == 100 else text} %"


def ratio(tensor: TensorResult) -> float:
    """A tensor's error as a share of its limit; infinite where the error is not finite."""
    if tensor.error is None:
        return math.inf
    if tensor.limit is None or tensor.error == 0:
        return 0.0
    return tensor.error / tensor.limit if tensor.limit else math.inf


def worst(entries: Sequence[Result]) -> Result:
    """Of the failing entries the first, where it started; if none fails the tensor nearest to its limit, or the router that
    agrees least."""
    failing = [entry for entry in entries if not entry.passed]
    return min(failing, key=lambda entry: entry.order) if failing else max(entries, key=_badness)


def _badness(entry: RouterResult | TensorResult) -> tuple[float, ...]:
    if isinstance(entry, TensorResult):
        return (ratio(entry),)
    return entry.excused, -entry.exact_rate, -(math.inf if entry.smallest_margin is None else entry.smallest_margin)


def by_level(selection: Sequence[RouterResult]) -> dict[str, list[RouterResult]]:
    """Routers by kind, in the order in which the kinds appear."""
    kinds: dict[str, list[RouterResult]] = {}
    for entry in selection:
        kinds.setdefault(LEVELS[entry.level], []).append(entry)
    return kinds


def by_part(computation: Sequence[TensorResult]) -> dict[str, list[TensorResult]]:
    """Tensors by part, in the order in which the parts appear."""
    parts: dict[str, list[TensorResult]] = {}
    for entry in computation:
        parts.setdefault(entry.part, []).append(entry)
    return parts


def layer_map(report: Report) -> tuple[list[Column], dict[str, dict[str, Cell]]]:
    """(columns that have an entry, row -> column title -> cell); rows: embedding, level 1, every layer, output."""
    known = {member for column in _COLUMNS for member in column.members}
    others = [part for part in by_part(report.computation) if part not in known]
    columns = [*_COLUMNS[:-1], *(Column(part, "computation", (part,)) for part in others), _COLUMNS[-1]]
    titles = {(column.kind, member): column.title for column in columns for member in column.members}
    rows: dict[str, dict[str, Cell]] = {}
    entries: list[RouterResult | TensorResult] = [*report.selection, *report.computation]
    for entry in sorted(entries, key=lambda entry: entry.order):
        key = ("selection", entry.level) if isinstance(entry, RouterResult) else ("computation", entry.part)
        rows.setdefault(row_name(entry), {}).setdefault(titles[key], Cell()).entries.append(entry)
    used = {title for row in rows.values() for title in row}
    return [column for column in columns if column.title in used], rows


def row_name(entry: RouterResult | TensorResult) -> str:
    """The map's row that an entry belongs to."""
    if entry.layer is not None:
        return f"layer {entry.layer}"
    return "level 1" if entry.name.startswith("level 1") else entry.name


def verdict_lines(report: Report) -> list[Line]:
    """One line per judgement, in the order of the design; structure first, the rounding of activations last."""
    makers = {
        "structure": ("structure", _structure),
        "selection": ("selection", _selection),
        "computation": ("computation", _computation),
        "end_to_end": ("end to end", _end_to_end),
        "invariants": ("invariants", _invariants),
        "activations": ("activations", _activations),
    }
    verdicts = report.verdicts.to_dict()
    return [Line(key, title, verdicts[key], make(report)) for key, (title, make) in makers.items() if key in verdicts]


def structure_sentence(entry: StructureDifference) -> str:
    """One difference of the graph's structure."""
    if entry.attribute is None:
        return f"{entry.name}: the graph has {entry.graph}, the model means {entry.model}"
    return f"{entry.name}: the node says {entry.attribute}={entry.graph}, the model means {entry.model}"


def _structure(report: Report) -> str:
    differences = report.structure
    if not differences:
        return "the routed nodes and their attributes are the model's"
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return structure_sentence(differences[0]) + more


def _selection(report: Report) -> str:
    entries = report.selection
    if not entries:
        return "the model has no routers" if report.verdicts.selection else "no router could be judged"
    rows, excused = sum(entry.rows for entry in entries), sum(entry.excused for entry in entries)
    wrong = sum(entry.unexcused for entry in entries)
    text = f"{rows} choices of {len(entries)} routers: {wrong} wrong, {excused} excused at a near-tie"
    failing = [entry for entry in entries if not entry.passed]
    return f"{text}; first at {worst(failing).name}" if failing else text


def _computation(report: Report) -> str:
    entries = report.computation
    if not entries:
        return "no tensor could be compared"
    tensor, failing = worst(entries), sum(not entry.passed for entry in entries)
    if not failing:
        return f"largest error {scientific(tensor.error)} of the largest magnitude ({tensor.name})"
    return (
        f"{failing} of {len(entries)} tensors beyond their limit; first {tensor.name}: error {scientific(tensor.error)}, "
        f"{scientific(tensor.limit)} allowed"
    )


def _end_to_end(report: Report) -> str:
    forced, greedy = report.end_to_end.teacher_forced, report.end_to_end.greedy
    allowed = "" if forced.passed else f" ({scientific(forced.limit)} allowed)"
    text = f"KL {scientific(forced.kl_mean)} nats a token{allowed}, "
    text += f"greedy text {greedy.agreed} of {greedy.tokens} tokens equal"
    if greedy.excused:
        text += f", {greedy.excused} differ at a near-tie"
    return text


def _invariants(report: Report) -> str:
    entries = report.invariants
    failing = [entry for entry in entries if not entry.passed]
    if not entries:
        return "none could be tried"
    if not failing:
        return f"all {len(entries)} hold: {', '.join(entry.name for entry in entries)}"
    return f"{len(failing)} of {len(entries)} broken; first {failing[0].name}: {failing[0].detail}"


def _activations(report: Report) -> str:
    entry = report.activations
    assert entry is not None
    return (
        f"8 bits: KL {scientific(entry.kl_mean)} nats, {scientific(entry.limit)} allowed "
        f"(PyTorch's own: {scientific(entry.pytorch_kl_mean)})"
    )


def effect_sentence(effect: Effect) -> str:
    """What weights and caches in fewer bits changed, which nobody judges."""
    kinds: dict[str, list[float]] = {}
    for entry in effect.routes:
        kinds.setdefault(route_kind(entry.name), []).append(entry.exact_rate)
    routes = ", ".join(f"{kind} {percent(min(rates))}" for kind, rates in kinds.items())
    losses = effect.loss_before, effect.loss_after
    before, after = ("not finite" if loss is None else f"{loss:.4f}" for loss in losses)
    text = f"loss {before} -> {after} nats a token, KL {scientific(effect.kl_mean)}, "
    text += f"same best token {percent(effect.top1_agreement)}"
    return f"{text}, equal routes at least: {routes}" if routes else text


def route_kind(name: str) -> str:
    """The kind of router that a name ends in."""
    return next((kind for kind in LEVELS.values() if name.endswith(kind)), name)


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it must be."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
