"""The examples do what their first lines say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT

EXAMPLES = ROOT / "examples"


def run_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_export_own_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("export_own_module").main(tmp_path / "new" / "folder") < 1e-5
    printed = capsys.readouterr().out
    assert "routed nodes: ['CoarseRoute', 'FineRoute', 'RoutedAttention'" in printed
    assert (tmp_path / "new" / "folder" / "encoder.onnx").is_file()


def test_export_own_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    difference, verdict = run_example("export_own_router").main(tmp_path / "new" / "folder")
    assert difference < 1e-5 and verdict.passed
    printed = capsys.readouterr().out
    assert "0 SelectBlocks: 152 choices, 152 equal, 0 blocks excused at a near-tie, 0 wrong" in printed
    assert "against PyTorch (portable bodies, CPU kernels): equal" in printed
