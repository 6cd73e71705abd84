"""A report as one self-contained HTML page: no script, no download, light and dark, from a phone's width up.

All text of a report is escaped, and the page's content security policy allows its one style sheet only.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bilevel.runtime.quality.exams import NEEDLES
from bilevel.runtime.quality.model import DENSE, QualityReport, Score
from bilevel.runtime.quality.pictures import heat_map, loss_curves, recall_bars
from bilevel.runtime.quality.results import in_order
from bilevel.runtime.quality.words import LABELS, NAMES, number, signed, spread

_STYLE = Path(__file__).with_name("page.css")


def render_page(report: QualityReport) -> str:
    """The whole page as text."""
    style = _STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"What routing costs: {report.bundle}"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="generator" content="bilevel quality">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
        _header(report),
        "<main>",
        *_sections(report),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _header(report: QualityReport) -> str:
    floors = ""
    for floor in report.floors:
        mark = '<span class="pass">✓ holds</span>' if floor.passed else '<span class="fail">✕ missed</span>'
        value = f"{number(floor.value)}{spread(floor.interval)}; {escape(floor.words)}"
        floors += f"<li>{mark} {escape(floor.name)} at least {floor.asked:g}: {value}</li>"
    return (
        f'<header>\n<p class="kind">bilevel quality</p>\n<h1>What routing costs</h1>\n<p><b>{escape(report.bundle)}</b><br>'
        f"{escape(report.routing)}</p>\n" + (f'<ul class="plain">{floors}</ul>\n' if floors else "") + "</header>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _sections(report: QualityReport) -> list[str]:
    sections = []
    if report.tasks:
        sections.append(_section("Answers", _heat_maps(report), _answers(report)))
    if report.loss is not None:
        sections.append(_loss(report))
    sections.append(_reading(report))
    sections.append(_section("What was measured", _facts(report)))
    return sections


def _heat_maps(report: QualityReport) -> str:
    facts = [answer for answer in report.answers if answer.task == NEEDLES]
    if not facts:
        return ""
    maps = "".join(
        f"<figure><figcaption><b>{NAMES[side]}</b>, hidden facts answered exactly</figcaption>{heat_map(facts, side)}</figure>"
        for side in in_order(facts[0].sides)
    )
    words = "Rows: tokens of the text. Columns: where in it the fact stands, from its beginning to its end."
    return f'<p class="soft">{words}</p>\n<div class="grid">{maps}</div>'


def table(columns: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]], left: int = 1) -> str:
    """rows: (whether a group begins, its cells); the first ``left`` columns hold text."""

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = (' class="text"' if index < left else "" for index in range(len(values)))
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    kinds = {True: ' class="first"', False: ""}
    body = "".join(f"<tr{kinds[first]}>{cells('td', values)}</tr>\n" for first, values in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _answers(report: QualityReport) -> str:
    rows: list[tuple[bool, Sequence[str]]] = []
    for task in report.tasks:
        scores = {score.side: score for score in task.scores}
        for index, side in enumerate(in_order(tuple(scores))):
            head = [LABELS[task.task], f"{task.length:,}"] if index == 0 else ["", ""]
            rows.append((index == 0, [*head, NAMES[side], *_numbers(scores[side], task.questions)]))
    columns = ("task", "tokens", "side", "exact", "tokens right", "nats a token", "above dense")
    return table(columns, rows, 3)


def _numbers(score: Score, questions: int) -> list[str]:
    low, high = score.exact_interval
    above = "" if score.nats_above is None else f"{signed(score.nats_above)}{spread(score.nats_above_interval, has_sign=True)}"
    return [
        f"{score.exact} of {questions} ({100 * low:.0f} to {100 * high:.0f} %)",
        f"{100 * score.right:.0f} %",
        f"{number(score.nats)}{spread(score.nats_interval)}",
        above,
    ]


def _loss(report: QualityReport) -> str:
    loss = report.loss
    assert loss is not None
    has_dense = DENSE in loss.sides
    sides = [side for side in in_order(loss.sides) if side != DENSE or not has_dense]
    legend = "".join(f'<li><i class="{side}"></i>{NAMES[side]}</li>' for side in sides)
    rows: list[tuple[bool, Sequence[str]]] = []
    for side in in_order(loss.sides):
        index = loss.sides.index(side)
        above = loss.above[index]
        words = "" if above is None else f"{signed(above, 3)}{spread(loss.above_intervals[index], has_sign=True)}"
        rows.append((False, [NAMES[side], number(loss.nats[index], 3), words, number(loss.far_nats[index])]))
    far = "where the far text matters"
    words = f"{loss.tokens:,} tokens of plain texts of {loss.length:,}, by their position."
    words += " Dense is the zero line." if has_dense else ""
    after = ""
    if loss.far_tokens is not None:
        recovered = "nothing to recover" if loss.recovered is None else f"{loss.recovered:.0%}{spread(loss.recovered_interval)}"
        after = f"<p>The far text matters for {loss.far_tokens} tokens: there dense beats sink + window by more than 0.1 nat. "
        after += f"Of that loss the routes recover: {recovered}.</p>"
    return _section(
        "Loss over positions",
        f'<p class="soft">{words}</p>\n<ul class="legend">{legend}</ul>\n<figure>{loss_curves(loss)}</figure>',
        table(("side", "nats a token", "above dense", far), rows),
        after,
    )


def _reading(report: QualityReport) -> str:
    rows = [
        (False, (f"{each.length:,}", f"{each.tokens:,.0f}", f"{each.context:,.0f}", f"{each.share:.0%}"))
        for each in report.reading
    ]
    parts = [table(("texts of", "tokens read", "of", "share"), rows)] if rows else ["<p>The bundle tells no routes.</p>"]
    recall = report.recall
    if recall is not None and recall.heads is not None:
        level_1 = "" if recall.candidates is None else f"Level 1 had {recall.candidates:.0%} of them among its candidates. "
        parts.append(
            f"<p>In {recall.questions} questions the answer stood in blocks that are not always read. {level_1}"
            f"Level 2 read {recall.heads:.0%} of them, mean over layers and heads.</p>"
        )
        caption = "Bars: mean over heads. Ticks: at least one head. Dashed: choosing blindly. Below: the layer."
        parts.append(f"<figure>{recall_bars(recall.layers, recall.chance)}<figcaption>{caption}</figcaption></figure>")
    return _section("What was read", *parts)


def _facts(report: QualityReport) -> str:
    plan = report.plan
    facts = [(NAMES[side.name], f"{side.what}; {side.backend} on {side.device}, {side.seconds:.0f} s") for side in report.sides]
    facts += [(NAMES.get(note.name, note.name), f"not measured: {note.reason}") for note in report.not_measured]
    facts += [
        ("Machine", report.machine),
        ("Questions", f"{plan.facts} for each task and length, seed {plan.seed}, put as {plan.wording}"),
        ("Text", f"{plan.text}, SHA-256 {plan.text_sha256[:16]}…; Python {plan.python}"),
        ("Intervals", "95 %: Wilson's for shares, bootstrap over questions or stretches of text for the rest"),
        ("Took", f"{report.seconds:.0f} s, bilevel {report.bilevel}"),
    ]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f"<dl>{rows}</dl>"
