"""``bilevel inspect``: the same facts as JSON, as lines and as tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bilevel.runtime.cli import main as cli
from tests.doubles.bundle import edit_manifest, write_bundle

EXPERTS = {"num_experts": 8, "top_k": 2, "layers": [0]}
CHECK = {"passed": True, "model_sha256": "0123456789abcdef" * 4, "largest_error": 1e-05, "layers": [{"layer": 0}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_bundle(tmp_path)
    edit_manifest(folder, lambda manifest: manifest["config"].update(experts=EXPERTS))
    edit_manifest(folder, lambda manifest: manifest["checks"].append(CHECK))
    return folder


def test_inspect_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--json", str(folder)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == {"model_type": "llama", "num_hidden_layers": 1, "head_dim": 1}
    assert facts["routing"] == {"preset": "two_level", "topk": 3}
    assert facts["experts"] == EXPERTS
    assert facts["limits"] == {"block_size": 8, "max_positions": 100, "prefill_chunk": 16}
    assert facts["operators"] == {"CoarseRoute": 1}
    assert facts["checks"] == [CHECK]
    # Per token 8 bytes of id, 4 of key, and 4 of block key for every 8 tokens; 100 positions need 13 blocks.
    assert facts["state_bytes"] == {"per_1000_tokens": 12500, "at_max_positions": 104 * 12 + 13 * 4}
    assert facts["files"]["model.onnx"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert {file["status"] for file in facts["files"].values()} == {"ok"}


LINES = [
    "layers            1",
    "preset            two_level",
    "num experts       8",
    "CoarseRoute       version 1",
    "per 1000 tokens   12.2 KiB",
    "at 100 positions  1.3 KiB",
    "1                 passed True, model sha256 0123456789ab..., largest error 1e-05, layers layer 0",
    "precision         float32",
]


def test_inspect_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in LINES if line not in lines] == []


def test_inspect_tables_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for line in LINES:
        name, value = line.split("  ", 1)
        assert any(name in row and value.strip() in row and "│" in row for row in out.splitlines()), line


def test_inspect_terminal_without_rich(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "│" not in out and LINES[0] in out


def test_inspect_reports_damaged_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.data").unlink()
    assert cli.main(["inspect", "--json", str(folder)]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert files["model.data"]["status"] == "is missing"
    assert files["config.json"]["status"].startswith("holds 2 bytes instead of")
    assert files["model.onnx"]["status"] == "ok"


def test_inspect_refuses_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err
