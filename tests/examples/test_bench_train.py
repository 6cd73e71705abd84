"""examples/bench_train.py: both sides run in processes of their own, and the numbers mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import bench_train

    return bench_train


def test_a_small_run_measures_both_sides(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "folder" / "bench.json", tmp_path / "bench.png"
    arguments = ["--geometry", "tiny", "--layers", "1", "--lengths", "64", "--rounds", "1", "--recompute"]
    assert bench.main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    for side in bench.SIDES:
        line = result[side]
        assert line["steps"] == 1 and line["tokens_per_s"] == pytest.approx(64 / line["s"])
        assert 0 < line["before_mb"] <= line["peak_mb"]
    assert picture.stat().st_size > 0 and "dense / two-level" in capsys.readouterr().out


def test_a_side_that_takes_too_long_is_left_out(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--geometry", "tiny", "--layers", "1", "--lengths", "64", "--rounds", "1", "--limit", "0.01"]) == 0
    assert capsys.readouterr().out.count("not within 0.01 s") == 2


def test_exponents_are_slopes_of_logarithms(bench: ModuleType) -> None:
    results = [{"length": n, "dense": {"s": 3 * n**2, "peak_mb": 100 + 5 * n, "before_mb": 100}} for n in (10, 20, 70)]
    assert bench.exponent(results, "dense", "s") == pytest.approx(2)
    assert bench.exponent(results, "dense", "peak_mb", "before_mb") == pytest.approx(1)
    assert bench.exponent(results[:1], "dense", "s") is None
    unchanged = {"length": 30, "dense": {"s": 1, "peak_mb": 100, "before_mb": 100}}
    assert bench.exponent([unchanged, *results], "dense", "peak_mb", "before_mb") == pytest.approx(1)


@pytest.mark.parametrize("lengths", ["2x", "0", ""])
def test_lengths_that_are_no_numbers_of_tokens_are_refused(
    bench: ModuleType, lengths: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--lengths", lengths])
    assert "--lengths" in capsys.readouterr().err
