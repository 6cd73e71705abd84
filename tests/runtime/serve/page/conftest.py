"""One Chromium and one server of a chat model for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles.bundle import edit_manifest, file_record, write_bundle
from tests.support.browser import CHROMIUM, Tab, open_tab
from tests.support.http_server import RunningServer, running

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of the one browser; ``Tab.open`` makes it a new one."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with open_tab(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="session")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_bundle(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    edit_manifest(folder, lambda m: m["files"].update({"chat_template.jinja": file_record(folder / "chat_template.jinja")}))
    return folder


@pytest.fixture(scope="session")
def server(chat_bundle: Path) -> Iterator[RunningServer]:
    """Of a model with a chat template."""
    with running(chat_bundle) as server:
        yield server
