"""Files that are whole or not there, and their hash. (Folders: ``test_checkpoint.py`` writes them.)"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import ExportError
from bilevel.folders import file_sha256, read_json, read_text, replacing, scratch, sweep, write_json


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_the_hash_of_a_file(size: int, tmp_path: Path) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_json_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ({"a": 1}, {"b": ["é"]}):
        write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content and path.read_bytes().endswith(b"\n")
    assert "é" in path.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_failing_disk_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"b": 2})
    assert json.loads(path.read_bytes()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def dead() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_writer_sweeps_what_killed_ones_left(tmp_path: Path, dead: int) -> None:
    """Whatever they wrote; what is under way, what is locked from elsewhere and what only looks alike stays."""
    for name in (f".a.partial-{dead}", f".b.json.partial-{dead}", f".c.gguf.partial-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("a", encoding="utf-8")
    (tmp_path / f".d.json.partial-{dead}").write_text("a", encoding="utf-8")
    kept = [tmp_path / name for name in (f".e.partial-{os.getpid()}", ".f.partial-x", f"g.partial-{dead}", f".h.other-{dead}")]
    for folder in kept:
        folder.mkdir()
    with scratch(tmp_path, "locked") as locked:
        elsewhere = locked.rename(tmp_path / f".i.partial-{dead}")  # as another container sees it
        with replacing(tmp_path / "new", ExportError):
            assert elsewhere.is_dir()
        assert {path.name for path in tmp_path.iterdir()} == {"new", elsewhere.name, *(path.name for path in kept)}
    sweep(tmp_path)
    assert not elsewhere.exists()


def test_a_folder_that_was_being_replaced_gets_its_name_back(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".bundle.previous-{dead}").mkdir()
    (tmp_path / f".other.previous-{dead}").mkdir()
    (tmp_path / "other").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "other"]


@pytest.mark.parametrize("read", [read_text, read_json])
def test_special_files_are_not_opened(read: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is a FIFO, not a file"):
        read(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(ValueError, match="is a socket, not a file"):
            read(tmp_path / "socket")
    with pytest.raises(ValueError, match="is a device, not a file"):
        read(Path("/dev/zero"))
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[" * 200_000, "nested too deep"),
        (b"9" * 5_000, "a number of thousands of digits"),
        (b"{", "Expecting"),
    ],
)
def test_json_that_cannot_be_read(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"is not valid JSON .*{problem}"):
        read_json(tmp_path / "a.json")
