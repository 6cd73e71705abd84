"""The folder that a report is written into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import RequestError
from bilevel.export.report.model import Report
from bilevel.export.report.write import check_report_folder, write_report
from tests.export.report.report_samples import failing, passing


def test_write_report(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    page = write_report(passing(), folder)
    assert page == folder / "index.html"
    assert Report.from_json((folder / "report.json").read_text(encoding="utf-8")) == passing()
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
