"""The page's pictures as inline SVG: histograms of margins, values by layer, intervals.

Colours and line styles are classes of the page's style sheet, so that they follow its light and dark form. Every picture says
in words (``aria-label``) what it shows. ``Markup.format`` escapes all text. Lengths are SVG units, about a pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bilevel.export.report.judgements import RouterResult, Tolerance
from bilevel.export.report.summary import percent, scientific, visible

_WIDTH, _HEIGHT, _TOP, _BASE = 280, 106, 16, 80  # of a histogram
_STEPS = (0.0001, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # between the ticks of rates
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """Maps low..high to first..last; what lies outside ends at the border. log: the values' base-10 logarithms are mapped."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, rounded to a tenth."""
        if self.log:
            value = math.log10(value) if value > 0 else -math.inf
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + min(max(share, 0.0), 1.0) * (self.last - self.first), 1)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most ``most`` round values in range and their labels."""
        if self.log:
            decades = next(n for n in range(1, 400) if (self.high - self.low) / n < most)
            powers = range(math.ceil(self.low / decades) * decades, math.floor(self.high) + 1, decades)
            return [(10.0**n, power_of_ten(n)) for n in powers]
        step = next((step for step in _STEPS if (self.high - self.low) / step < most), 0.5)
        numbers = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(n * step, f"{100 * n * step:g} %") for n in numbers]


@dataclass(frozen=True)
class Point:
    """One value at one place of the graph. x: the layer; floor, limit: None where there is none; name: for the reader."""

    x: int
    value: float | None
    floor: float | None
    limit: float | None
    passed: bool
    name: str


def power_of_ten(exponent: int) -> str:
    """10⁻⁴ for -4."""
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def log_range(values: Iterable[float | None]) -> tuple[int, int]:
    """The powers of ten around all positive finite values; two decades when there is none."""
    logs = [math.log10(value) for value in values if value is not None and 0 < value < math.inf]
    if not logs:
        return -1, 1
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return (low, high) if low < high else (low - 1, high + 1)


def _picture(width: int, height: int, label: str, parts: Iterable[Markup]) -> Markup:
    frame = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return frame.format(width, height, visible(label), Markup("").join(parts))


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, x1, y1, x2, y2)


def _label(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, visible(text))


def _rect(kind: str, x: float, y: float, width: float, height: float) -> Markup:
    values = (kind, x, y, round(max(width, 0), 1), round(max(height, 0), 1))
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(*values)


def _path(kind: str, places: Sequence[tuple[float, float]]) -> Markup:
    steps = "L".join(f"{x} {y}" for x, y in places)
    return Markup('<path class="{}" d="M{}"/>').format(kind, steps) if len(places) > 1 else Markup("")


def histogram_range(selection: Sequence[RouterResult]) -> tuple[float, float]:
    """The base-10 logarithms that every router's histogram spans: all margins that occur, and all tolerances."""
    ends: list[float] = []
    for router in selection:
        edges, counts = router.margins.edges, router.margins.counts
        filled = [index for index, number in enumerate(counts) if number]
        ends += [edges[filled[0]], edges[filled[-1] + 1]] if filled else []
        ends += [math.log10(value) for value in (router.tolerance.median, router.tolerance.largest) if value]
    low, high = min(ends, default=-1.0), max(ends, default=0.0)
    return low - 0.3, max(high, low + 1) + 0.1


def histogram(router: RouterResult, span: tuple[float, float]) -> Markup:
    """Rows of one router by the base-10 logarithm of their relative margin; the tolerance is a line, below it lies the zone
    where rounding may decide. Heights are logarithmic, so that a single row can be seen."""
    axis = Axis(*span, 4, _WIDTH - 4)
    margins = router.margins
    tallest = math.log1p(max(margins.counts, default=0)) or 1.0
    bars = []
    for left, right, number in zip(margins.edges, margins.edges[1:], margins.counts, strict=False):
        if number:
            y = round(_BASE - math.log1p(number) / tallest * (_BASE - _TOP - 4), 1)
            bars.append(f"M{axis(left)} {_BASE}V{y}H{round(max(axis(right) - 0.8, axis(left) + 0.5), 1)}V{_BASE}z")
    parts = [Markup('<path class="bar" d="{}"/>').format("".join(bars)), _line("axis", 4, _BASE, _WIDTH - 4, _BASE)]
    for power in range(math.ceil(span[0]), math.floor(span[1]) + 1):
        if power % 2 == 0:
            x = axis(power)
            parts += [_line("axis", x, _BASE, x, _BASE + 4), _label(x, _BASE + 18, power_of_ten(power))]
    behind, before = _tolerance(axis, router.tolerance)
    return _picture(_WIDTH, _HEIGHT, _histogram_words(router), [*behind, *parts, *before])


def _tolerance(axis: Axis, tolerance: Tolerance) -> tuple[list[Markup], list[Markup]]:
    """What of the tolerance lies behind the bars and what before them."""
    behind, before = [], []
    if tolerance.median:
        x = axis(math.log10(tolerance.median))
        side = 1 if x < _WIDTH * 0.6 else -1
        behind.append(_rect("zone", 4, _TOP, x - 4, _BASE - _TOP))
        before.append(_line("tolerance", x, _TOP - 4, x, _BASE))
        before.append(_label(x + 4 * side, _TOP - 5, "tolerance", "start" if side > 0 else "end", "note"))
    if tolerance.largest and tolerance.largest != tolerance.median:
        x = axis(math.log10(tolerance.largest))
        before.append(_line("tolerance-largest", x, _TOP, x, _BASE))
    return behind, before


def _histogram_words(router: RouterResult) -> str:
    """The text alternative of a histogram."""
    return (
        f"Histogram of the relative margins of {router.rows} rows of {router.name}: smallest "
        f"{scientific(router.smallest_margin, 'none')}, tolerance {scientific(router.tolerance.median, 'none')}, "
        f"{router.margins.fragile} rows below their tolerance, {router.margins.ties} tied"
    )


def layer_chart(title: str, points: Sequence[Point], span: tuple[float, float], log: bool = True) -> Markup:
    """Values of one column of the map by layer, with floor and limit. span: base-10 logarithms, or values unless ``log``."""
    width, height, left, top, right, base = 340, 190, 40, 10, 332, 164
    first, last = min(p.x for p in points), max(p.x for p in points)
    across, up = Axis(first - 0.5, last + 0.5, left, right), Axis(*span, base, top, log)
    parts: list[Markup] = []
    for value, label in up.ticks(6):
        parts += [_line("grid", left, up(value), right, up(value)), _label(left - 5, up(value) + 4, label, "end")]
    parts += [_label(across(x), base + 16, text) for x, text in _layer_ticks(points, (right - left) / (last - first + 1))]
    parts.append(_line("axis", left, base, right, base))
    for kind in ("limit", "floor"):
        levels = [(across(p.x), up(getattr(p, kind))) for p in points if getattr(p, kind) is not None]
        if levels:  # a little longer than the points, so that a single one is seen too
            levels = [(round(levels[0][0] - 4, 1), levels[0][1]), *levels, (round(levels[-1][0] + 4, 1), levels[-1][1])]
        parts.append(_path(kind, levels))
    shown = [(p, across(p.x), up(p.value) if p.value is not None else top) for p in points]
    parts.append(_path("value", [(x, y) for _, x, y in shown]))
    for point, x, y in shown:
        parts.append(_marker(point, x, y, small=len(points) > 30))
    worst = max(points, key=lambda p: math.inf if p.value is None else p.value)
    failing = sum(not p.passed for p in points)
    largest = f"the largest {scientific(worst.value)} at {worst.name}"
    words = f"{title} by layer: {len(points)} values, {largest}, {failing} beyond the limit"
    return _picture(width, height, words, parts)


def _layer_ticks(points: Sequence[Point], width: float) -> list[tuple[int, str]]:
    """What stands below the axis: names of what is no layer, and every so many layers a number. width: of one layer."""
    named = [(p.x, {"embedding": "emb."}.get(p.name, p.name)) for p in points if not p.name.startswith("layer ")]
    layers = sorted({p.x for p in points if p.name.startswith("layer ")})
    step = next(step for step in (1, 2, 4, 5, 10, 20, 25, 50, 100, 1000) if step * width >= 28 or step == 1000)
    free = [x for x in layers if x % step == 0 and all(abs(x - other) * width >= 30 for other, _ in named)]
    return [*named, *((x, str(x)) for x in free)]


def _marker(point: Point, x: float, y: float, small: bool) -> Markup:
    """A dot, or a cross where the limit is broken; its title names the tensor."""
    title = visible(f"{point.name}: {percent(point.value) if point.limit is None else scientific(point.value)}")
    if point.passed:
        shape = Markup('<circle class="dot" cx="{}" cy="{}" r="{}">').format(x, y, 1.6 if small else 3)
        return shape + Markup("<title>{}</title></circle>").format(title)
    size = 2.5 if small else 4
    left, right, top, base = (f"{place:.1f}" for place in (x - size, x + size, y - size, y + size))
    cross = f"M{left} {top}L{right} {base}M{left} {base}L{right} {top}"
    return Markup('<path class="cross" d="{}"><title>{}</title></path>').format(cross, title)


def interval(
    value: float | None, bounds: Sequence[float | None], limit: float | None, floor: float | None, *, log: bool, words: str
) -> Markup:
    """One measured number with its interval, the allowed zone, and PyTorch's own value as a tick.

    log: smaller is better, on a log scale; else a rate, larger is better.
    """
    width, height, y = 260, 46, 16
    numbers = [number for number in (value, *bounds, limit, floor) if number is not None]
    if log:
        below = [limit / 10] if limit is not None else []  # so that the zone which passes has some width
        axis = Axis(*log_range([*numbers, *below]), 8, width - 8, log=True)
    else:
        least = min(numbers, default=0.0)
        axis = Axis(max(least - (1 - least) * 0.15 - 0.002, 0.0), 1.0, 8, width - 8)
    parts = [_line("axis", 8, y, width - 8, y)]
    if limit is not None:
        start, end = (8.0, axis(limit)) if log else (axis(limit), width - 8.0)
        parts += [_rect("allowed", start, y - 8, end - start, 16), _line("limit", axis(limit), y - 11, axis(limit), y + 11)]
    low, high = bounds
    if low is not None and high is not None:
        parts.append(_line("whisker", axis(low), y, axis(high), y))
    if floor is not None:
        parts.append(_line("floor", axis(floor), y - 8, axis(floor), y + 8))
    if value is not None:
        parts.append(Markup('<circle class="dot" cx="{}" cy="{}" r="4"/>').format(axis(value), y))
    for tick, label in axis.ticks(4):
        anchor = "start" if axis(tick) < 24 else "end" if axis(tick) > width - 24 else "middle"
        parts.append(_label(axis(tick), height - 6, label, anchor))
    return _picture(width, height, words, parts)
