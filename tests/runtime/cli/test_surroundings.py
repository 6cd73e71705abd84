"""Commands whose terminal, disk or arguments are not what they should be: one sentence, status 2, and nothing is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bilevel.errors import BilevelError, harmless
from bilevel.runtime.cli.main import main
from tests import ROOT
from tests.doubles.bundle import edit_manifest, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    return write_bundle(folder)


def bilevel(*arguments: object, shell: str = "") -> subprocess.CompletedProcess[str]:
    """A run in a process of its own; shell: redirections."""
    command = f'exec "$0" -m bilevel.runtime.cli.main "$@" {shell}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed(closed: str, bundle: Path) -> None:
    run = bilevel("run", bundle, "a", "--max-tokens", "2", "--threads", "1", shell=closed)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    run = bilevel("inspect", bundle / "nothing", shell=closed)
    assert run.returncode == 2 and "Traceback" not in run.stderr


def test_an_output_without_room(bundle: Path) -> None:
    run = bilevel("inspect", bundle, shell="> /dev/full")
    assert run.returncode == 2 and run.stderr == "bilevel: error: No space left on device\n"


def test_a_checkpoint_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for command in (["run", str(tmp_path), "text"], ["inspect", str(tmp_path)], ["serve", str(tmp_path)]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path} is a checkpoint, not a bundle; make one of it: bilevel export {tmp_path} BUNDLE" in told
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main(["run", str(tmp_path / "model.gguf"), "text"]) == 2
    assert "is a file, not a bundle; make one of it: bilevel export" in capsys.readouterr().err


def test_a_manifest_does_not_steer_the_terminal(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(format="\x1b[2J\u202e\r\nbilevel: error: none"))
    assert main(["run", str(bundle), "a"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("bilevel: error: ") and told[:-1].isprintable()
    assert "\\x1b[2J\\u202e" in told


def test_harmless_text() -> None:
    assert harmless("a\tb\nc é 漢字 🦊") == "a\tb\nc é 漢字 🦊"
    assert harmless("\x1b]0;x\x07\x9b1m\u2066\ud800\0") == "\\x1b]0;x\\x07\\x9b1m\\u2066\\ud800\\x00"


def test_an_error_is_one_line_of_bounded_length() -> None:
    sentence = str(BilevelError("a" * 10_000 + "\n; do this"))
    assert len(sentence) < 2100 and "\n" not in sentence and sentence.endswith("; do this")


@pytest.mark.parametrize("command", ["run", "serve"])
def test_numbers_that_nobody_means(command: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(bundle), *(["a"] if command == "run" else []), "--threads", "100000"]) == 2
    assert "100000 must lie between 0" in capsys.readouterr().err
