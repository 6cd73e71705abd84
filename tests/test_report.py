"""The report: its schema, its folder, its page and its tables, on reports of six models and of hostile text."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bilevel.export.report import REPORT_SCHEMA, check_report_folder, report_json, write_report
from bilevel.export.report_html import render_page
from bilevel.export.report_summary import (
    by_part,
    layer_map,
    percent,
    scientific,
    short,
    shorten,
    verdict_lines,
    visible,
    worst_router,
    worst_tensor,
)
from bilevel.export.report_svg import Axis, histogram, histogram_range, interval, layer_chart, log_range, power_of_ten
from bilevel.export.report_terminal import print_report, print_summary
from bilevel.export.report_words import MOST_LISTED, differing_words, shade_bounds, word_spans
from bilevel.plugins.errors import RequestError
from tests.report_samples import HOSTILE, SAMPLES, Report, as_read, build, deep, failing, hostile, passing

VALIDATOR = jsonschema.Draft202012Validator(REPORT_SCHEMA)
ALL: dict[str, Callable[[], Report]] = {**SAMPLES, "hostile": hostile}
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


# The schema


@pytest.mark.parametrize("name", ALL)
def test_reports_follow_the_schema(name: str) -> None:
    report = ALL[name]()
    VALIDATOR.validate(report)
    VALIDATOR.validate(as_read(report))
    assert report["passed"] == all(report["verdicts"].values())


def test_schema_is_one_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(REPORT_SCHEMA)

    def fields(schema: dict[str, Any]) -> int:
        assert schema.get("description"), schema
        inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
        assert "properties" not in schema or schema["additionalProperties"] is False
        return 1 + sum(fields(field) for field in inner)

    assert fields(REPORT_SCHEMA) > 100


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r.update(schema=1), "2 was expected"),
        (lambda r: r.update(extra=1), "Additional properties"),
        (lambda r: r["selection"][0].pop("margins"), "'margins' is a required property"),
        (lambda r: r["selection"][0].update(level=3), "not one of"),
        (lambda r: r["selection"][0].update(exact_rate=1.1), "greater than the maximum"),
        (lambda r: r["words"][0].update(state="odd"), "not one of"),
        (lambda r: r.pop("failure"), "'failure' is a required property"),
        (lambda r: r.update(weights="int4"), "'activations' is a required property"),
        (lambda r: r["verdicts"].update(activations=True), "should not be valid"),
        (lambda r: r.update(model_sha256="abc"), "does not match"),
    ],
)
def test_schema_refuses(change: Callable[[Report], Any], words: str) -> None:
    report = passing()
    change(report)
    assert any(words in error.message for error in VALIDATOR.iter_errors(report))


def test_json_has_no_infinity() -> None:
    report = failing()
    report["end_to_end"]["teacher_forced"]["kl_interval"] = (math.nan, -math.inf)
    text = report_json(report)
    assert text.isascii() and "Infinity" not in text and "NaN" not in text
    read = json.loads(text)
    assert read["computation"][-1]["error"] is None
    assert read["end_to_end"]["teacher_forced"]["kl_interval"] == [None, None]
    assert report["computation"][-1]["error"] == math.inf, "the report itself stays as it is"


# The folder


def test_write_report(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    page = write_report(passing(), folder)
    assert page == folder / "index.html"
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == as_read(passing())
    (folder / "notes.txt").write_text("mine")
    write_report(failing(), folder)
    assert "Parity fails" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "notes.txt", "report.json"]
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name, content", [("index.html", "<title>mine</title>"), ("report.json", "[1]"), ("report.json", "{")])
def test_files_of_others_stay(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=f"{name} is no report of bilevel and stays as it is; give another folder"):
        write_report(passing(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        with pytest.raises(RequestError, match="file is not a folder; give another one"):
            check_report_folder(folder)


def test_an_index_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.html").mkdir()
    with pytest.raises(RequestError, match="index.html is no report"):
        check_report_folder(tmp_path)


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test that runs as root may write everywhere
    with pytest.raises(RequestError, match="may not be written to"):
        check_report_folder(tmp_path / "report")


@pytest.mark.parametrize("step", ["write", "replace"])
def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    write_report(passing(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    target = (Path, "write_text") if step == "write" else (os, "replace")
    monkeypatch.setattr(*target, full)
    with pytest.raises(RequestError, match="could not be written into .* \\(No space left on device\\); give another folder"):
        write_report(failing(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# The page


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
    assert ("Parity holds" if report["passed"] else "Parity fails") in page.text
    for line in verdict_lines(report):
        assert " ".join(visible(shorten(line.text)).split()) in page.text
    sections = {"layers", "margins", "errors", "end", "invariants", "compared"}
    sections |= {"structure"} if report["structure"] else set()
    sections |= {"failure"} if report["failure"] else set()
    sections |= {"rounding"} if report["weights"] != "fp32" else set()
    sections |= {"text", "words", "word"} if report["words"] else set()
    assert sections <= set(page.ids())
    for entry in [*report["selection"], *report["computation"], *report["invariants"]]:
        assert " ".join(visible(entry["name"]).split()) in page.text
    if report["words"]:
        assert page.words() == "".join(visible(word["text"]) for word in report["words"])


def test_every_picture_has_words(pages: dict[str, Page]) -> None:
    for page in pages.values():
        pictures = [attrs for tag, attrs in page.elements if tag == "svg"]
        assert pictures and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
        assert not re.search(r'="[^"]*\b(nan|inf|None)\b', "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)))


def test_policy_names_the_script_and_the_style(pages: dict[str, Page]) -> None:
    import base64
    import hashlib

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
        {"text": "  a\n", "state": "same", "excused": [], "wrong": [], "margin": 3e-6},
        {"text": "\n", "state": "excused", "excused": ["level 1"], "wrong": [], "margin": 1e-7},
        {"text": "<b>", "state": "wrong", "excused": [], "wrong": ["layer 3 level 2"], "margin": None},
        {"text": " ", "state": "wrong", "excused": ["level 1"], "wrong": ["layer 0 experts"], "margin": 0.5},
        {"text": "z", "state": "same", "excused": [], "wrong": [], "margin": None},
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
    for word in report["words"]:
        word |= {"state": "wrong", "wrong": ["level 1"]}
    page = Page(render_page(report))
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
    rows = [attrs for tag, attrs in page.elements if tag == "table" and attrs.get("class") == "map"]
    assert len(rows) == math.ceil((layers + 3) / 28)
    assert list(layer_map(report)[1]) == ["embedding", "level 1", *(f"layer {i}" for i in range(layers)), "logits"]


def test_page_stays_small() -> None:
    assert len(render_page(passing()).encode()) < 120_000
    assert len(render_page(deep(100)).encode()) < 900_000


def test_unknown_parts_get_their_column() -> None:
    report = build(2, ())
    report["computation"][-2] |= {"part": "gate", "name": "layer 1 gate"}
    columns, rows = layer_map(report)
    assert [column.title for column in columns][-2:] == ["gate", "output"] and "gate" in rows["layer 1"]


# The pictures


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
    entry = passing()["selection"][1]
    picture = str(histogram(entry, histogram_range([entry])))
    assert picture.count("z") - picture.count("zone") == sum(number > 0 for number in entry["margins"]["counts"])
    assert 'class="tolerance"' in picture and 'class="tolerance-largest"' in picture and 'class="zone"' in picture
    assert f"{entry['margins']['fragile']} rows below their tolerance, 0 tied" in picture
    entry |= {"tolerance": None, "smallest_margin": None, "margins": {"edges": [-1, 0], "counts": [0], "fragile": 0, "ties": 0}}
    assert 'class="tolerance"' not in str(histogram(entry, histogram_range([entry])))


def test_chart_shows_what_is_not_finite_as_failing(pages: dict[str, Page]) -> None:
    titles = re.findall(r'<path class="cross"[^>]*><title>([^<]*)', pages["failing"].source)
    assert "logits: not finite" in titles and "layer 3: 9.8e-02" in titles
    assert len(titles) == sum(
        not cell.passed for cells in layer_map(failing())[1].values() for cell in cells.values() if "error" in cell.entries[0]
    )


def test_interval_without_numbers() -> None:
    picture = str(interval(None, (None, None), 1e-4, None, log=True, words="nothing"))
    assert 'class="allowed"' in picture and 'class="dot"' not in picture and 'class="whisker"' not in picture


# The terminal


@pytest.mark.parametrize("name", ALL)
def test_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = ALL[name]()
    print_report(report)
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == f"parity {'holds' if report['passed'] else 'FAILS'} (41.3 s)"
    assert "\x1b" not in out and "\u202e" not in out
    for entry in report["structure"]:
        assert entry["name"] in out
    print_summary(report)
    summary = capsys.readouterr().out.splitlines()
    lines = [line for line in verdict_lines(report) if line.key != "structure" or not line.passed]
    assert len(summary) == len(lines) + ("effect" in report) + (report["failure"] is not None)
    for line, shown in zip(lines, summary, strict=False):
        assert shown.startswith(f"{line.title:12} {'pass' if line.passed else 'FAIL'}  ")


def test_summary_of_a_passing_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = passing()
    print_summary(report)
    selection, computation, ends, invariants = capsys.readouterr().out.splitlines()
    assert selection == "selection    pass  12285 choices of 9 routers: 0 wrong, 0 excused at a near-tie"
    worst = max(report["computation"], key=lambda entry: entry["error"])
    assert computation == f"computation  pass  largest error {worst['error']:.1e} of the largest magnitude ({worst['name']})"
    assert ends == "end to end   pass  KL 2.8e-13 nats a token, greedy text 256 of 256 tokens equal"
    assert invariants.startswith("invariants   pass  all 4 hold: all blocks kept equals dense, ")


def test_failing_report_ends_with_where_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    report = failing()
    print_report(report)
    out = capsys.readouterr().out
    for entry in report["computation"]:
        assert (f"│ {entry['name']} " in out.split("Tensors beyond")[1].split("End to end")[0]) is not entry["passed"]
    block = out.split("Where it starts")[1]
    for words in (
        "layer 3 level 2 (FineRoute)",
        "layer_3/route/Sub_41",
        "66 tokens in calls of 33, 33",
        "PyTorch keeps blocks [0, 2]",
    ):
        assert words in block
    assert out.index("Invariants") < out.index("Selection") < out.index("Where it starts")


def test_passing_sections_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    report = failing()
    report["verdicts"] |= {"computation": True, "end_to_end": True, "invariants": True}
    print_report(report)
    out = capsys.readouterr().out
    assert out.index("End to end") < out.index("Selection") < out.index("Where it starts")


def test_many_layers_take_few_rows(capsys: pytest.CaptureFixture[str]) -> None:
    report = deep()
    print_report(report)
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 60
    router = report["selection"][20] | {"unexcused": 4, "passed": False, "example": "row 3: other blocks"}
    report["selection"][20] = router
    print_report(report)
    out = capsys.readouterr().out
    assert f"│ {router['name']} " in out.split("Routers that choose wrongly")[1] and "row 3: other blocks" in out


# The words


def test_numbers_in_words() -> None:
    assert [scientific(value) for value in (0, 1.63e-6, None, math.inf)] == ["0", "1.6e-06", "not finite", "not finite"]
    assert [short(value, "-") for value in (1.63e-6, 0.182, 4.13, 123.4, 2e5, None)] == [
        "1.6e−6",
        "0.18",
        "4.1",
        "123",
        "2.0e5",
        "-",
    ]
    assert shorten("error 4.1e-07, 1e+05 allowed, model-1e") == "error 4.1e−7, 1e5 allowed, model-1e"
    assert [percent(rate) for rate in (1, 0.999999, 0.9993, 0.5, 0, None)] == [
        "100 %",
        "99.99 %",
        "99.93 %",
        "50.0 %",
        "0.0 %",
        "-",
    ]


def test_visible() -> None:
    assert visible("a\x00\x1b\x7f\r\n\t\ud800\u202eb") == "a␀␛␡␍\n\t\ufffd\ufffdb"
    assert visible("a\n\tb", newlines=False) == "a␤␉b"


def test_the_worst_is_the_first_that_fails_or_the_nearest_to_its_limit() -> None:
    tensors = [
        {"order": 3, "error": 0.5, "limit": 1.0, "passed": True},
        {"order": 4, "error": 0.2, "limit": 0.25, "passed": True},
    ]
    assert worst_tensor(tensors)["order"] == 4
    tensors += [
        {"order": 9, "error": 9.0, "limit": 1.0, "passed": False},
        {"order": 7, "error": None, "limit": 1.0, "passed": False},
    ]
    assert worst_tensor(tensors)["order"] == 7
    routers = passing()["selection"]
    routers[4]["excused"] = 1
    assert worst_router(routers) is routers[4]
    assert next(iter(by_part(passing()["computation"]))) == "embedding"


def test_shades_follow_the_tolerance() -> None:
    selection = passing()["selection"]
    assert shade_bounds(selection) == pytest.approx([2.4e-6, 2.4e-5, 2.4e-4])
    assert shade_bounds([]) == shade_bounds([{**selection[0], "tolerance": None}]) == pytest.approx([1e-6, 1e-5, 1e-4], rel=0.1)


def test_layer_chart_of_one_point() -> None:
    report = build(1, ())
    _, rows = layer_map(report)
    from bilevel.export.report_map import column_points

    points = column_points("attention", rows)
    assert [point.x for point in points] == [0]
    assert str(layer_chart("attention", points, (-8, 0))).count("<circle") == 1
    assert [point.x for point in column_points("output", rows)] == [-1, 0, 1]
