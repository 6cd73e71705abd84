"""A report in the terminal: a line per judgement, or a table per judgement with the worst news last."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bilevel.errors import require
from bilevel.export.report.judgements import Margins, RouteChange, RouterResult, TensorResult
from bilevel.export.report.model import Failure, Report
from bilevel.export.report.summary import (
    by_level,
    by_part,
    count,
    effect_sentence,
    percent,
    route_kind,
    scientific,
    structure_sentence,
    verdict_lines,
    visible,
    worst,
)

FEW = 12  # routers up to which each has its row
SHOWN_IDS = 48  # token ids of the smallest input that are printed


def _console() -> Any:
    """A pipe gets lines of 120 characters."""
    return require("rich.console").Console(width=None if os.isatty(1) else 120, highlight=False)


def _plain(text: Any) -> str:
    """Text of a report, which is never markup and moves no cursor."""
    return str(require("rich.markup").escape(visible(str(text), newlines=False)))


def _mark(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[bold red]FAIL[/bold red]"


def _share(rate: float) -> str:
    return percent(rate).replace(" %", "%")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Any:
    """A rich table; its first ``left`` columns are text, the others numbers. The text of ``rows`` is markup."""
    table = require("rich.table").Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left or not column else "right", no_wrap=index > 0 and left == 1)
    for row in rows:
        table.add_row(*row)
    return table


def print_summary(report: Report) -> None:
    """One line per judgement; structure only where it differs, and last of all where a failure starts."""
    console = _console()
    for line in verdict_lines(report):
        if line.key != "structure" or not line.passed:
            console.print(f"{line.title:12} {_mark(line.passed)}  {_plain(line.text)}", soft_wrap=True)
    if report.effect:
        console.print(f"{'effect':12} of {report.rounded}  {_plain(effect_sentence(report.effect))}", soft_wrap=True)
    if report.failure:
        console.print(f"{'it starts at':12} {_plain(_start(report.failure))}", soft_wrap=True)


def print_report(report: Report) -> None:
    """A table per judgement: what passed first, what failed after it, then where the failure starts, then the verdict."""
    console = _console()
    data, seconds = report.data, f"{report.seconds:.1f} s"
    console.print(_plain(f"{report.bundle} against {report.against}, {data.tokens} tokens of {data.source}"), soft_wrap=True)
    console.print(_plain(f"{report.precision}, {report.rounded}; {report.backend}"), soft_wrap=True)
    sections: dict[str, Callable[[Report], list[Any]]] = {
        "invariants": _invariants,
        "selection": _selection,
        "computation": _computation,
        "end_to_end": _end_to_end,
        "activations": _activations,
        "structure": _structure,
    }
    verdicts = report.verdicts.to_dict()
    for key in sorted((key for key in sections if key in verdicts), key=lambda key: not verdicts[key]):
        for block in sections[key](report):
            console.print(block)
    if report.effect and not report.activations:
        for block in _effect(report):
            console.print(block)
    if report.failure:
        console.print(_failure(report.failure))
    verdict = "[green]parity holds[/green]" if report.passed else "[bold red]parity FAILS[/bold red]"
    console.print(f"{verdict} ({seconds})")


def _structure(report: Report) -> list[Any]:
    return [f"{_mark(False)} {_plain(structure_sentence(entry))}" for entry in report.structure]


def _selection(report: Report) -> list[Any]:
    """Every router of a small model; of a large one each level's total and every router that fails."""
    entries = report.selection
    if not entries:
        return []
    columns = ("rows", "same set", "Jaccard", "excused", "wrong", "least margin", "fragile", "ties", "")
    each = [[_plain(entry.name), *_router(entry)] for entry in entries]
    if len(entries) <= FEW:
        return [_table("Selection", ("router", *columns), each), *_examples(entries)]
    rows = []
    for kind, routers in by_level(entries).items():
        rows.append([kind, str(len(routers)), _place(worst(routers)), *_router(_pooled(routers))])
    blocks = [_table("Selection", ("kind", "routers", "worst", *columns), rows)]
    failing = [row for row, entry in zip(each, entries, strict=True) if not entry.passed]
    if failing:
        blocks.append(_table("Routers that choose wrongly", ("router", *columns), failing))
    return [*blocks, *_examples(entries)]


def _place(entry: RouterResult | TensorResult) -> str:
    return "" if entry.layer is None else f"layer {entry.layer}"


def _pooled(routers: Sequence[RouterResult]) -> RouterResult:
    """The totals of several routers; of rates and margins the lowest."""
    margins = [router.smallest_margin for router in routers if router.smallest_margin is not None]
    fragile, ties = (sum(getattr(router.margins, name) for router in routers) for name in ("fragile", "ties"))
    return replace(
        routers[0],
        **{name: sum(getattr(router, name) for router in routers) for name in ("rows", "excused", "unexcused")},
        **{name: min(getattr(router, name) for router in routers) for name in ("exact_rate", "jaccard")},
        smallest_margin=min(margins, default=None),
        margins=Margins((), (), fragile, ties),
        passed=all(router.passed for router in routers),
    )


def _router(entry: RouterResult) -> list[str]:
    """A router's numbers, as the table's columns name them."""
    return [
        str(entry.rows),
        _share(entry.exact_rate),
        f"{entry.jaccard:.5f}",
        str(entry.excused),
        str(entry.unexcused),
        scientific(entry.smallest_margin, "-"),
        str(entry.margins.fragile),
        str(entry.margins.ties),
        _mark(entry.passed),
    ]


def _examples(entries: Sequence[RouterResult]) -> list[str]:
    return [f"{_plain(entry.name)}: {_plain(entry.example)}" for entry in entries if entry.example]


def _computation(report: Report) -> list[Any]:
    """Of every part the worst layer, then every tensor beyond its limit."""
    if not report.computation:
        return []
    rows = []
    for part, tensors in by_part(report.computation).items():
        tensor = worst(tensors)
        rows.append([_plain(part), str(len(tensors)), _place(tensor), *_numbers(tensor), _mark(tensor.passed)])
    columns = ("tensor", "layers", "worst", "error there", "PyTorch's own", "limit", "")
    blocks = [_table("Computation, PyTorch's choices forced", columns, rows)]
    failing = sorted((e for e in report.computation if not e.passed), key=lambda entry: entry.order)
    if failing:
        lines = [[_plain(e.name), _plain(e.operator or "-"), _plain(e.worst or "-"), *_numbers(e)] for e in failing]
        names = ("tensor", "operator", "execution", "error", "PyTorch's own", "limit")
        blocks.append(_table("Tensors beyond their limit, in graph order", names, lines, left=3))
    return blocks


def _numbers(entry: TensorResult) -> list[str]:
    return [scientific(entry.error), scientific(entry.floor, "-"), scientific(entry.limit)]


def _end_to_end(report: Report) -> list[Any]:
    ends = report.end_to_end
    forced, greedy = ends.teacher_forced, ends.greedy
    low, high = (scientific(bound) for bound in forced.kl_interval)
    kl = f"KL {scientific(forced.kl_mean)} nats ({low} to {high}), largest {scientific(forced.kl_max)}"
    own = f", PyTorch's own {scientific(forced.floor_kl)}" if forced.floor_kl is not None else ""
    if forced.kl_same_choices is not None:
        own += f", {scientific(forced.kl_same_choices)} with the device's choices"
    top = f"same best token {_share(forced.top1_agreement)} ({_range(forced.top1_interval)})"
    text = f"{greedy.agreed} of {greedy.tokens} tokens equal ({_range(greedy.interval)})"
    text += f", {greedy.excused} differ at a near-tie" if greedy.excused else ""
    rows = [
        [f"next token, {forced.tokens} of the text", f"{kl}{own}", scientific(forced.limit), _mark(forced.passed)],
        ["", top, "", ""],
        [
            f"greedy text, {count(greedy.rows, 'row')}",
            text,
            _share(greedy.limit) if greedy.limit is not None else "-",
            _mark(greedy.passed),
        ],
    ]
    return [_table("End to end", ("judgement", "result", "limit", ""), rows, left=2), f"In brackets: {_plain(ends.method)}."]


def _range(bounds: Sequence[float | None]) -> str:
    low, high = (_share(bound) if bound is not None else "-" for bound in bounds)
    return f"{low} to {high}"


def _invariants(report: Report) -> list[Any]:
    rows = [[_plain(e.name), _plain(e.detail), _mark(e.passed)] for e in report.invariants]
    return [_table("Invariants", ("law", "what was tried", ""), rows, left=2)] if rows else []


def _activations(report: Report) -> list[Any]:
    """What rounding costs, and the judged rounding of activations."""
    line = next(line for line in verdict_lines(report) if line.key == "activations")
    return [*_effect(report), f"activations {_mark(line.passed)}  {_plain(line.text)}"]


def _effect(report: Report) -> list[Any]:
    """What rounding costs: routes against the checkpoint (of many the worst) and loss."""
    effect = report.effect
    assert effect is not None
    kinds: dict[str, list[RouteChange]] = {}
    for entry in effect.routes:
        kinds.setdefault(route_kind(entry.name) if len(effect.routes) > FEW else entry.name, []).append(entry)
    rows = []
    for kind, routers in kinds.items():
        least = min(routers, key=lambda entry: entry.exact_rate)
        label = least.name if len(routers) == 1 else f"{kind}: {len(routers)} routers, worst {least.name}"
        rows.append([_plain(label), str(least.rows), _share(least.exact_rate), f"{least.jaccard:.5f}"])
    title = f"Effect of {report.rounded}: routes against the checkpoint"
    blocks: list[Any] = [_table(title, ("router", "rows", "same set", "Jaccard"), rows)] if rows else []
    blocks.append(f"effect of {report.rounded}: {_plain(effect_sentence(effect))}")
    return blocks


def _start(failure: Failure) -> str:
    operator = f" ({failure.operator})" if failure.operator else ""
    return f"{failure.name}{operator}: {failure.message}"


def _failure(failure: Failure) -> Any:
    """Where it starts, what to look at, and the smallest input that shows it."""
    smallest = failure.input
    ids, hidden = smallest.token_ids[:SHOWN_IDS], max(len(smallest.token_ids) - SHOWN_IDS, 0)
    shown = " ".join(map(str, ids)) + (f" … and {hidden} more (--json)" if hidden else "")
    lines = {
        "starts at": _start(failure),
        "found by": failure.judgement + (f", in the {failure.execution}" if failure.execution else ""),
        "nodes": ", ".join(failure.nodes) or "none between",
        "difference": failure.difference or "-",
        "smallest input": f"{count(len(smallest.token_ids), 'token')} in calls of {', '.join(map(str, smallest.calls))}; "
        f"it shows at position {smallest.row_position}",
        "token ids": shown,
        "text": smallest.text,
    }
    grid = require("rich.table").Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, text in lines.items():
        grid.add_row(name, _plain(text))
    return require("rich.panel").Panel(grid, title="Where it starts", title_align="left", border_style="red")
