"""Other people's clients against SmolLM2: chats, streams, tools, structured answers; ``make real`` brings clients and model."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.http_server import NAME, RunningServer, running

BUNDLE, PYTHON = ROOT / "build" / "smollm2-bundle", ROOT / "build" / "clients" / "bin" / "python"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not BUNDLE.is_dir() or not PYTHON.is_file(), reason="make real brings SmolLM2 and the clients"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(BUNDLE, row_tokens=2048) as server:
        yield server


@pytest.mark.parametrize("name", ["instructor", "langchain_openai", "litellm", "llama_index"])
def test_a_client_works(server: RunningServer, name: str, tmp_path: Path) -> None:
    script = ROOT / "tests" / "real" / "client_calls.py"
    command = [str(PYTHON), str(script), name, f"{server.url}/v1", NAME]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stderr[-2000:]
