"""The layer-by-layer map of the page: one row per layer, one column per kind of tensor or router, in graph order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bilevel.export.report.judgements import RouterResult, TensorResult
from bilevel.export.report.model import Failure
from bilevel.export.report.summary import Cell, Column, count, percent, ratio, scientific
from bilevel.export.report.svg import Point

ROWS_PER_TABLE = 28  # deeper models get several tables, which a wide screen shows side by side
_SHADES = (1e-3, 1e-2, 0.1, 0.5)


@dataclass(frozen=True)
class MapCell:
    """kind: the style sheet's class; text: what it shows; title: the same in full; start: the failure starts here."""

    kind: str
    value: float | None
    text: str
    title: str
    start: bool = False


@dataclass(frozen=True)
class MapRow:
    """label: short, for the first column; title: in full; cells: one per column, None where there is nothing."""

    label: str
    title: str
    cells: list[MapCell | None]


def map_tables(columns: Sequence[Column], rows: dict[str, dict[str, Cell]], failure: Failure | None) -> list[list[MapRow]]:
    """The map's rows, cut into equal tables of at most ROWS_PER_TABLE rows."""
    start = failure.name if failure else _first_failing(rows)
    lines = [
        MapRow(name.removeprefix("layer "), name, [_cell(cells.get(column.title), start) for column in columns])
        for name, cells in rows.items()
    ]
    tables = max(math.ceil(len(lines) / ROWS_PER_TABLE), 1)
    size = max(math.ceil(len(lines) / tables), 1)
    return [lines[first : first + size] for first in range(0, len(lines), size)]


def _first_failing(rows: dict[str, dict[str, Cell]]) -> str:
    """The name of the failing entry that comes first in the graph."""
    failing = [e for cells in rows.values() for cell in cells.values() for e in cell.entries if not e.passed]
    return min(failing, key=lambda entry: entry.order).name if failing else ""


def _cell(cell: Cell | None, start: str) -> MapCell | None:
    if cell is None:
        return None
    starts = any(entry.name == start for entry in cell.entries) and not cell.passed
    worst = cell.worst
    return _router_cell(worst, starts) if isinstance(worst, RouterResult) else _tensor_cell(worst, starts)


def _router_cell(router: RouterResult, start: bool) -> MapCell:
    kind = "wrong" if not router.passed else "near" if router.excused else "s0"
    equal = percent(router.exact_rate)
    title = f"{router.name}: {equal} of {count(router.rows, 'row')} equal, {router.unexcused} wrong, {router.excused} excused"
    return MapCell(kind, None, equal.replace(" ", ""), title, start)


def _tensor_cell(tensor: TensorResult, start: bool) -> MapCell:
    share = ratio(tensor)
    kind = next((f"s{level}" for level, bound in enumerate(_SHADES) if share <= bound), "s4") if tensor.passed else "wrong"
    title = f"{tensor.name}: error {scientific(tensor.error)}, limit {scientific(tensor.limit)}"
    if tensor.floor is not None:
        title += f", PyTorch's own {scientific(tensor.floor)}"
    return MapCell(kind, tensor.error, "", title, start)


def column_points(title: str, rows: dict[str, dict[str, Cell]]) -> list[Point]:
    """One column of tensors as points of a chart; what lies before the layers stands at -1, what lies after them behind."""
    points: list[Point] = []
    for name, cells in rows.items():
        worst = cells[title].worst if title in cells else None
        if isinstance(worst, TensorResult):
            last = max((point.x for point in points), default=-1)
            x = worst.layer if worst.layer is not None else (last + 1 if last >= 0 else -1)
            points.append(Point(x, worst.error, worst.floor, worst.limit, worst.passed, name))
    return points
