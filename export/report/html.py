"""A report as one self-contained HTML page: no download, no build step, light and dark, from a phone's width up.

``page.html`` is the Jinja template, with ``page.css`` and ``page.js`` put into it. Everything that a report
says is text: Jinja escapes it, ``visible`` shows control characters as symbols, and the page's content security policy allows
only the one script and the one style sheet whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bilevel.export.report.judgements import Effect, EndToEnd, RouterResult
from bilevel.export.report.map import column_points, map_tables
from bilevel.export.report.model import Report
from bilevel.export.report.summary import (
    by_level,
    by_part,
    count,
    effect_sentence,
    layer_map,
    percent,
    route_kind,
    short,
    shorten,
    structure_sentence,
    verdict_lines,
    visible,
)
from bilevel.export.report.svg import Point, histogram, histogram_range, interval, layer_chart, log_range
from bilevel.export.report.words import differing_words, shade_bounds, word_counts, word_spans

GENERATOR = '<meta name="generator" content="bilevel check">'
_FOLDER = Path(__file__).resolve().parent
_SECTIONS = {
    "structure": "structure",
    "selection": "margins",
    "computation": "errors",
    "end_to_end": "end",
    "invariants": "invariants",
    "activations": "rounding",
}
SHOWN_HISTOGRAMS = 8  # of each kind of router


def render_page(report: Report) -> str:
    """The whole page as text."""
    style, script = (_read(f"page.{kind}") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    environment.filters.update(sci=short, shorten=shorten, percent=percent, count=count)
    template = environment.from_string(_read("page.html"))
    page = template.render(
        generator=Markup(GENERATOR), policy=policy, style=Markup(style), script=Markup(script), report=report, **_view(report)
    )
    return str(page)


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """A hash source of a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _shown(value: Any) -> Any:
    """What the template prints: text without control characters, markup as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _view(report: Report) -> dict[str, Any]:
    """Everything the template shows that the report does not hold as it is shown."""
    columns, rows = layer_map(report)
    words, bounds = report.words, shade_bounds(report.selection)
    return {
        "lines": verdict_lines(report),
        "sections": _SECTIONS,
        "facts": _facts(report),
        "structure": [structure_sentence(entry) for entry in report.structure],
        "columns": columns,
        "tables": map_tables(columns, rows, report.failure),
        "levels": _levels(report.selection),
        "charts": _charts(columns, rows),
        "parts": by_part(report.computation),
        "has_floor": any(tensor.floor is not None for tensor in report.computation),
        "ends": _ends(report.end_to_end),
        "effect": _effect(report.effect) if report.effect else None,
        "words": word_spans(words, bounds),
        "shades": bounds,
        "word_counts": word_counts(words),
        "differing": differing_words(words),
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    """What was compared, for the list at the page's end."""
    model, data = report.model, report.data
    layers = f"{count(model.layers, 'layer')}, preset {model.preset}, blocks of {model.block_size} tokens"
    routing = f", level 1 keeps {model.coarse_topk}" if model.coarse_topk is not None else ""
    routing += f", level 2 keeps {model.topk}" if model.preset != "dense" else ""
    experts = f"; experts in layers {', '.join(map(str, model.expert_layers))}" if model.expert_layers else ""
    return [
        ("Bundle", report.bundle),
        ("Graph, SHA-256", report.model_sha256),
        ("Checkpoint", report.against),
        ("Weights, SHA-256", report.checkpoint_sha256),
        ("Model", layers + routing + experts),
        ("Precision", f"{report.precision}, {report.rounded}"),
        ("Ran on", report.backend),
        ("Routed nodes ran as", ", ".join(report.executions)),
        ("Text", f"{count(data.tokens, 'token')} of {data.source}, {count(data.rows, 'row')}"),
        ("Calls of", f"{', '.join(map(str, data.calls))} tokens"),
        ("Took", f"{report.seconds:.1f} s"),
    ]


def _levels(selection: Sequence[RouterResult]) -> list[dict[str, Any]]:
    """Histograms by kind of router: of many only the ones to look at (failing, fragile, smallest margin), the rest folded."""
    span = histogram_range(selection)
    levels = []
    for kind, routers in by_level(selection).items():
        figures = [{"entry": r, "svg": histogram(r, span), "words": margin_words(r)} for r in routers]
        wanted = {id(router) for router in sorted(routers, key=_calmness)[:SHOWN_HISTOGRAMS]}
        shown, folded = ([figure for figure in figures if (id(figure["entry"]) in wanted) is here] for here in (True, False))
        levels.append({"kind": kind, "shown": shown, "folded": folded})
    return levels


def _calmness(router: RouterResult) -> tuple[Any, ...]:
    """Sorts routers by how little there is to see."""
    margin = router.smallest_margin
    return router.passed, -router.excused, -router.margins.fragile, math.inf if margin is None else margin


def margin_words(router: RouterResult) -> str:
    """What a histogram shows, in a sentence or two."""
    margins, rows = router.margins, router.rows
    if router.smallest_margin is None and not margins.ties:
        return f"{count(rows, 'row')}, none of which had a choice."
    text = f"{count(rows, 'row')}, smallest margin {short(router.smallest_margin, '0')}."
    fragile, ties = margins.fragile, margins.ties
    if fragile:
        text += f" {count(fragile, 'row')} fragile: rounding may decide."
    if ties:
        text += f" {count(ties, 'row')} tied exactly."
    return text if fragile or ties else f"{text} None fragile, none tied."


def _charts(columns: Sequence[Any], rows: dict[str, Any]) -> list[dict[str, Any]]:
    """One chart per computed column of the map, all on one scale."""
    series = {column.title: column_points(column.title, rows) for column in columns if column.kind == "computation"}
    span = log_range(number for points in series.values() for p in points for number in (p.value, p.floor, p.limit))
    return [{"title": title, "svg": layer_chart(title, points, span)} for title, points in series.items()]


def _ends(ends: EndToEnd) -> list[dict[str, Any]]:
    """Two groups of measurements, each judged as one: the next token, and greedy text."""
    forced, greedy = ends.teacher_forced, ends.greedy
    parted = f"; {greedy.excused} differ at a near-tie" if greedy.excused else ""
    return [
        {
            "title": "Next token, the text given",
            "detail": f"{count(forced.tokens, 'prediction')}; the largest KL is {short(forced.kl_max)}",
            "passed": forced.passed,
            "strips": [
                _strip("KL, nats a token", forced.kl_mean, forced.kl_interval, forced.limit, forced.floor_kl, log=True),
                _strip("same best token", forced.top1_agreement, forced.top1_interval),
            ],
        },
        {
            "title": "Greedy text",
            "detail": f"{greedy.agreed} of {greedy.tokens} tokens in {count(greedy.rows, 'row')}{parted}",
            "passed": greedy.passed,
            "strips": [_strip("equal tokens", greedy.agreement, greedy.interval, greedy.limit, greedy.floor)],
        },
    ]


def _strip(title: str, value: Any, bounds: Any, limit: Any = None, floor: Any = None, *, log: bool = False) -> dict[str, Any]:
    """One number with its interval, in words and as a picture."""
    show = short if log else percent
    words = f"{show(bounds[0])} to {show(bounds[1])}"
    if limit is not None:
        words += f", {show(limit)} allowed" if log else f", at least {show(limit)} asked"
    words += f", PyTorch’s own {show(floor)}" if floor is not None else ""
    svg = interval(value, bounds, limit, floor, log=log, words=f"{title}: {show(value)}, {words}")
    return {"title": title, "value": show(value), "words": words, "svg": svg}


def _effect(effect: Effect) -> dict[str, Any]:
    """What rounded weights changed: a sentence, and a chart of equal sets per kind of router with layers."""
    kinds: dict[str, list[Point]] = {}
    for entry in effect.routes:
        layer = re.match(r"layer (\d+) ", entry.name)
        if layer:
            point = Point(int(layer[1]), entry.exact_rate, None, None, True, entry.name)
            kinds.setdefault(route_kind(entry.name), []).append(point)
    lowest = min((p.value or 0.0 for points in kinds.values() for p in points), default=0.9)
    span = (max(lowest - (1 - lowest) * 0.2 - 0.001, 0.0), 1.0)
    charts = [
        {"title": f"{kind}: equal sets", "svg": layer_chart(kind, points, span, log=False)} for kind, points in kinds.items()
    ]
    return {"sentence": effect_sentence(effect), "charts": charts}
