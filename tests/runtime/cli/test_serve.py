"""``bilevel serve`` as a process: what it says, what it refuses before it starts, and how it ends on a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bilevel.bundle.format import load_bundle
from bilevel.machine import available_memory
from bilevel.runtime.cli.main import main
from bilevel.runtime.serve.limits import default_capacity
from tests import ROOT
from tests.doubles.bundle import MAX_POSITIONS, predict, write_bundle
from tests.support.http_server import free_port


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the line that it says when it is ready."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bilevel.runtime.cli.main", "serve", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        yield process, process.stderr.readline()
    finally:
        process.kill()
        process.communicate()


def test_it_serves_until_a_signal(tmp_path: Path) -> None:
    bundle, port = write_bundle(tmp_path), free_port()
    with served(str(bundle), "--port", str(port), "--model-name", "mine", "--max-rows", "3") as (process, line):
        size = f"3 rows of {MAX_POSITIONS} tokens, 0 MiB of caches"
        assert line == f"serving mine at http://127.0.0.1:{port} · {size} · ONNX Runtime on the CPU\n"
        body = json.dumps({"model": "mine", "prompt": [5, 6], "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["usage"]["completion_tokens"] == len(predict([5, 6], 4))
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
        assert (process.returncode, rest) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port 70000 must lie between 0 and 65535"),
        (["--max-rows", "0"], "--max-rows 0 must lie between 1 and 1024"),
        (["--max-queue", "-1"], "--max-queue -1 must lie between 0"),
        (["--capacity", "101"], "--capacity 101 must be at most this model's 100 positions"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere cannot be read"),
        (["--host", "256.1.1.1"], "256.1.1.1:8000 cannot be listened on"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["serve", str(write_bundle(tmp_path)), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_empty_key_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# nothing\n\n", encoding="utf-8")
    (tmp_path / "bundle").mkdir()
    assert main(["serve", str(write_bundle(tmp_path / "bundle")), "--api-key-file", str(keys)]) == 2
    assert "holds no key; write one on a line" in capsys.readouterr().err


def test_the_default_capacity_fits_the_memory(tmp_path: Path) -> None:
    bundle = load_bundle(write_bundle(tmp_path))
    assert default_capacity(bundle, 8, available_memory() or 0) == MAX_POSITIONS
    whole = bundle.state_bytes(8, bundle.round_up(MAX_POSITIONS))
    found = default_capacity(bundle, 8, whole)
    assert 1 <= found < MAX_POSITIONS
    assert whole / 8 < bundle.state_bytes(8, bundle.round_up(found + 1)) <= whole / 4


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("tensorrt", "the bundle has no engine of tensorrt; build one: bilevel build BUNDLE --backend tensorrt"),
        ("tensorrt-rtx", "the bundle has no engine of tensorrt-rtx; build one"),
    ],
)
def test_a_backend_without_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, message: str) -> None:
    assert main(["serve", str(write_bundle(tmp_path)), "--backend", backend]) == 2
    assert message in capsys.readouterr().err
