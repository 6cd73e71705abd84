"""The examples do what their first lines say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests import ROOT

EXAMPLES = ROOT / "examples"


def test_export_own_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("export_own_module", EXAMPLES / "export_own_module.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(tmp_path / "new" / "folder") < 1e-5
    printed = capsys.readouterr().out
    assert "routed nodes: ['CoarseRoute', 'FineRoute', 'RoutedAttention'" in printed
    assert (tmp_path / "new" / "folder" / "encoder.onnx").is_file()
