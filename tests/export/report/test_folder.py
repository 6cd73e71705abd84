"""The report: its schema, and the folder it is written into."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bilevel.errors import RequestError
from bilevel.export.report.folder import REPORT_SCHEMA, check_report_folder, report_json, write_report
from tests.export.report.report_samples import ALL, Report, as_read, failing, passing

VALIDATOR = jsonschema.Draft202012Validator(REPORT_SCHEMA)


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
