"""The page's pictures as inline SVG. Colours are classes of ``page.css``; each picture says in words what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from bilevel.runtime.quality.model import DENSE, Answer, LayerRecall, LossResult
from bilevel.runtime.quality.results import column, in_order
from bilevel.runtime.quality.words import signed

DEPTHS = 8  # columns of a heat map
_WIDTH, _LEFT = 560, 52


def picture(width: float, height: float, words: str, parts: Iterable[str]) -> str:
    """An SVG; words: its text alternative."""
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(words)}">'
    return f"{head}{''.join(parts)}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def heat_map(answers: Sequence[Answer], side: str) -> str:
    """Answers of one task and side by length (rows) and depth (columns): exact ones of all, darker for more."""
    lengths = sorted({answer.length for answer in answers})
    cell, height = (_WIDTH - _LEFT) / DEPTHS, 34
    parts, exact = [], int(sum(column(answers, side, "exact")))
    for row, length in enumerate(lengths):
        y = row * height
        parts.append(_text(_LEFT - 8, y + height / 2 + 4, f"{length:,}", "end"))
        for place in range(DEPTHS):
            here = [a for a in answers if a.length == length and min(int(a.depth * DEPTHS), DEPTHS - 1) == place]
            parts += _cell(here, side, _LEFT + place * cell, y, cell, height)
    base = len(lengths) * height + 15
    parts += [_text(_LEFT + place * cell, base, f"{place / DEPTHS:.0%}") for place in range(0, DEPTHS + 1, 2)]
    words = f"{side}: {exact} of {len(answers)} answers exactly right, by length of the text and depth of the fact"
    return picture(_WIDTH + 16, base + 6, words, parts)


def _cell(here: Sequence[Answer], side: str, x: float, y: float, width: float, height: float) -> list[str]:
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" rx="2"'
    if not here:
        return [f'<rect class="nothing" {box}/>']
    exact = int(sum(column(here, side, "exact")))
    right = sum(column(here, side, "right")) / len(here)
    title = f"{exact} of {len(here)} exact, {right:.0%} of the tokens right"
    opacity = 0.06 + 0.94 * exact / len(here)
    shade = f'<rect class="heat" fill-opacity="{opacity:.2f}" {box}><title>{escape(title)}</title></rect>'
    label = _text(x + width / 2, y + height / 2 + 4, f"{exact}/{len(here)}", kind="cell strong" if opacity > 0.6 else "cell")
    return [shade, label]


def loss_curves(loss: LossResult) -> str:
    """Nats above dense (the zero line) by position; where there is no dense, the loss itself."""
    sides = in_order(loss.sides)
    dense = loss.sides.index(DENSE) if DENSE in loss.sides else None
    curves: dict[str, list[tuple[int, float]]] = {}
    for side in sides:
        index, points = loss.sides.index(side), []
        if index == dense:
            continue
        for place in loss.places:
            value, base = place.nats[index], 0.0 if dense is None else place.nats[dense]
            if value is not None and base is not None:
                points.append((place.position, value - base))
        curves[side] = points
    values = [value for points in curves.values() for _, value in points]
    low, high = min([0.0, *values]), max([0.0, *values])
    step = nice_step((high - low) or 1.0)
    low, high = math.floor(low / step) * step, max(math.ceil(high / step), 1) * step
    top, base, right = 10, 190, _WIDTH

    def up(value: float) -> float:
        return base - (value - low) / (high - low) * (base - top)

    def across(position: float) -> float:
        return _LEFT + position / loss.length * (right - _LEFT)

    parts = []
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        kind = "axis" if abs(value) < step / 2 else "line"
        parts += [_line(kind, _LEFT, up(value), right, up(value)), _text(_LEFT - 8, up(value) + 4, f"{value:.3g}", "end")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_text(across(share * loss.length), base + 18, f"{round(share * loss.length):,}"))
    for side, points in curves.items():
        path = "L".join(f"{across(position):.1f} {up(value):.1f}" for position, value in points)
        parts.append(f'<path class="curve {side}" d="M{path}"/>' if points else "")
        for position, value in points:
            title = f"{side}, position {position}: {signed(value, 3)} nats"
            dot = f'<circle class="dot {side}" cx="{across(position):.1f}" cy="{up(value):.1f}" r="3">'
            parts.append(f"{dot}<title>{escape(title)}</title></circle>")
    what = "loss" if dense is None else "loss above dense"
    return picture(_WIDTH + 20, base + 26, f"{what} by position in nats a token: {', '.join(curves)}", parts)


def nice_step(span: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts ``span`` into about four."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)


def recall_bars(layers: Sequence[LayerRecall], chance: float | None) -> str:
    """How often each layer read the answers' blocks: bars, mean over heads; ticks, at least one head; dashed, blindly."""
    top, base, right = 10, 150, _WIDTH
    width = (right - _LEFT) / len(layers)

    def up(share: float) -> float:
        return base - share * (base - top)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts += [_line("line", _LEFT, up(share), right, up(share)), _text(_LEFT - 8, up(share) + 4, f"{share:.0%}", "end")]
    every = max(1, math.ceil(len(layers) / 16))
    for index, layer in enumerate(layers):
        x = _LEFT + index * width
        title = f"layer {layer.layer}: {layer.heads:.0%} of heads, {layer.any_head:.0%} by at least one"
        size = f'width="{max(width - 2, 1):.1f}" height="{base - up(layer.heads):.1f}"'
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{up(layer.heads):.1f}" {size}><title>{escape(title)}</title></rect>'
        )
        parts.append(_line("tick", x + 1, up(layer.any_head), x + max(width - 1, 2), up(layer.any_head)))
        if index % every == 0:
            parts.append(_text(x + width / 2, base + 16, str(layer.layer)))
    if chance is not None:
        parts.append(_line("chance", _LEFT, up(chance), right, up(chance)))
    words = f"recall of the answers' blocks in {len(layers)} layers, mean over heads"
    return picture(_WIDTH + 10, base + 22, words, parts)
