"""The report's page: it stands alone, says everything, and shows hostile text as text."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bilevel.export.report import html as report_html
from bilevel.export.report.html import render_page
from bilevel.export.report.judgements import Margins, TensorResult, Tolerance
from bilevel.export.report.map import column_points
from bilevel.export.report.model import Report, Word
from bilevel.export.report.summary import layer_map, shorten, verdict_lines, visible
from bilevel.export.report.svg import Axis, histogram, histogram_range, interval, layer_chart, log_range, power_of_ten
from bilevel.export.report.words import MOST_LISTED, differing_words, shade_bounds, word_spans
from tests.export.report.report_build import build
from tests.export.report.report_samples import ALL, HOSTILE, changed, deep, failing, passing

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's elements, and what is visible of it."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source, self.open, self.elements = source, list[str](), list[tuple[str, dict[str, str | None]]]()
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], "an element is left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.elements if "id" in attrs]

    def classes(self) -> Counter[str]:
        return Counter(name for _, attrs in self.elements for name in (attrs.get("class") or "").split())

    def words(self) -> str:
        """The text of the element that holds the judged text, as a browser would copy it."""
        inside = re.search(r'<div id="words"[^>]*>(.*?)</div>', self.source, re.DOTALL)
        assert inside is not None
        return "".join(Page(inside[1]).texts)


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(render_page(make())) for name, make in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_page_is_whole_and_alone(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    ids = page.ids()
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base"), "the page loads nothing"
        assert not {key for key in attrs if key.startswith("on") or key in ("src", "style", "srcset")}
        href = attrs.get("href") or "#"
        assert href == "report.json" or (href.startswith("#") and (href == "#" or href[1:] in ids)), href
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not re.search(r"url\(|@import|https?:", page.source.replace("http-equiv", ""))
    assert "\x1b" not in page.source and "\u202e" not in page.source and "\x00" not in page.source


@pytest.mark.parametrize("name", ALL)
def test_page_says_everything(pages: dict[str, Page], name: str) -> None:
    report, page = ALL[name](), pages[name]
    assert ("Parity holds" if report.passed else "Parity fails") in page.text
    for line in verdict_lines(report):
        assert " ".join(visible(shorten(line.text)).split()) in page.text
    sections = {"layers", "margins", "errors", "end", "invariants", "compared"}
    sections |= {"structure"} if report.structure else set()
    sections |= {"failure"} if report.failure else set()
    sections |= {"rounding"} if report.weights != "fp32" else set()
    sections |= {"text", "words", "word"} if report.words else set()
    assert sections <= set(page.ids())
    for entry in [*report.selection, *report.computation, *report.invariants]:
        assert " ".join(visible(entry.name).split()) in page.text
    if report.words:
        assert page.words() == "".join(visible(word.text) for word in report.words)


def test_every_picture_has_words(pages: dict[str, Page]) -> None:
    for page in pages.values():
        pictures = [attrs for tag, attrs in page.elements if tag == "svg"]
        assert pictures and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
        assert not re.search(r'="[^"]*\b(nan|inf|None)\b', "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)))


def test_policy_names_the_script_and_the_style(pages: dict[str, Page]) -> None:
    page = pages["hostile"]
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    for kind in ("style", "script"):
        inside = re.search(f"<{kind}>(.*?)</{kind}>", page.source, re.DOTALL)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'")


def test_hostile_text_stays_text(pages: dict[str, Page]) -> None:
    page = pages["hostile"]
    assert visible(HOSTILE) in page.text and "49" not in page.words()
    assert page.source.count("<img") == 0 and "</script><" not in page.source


def test_words_show_states_and_whitespace() -> None:
    words = [
        Word("  a\n", "same", (), (), 3e-6),
        Word("\n", "excused", ("level 1",), (), 1e-7),
        Word("<b>", "wrong", (), ("layer 3 level 2",), None),
        Word(" ", "wrong", ("level 1",), ("layer 0 experts",), 0.5),
        Word("z", "same", (), (), None),
    ]
    page = Page(str(word_spans(words, (1e-6, 1e-5, 1e-4))))
    assert "".join(page.texts) == "  a\n\n<b> z"
    assert [attrs.get("class") for _, attrs in page.elements] == ["m2", "excused newline", "wrong", "wrong blank", None]
    assert [attrs.get("data-m") for _, attrs in page.elements] == ["3.0e−6", "1.0e−7", "", "0.5", None]
    titles = [attrs.get("title") for _, attrs in page.elements]
    assert titles[1] == "excused at a near-tie: level 1"
    assert titles[3] == "wrong: layer 0 experts; excused at a near-tie: level 1"
    assert [word["index"] for word in differing_words(words)] == [2, 3, 1]


def test_many_differing_words_are_listed_in_part() -> None:
    report = deep(2)
    words = tuple(replace(word, state="wrong", wrong=("level 1",)) for word in report.words)
    page = Page(render_page(replace(report, words=words)))
    assert f"4,096 tokens that differ, the first {MOST_LISTED}" in page.text
    assert page.classes()["wrong"] >= 4096


def test_failing_cells_are_marked_and_the_start_is_one(pages: dict[str, Page]) -> None:
    report = failing()
    cells = [attrs for tag, attrs in pages["failing"].elements if tag == "td" and attrs.get("title")]
    wrong = [cell for cell in cells if "wrong" in (cell["class"] or "")]
    columns, rows = layer_map(report)
    assert len(wrong) == sum(not cell.passed for cells in rows.values() for cell in cells.values())
    (start,) = [cell for cell in cells if "origin" in (cell["class"] or "")]
    assert str(start["title"]).startswith("layer 3 level 2: 85.1 % of 1,365 rows equal, 406 wrong")
    assert [column.title for column in columns][:2] == ["operands", "blocks chosen"]


@pytest.mark.parametrize("layers", [1, 6, 48, 100])
def test_map_holds_any_depth(layers: int) -> None:
    report = build(layers, (0,), tokens=64)
    page = Page(render_page(report))
    rows = [attrs for tag, attrs in page.elements if tag == "table" and "map" in (attrs.get("class") or "").split()]
    assert len(rows) == math.ceil((layers + 3) / 28)
    assert list(layer_map(report)[1]) == ["embedding", "level 1", *(f"layer {i}" for i in range(layers)), "logits"]


def test_page_stays_small() -> None:
    assert len(render_page(passing()).encode()) < 120_000
    assert len(render_page(deep(100)).encode()) < 900_000


def test_unknown_parts_get_their_column() -> None:
    report = build(2, ())
    computation = changed(report.computation, report.computation[-2].name, part="gate", name="layer 1 gate")
    columns, rows = layer_map(replace(report, computation=computation))
    assert [column.title for column in columns][-2:] == ["gate", "output"] and "gate" in rows["layer 1"]


def test_axis() -> None:
    axis = Axis(0, 10, 100, 200)
    assert (axis(5), axis(-3), axis(99)) == (150, 100, 200)
    log = Axis(-4, 0, 0, 40, log=True)
    assert (log(1e-2), log(0), log(math.inf)) == (20, 0, 40)
    assert [label for _, label in log.ticks(6)] == ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"]
    assert [label for _, label in Axis(0.93, 1, 0, 1).ticks(6)] == ["94 %", "96 %", "98 %", "100 %"]
    assert power_of_ten(-12) == "10⁻¹²"


def test_log_range() -> None:
    assert log_range([3e-5, 0.2, None, 0.0, math.inf]) == (-5, 0)
    assert log_range([1e-3]) == (-4, -2)
    assert log_range([None, math.nan]) == (-1, 1)


def test_histogram_draws_every_bin_and_the_tolerance() -> None:
    entry = passing().selection[1]
    picture = str(histogram(entry, histogram_range([entry])))
    assert picture.count("z") - picture.count("zone") == sum(number > 0 for number in entry.margins.counts)
    assert 'class="tolerance"' in picture and 'class="tolerance-largest"' in picture and 'class="zone"' in picture
    assert f"{entry.margins.fragile} rows below their tolerance, 0 tied" in picture
    entry = replace(entry, tolerance=Tolerance(None, None), smallest_margin=None, margins=Margins((-1, 0), (0,), 0, 0))
    assert 'class="tolerance"' not in str(histogram(entry, histogram_range([entry])))


def test_chart_shows_what_is_not_finite_as_failing(pages: dict[str, Page]) -> None:
    titles = re.findall(r'<path class="cross"[^>]*><title>([^<]*)', pages["failing"].source)
    assert "logits: not finite" in titles and "layer 3: 9.8e-02" in titles
    assert len(titles) == sum(
        not cell.passed
        for cells in layer_map(failing())[1].values()
        for cell in cells.values()
        if isinstance(cell.worst, TensorResult)
    )


def test_interval_without_numbers() -> None:
    picture = str(interval(None, (None, None), 1e-4, None, log=True, words="nothing"))
    assert 'class="allowed"' in picture and 'class="dot"' not in picture and 'class="whisker"' not in picture


def test_shades_follow_the_tolerance() -> None:
    selection = passing().selection
    assert shade_bounds(selection) == pytest.approx([2.4e-6, 1.2e-5, 6e-5])
    assert (
        shade_bounds([])
        == shade_bounds([replace(selection[0], tolerance=Tolerance(None, None))])
        == pytest.approx([1e-6, 5e-6, 2.5e-5], rel=0.1)
    )


def test_layer_chart_of_one_point() -> None:
    report = build(1, ())
    _, rows = layer_map(report)
    points = column_points("attention", rows)
    assert [point.x for point in points] == [0]
    assert str(layer_chart("attention", points, (-8, 0))).count("<circle") == 1
    assert [point.x for point in column_points("output", rows)] == [-1, 0, 1]


def test_a_report_read_back_gives_the_same_page() -> None:
    assert render_page(Report.from_json(failing().to_json())) == render_page(failing())


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours "#rrggbb" (WCAG 2.2, relative luminance)."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str) -> None:
    style = Path(report_html.__file__).with_name("page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in style.split("@media", 2)[:2])
    colours = light if scheme == "light" else {**light, **dark}
    assert scheme == "light" or light.keys() == dark.keys()
    for ground in ("page", "card", "fail-page", "s0", "s1", "s2", "s3", "s4", "m1", "m2", "m3"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground
    for ground in ("page", "card", "fail-page"):
        for text in ("soft", "pass", "fail"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["near-ink"], colours["near"]) >= 4.5 and contrast(colours["tolerance"], colours["page"]) >= 4.5
    assert contrast("#b3201b", "#ffffff") >= 4.5
