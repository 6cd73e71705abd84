"""The folder that ``bilevel check --report`` writes: the page and the JSON that it was made from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bilevel.errors import RequestError
from bilevel.export.report.html import GENERATOR, render_page
from bilevel.export.report.model import Report

JSON_FILE, PAGE_FILE = "report.json", "index.html"


def check_report_folder(folder: Path) -> None:
    """Raise RequestError where a report could not be written, so that a long check need not run first.

    Files of the same names are replaced only if they come from here.
    """
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise RequestError(f"{nearest} is not a folder; give another one for the report")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{nearest} may not be written to; give another folder for the report")
    for name, ours in ((PAGE_FILE, _is_our_page), (JSON_FILE, _is_our_json)):
        path = folder / name
        if (path.exists() or path.is_symlink()) and not ours(path):
            raise RequestError(f"{path} is no report of bilevel and stays as it is; give another folder for the report")


def _is_our_page(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return GENERATOR in file.read(2000)
    except OSError:
        return False


def _is_our_json(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"schema", "verdicts"} <= content.keys()


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.json`` and ``index.html`` into ``folder``, which is made if need be; returns the page's path.

    Both files are complete before either takes its name; earlier reports, of any version, are replaced and other files stay.
    Raises RequestError.
    """
    folder = Path(folder)
    check_report_folder(folder)
    contents = {JSON_FILE: report.to_json(indent=1) + "\n", PAGE_FILE: render_page(report)}
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial[name].write_text(content, encoding="utf-8", newline="\n")
        for name, path in partial.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise RequestError(
            f"the report could not be written into {folder} ({error.strerror or error}); give another folder"
        ) from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return folder / PAGE_FILE
