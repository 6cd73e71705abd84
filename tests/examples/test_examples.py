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


def test_export_image_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every choice in both executions is PyTorch's, by score and, where regions tie, by index."""
    verdicts = run_example("export_image_layer").main(tmp_path / "new" / "folder")
    for verdict, images in zip(verdicts, (3, 1), strict=True):
        (selection,) = verdict.selections.values()
        assert verdict.passed and verdict.executions == ("portable bodies", "CPU kernels")
        assert selection.exact == selection.rows == 2 * 16 * images
        assert max(judged.error for judged in verdict.computations.values()) < 1e-5
    assert "nothing: equal in portable bodies, CPU kernels" in capsys.readouterr().out


def test_router_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, and the two ways choose in comparable times: the bound is loose, for a busy machine."""
    times = run_example("router_cost").main(["--rounds", "2", "--shapes", "3x40"])["3x40"]
    assert set(times) == {f"{what} {how}" for what in ("bodies", "kernels") for how in ("fused", "scored")} | {
        "choice fused",
        "choice given",
    }
    assert times["bodies scored"] < 3 * times["bodies fused"] and times["choice given"] < 3 * times["choice fused"]
    assert capsys.readouterr().out.startswith("3 tokens, 40 blocks: bodies fused ")
