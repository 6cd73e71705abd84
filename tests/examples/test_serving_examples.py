"""The programs that measure a server, on a model made for tests: what they count and judge, not how long it takes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.doubles.bundle import write_bundle


def run_example(name: str, *arguments: str) -> tuple[int, str, Any]:
    """(exit status, what it printed, the JSON of its last line)."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(("bundle", " ")), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    return write_bundle(tmp_path / "bundle")


def test_the_benchmark_judges_by_its_goals(bundle: Path) -> None:
    status, printed, found = run_example("bench_serving.py", str(bundle), "--tokens", "12", "--rounds", "1")
    results = {result["name"]: result for result in found["results"]}
    assert list(results) == ["overhead", "batching", "equality"]
    assert "reading is left out: the model has fewer than 16384 positions" in printed
    assert results["equality"]["is_met"] and results["equality"]["measured"] == "9 of 9 answers"
    assert results["batching"]["is_met"] is None  # the goal is for a known size
    overhead = results["overhead"]
    assert overhead["is_met"] is (overhead["numbers"]["overhead"] <= 0.05)
    assert status == (0 if overhead["is_met"] else 1)
    assert printed.count("MISSED") == status


def test_the_pauses_beside_a_long_prompt_are_judged_by_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("bench_serving", ROOT / "examples" / "bench_serving.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_serving", bench)  # its dataclasses ask for it
    spec.loader.exec_module(bench)
    # 0.25 s between tokens until 10 s, 0.5 s afterwards, with one pause that a client has and the other has not.
    alone, beside = [0.25 * i for i in range(41)], [10 + 0.5 * i for i in range(1, 21)]
    late = [*alone, *(moment + (0.5 if moment > 15 else 0) for moment in beside)]
    for others, longest, is_met in (([[*alone, *beside]] * 2, 2.0, True), ([[*alone, *beside], late], 4.0, False)):
        pauses, first = bench.judge_pauses(100, others, 1.0, 10.0, 20.0, 4.0)
        assert (pauses.is_met, pauses.numbers["longest"], pauses.numbers["median"]) == (is_met, longest, 2.0)
        assert pauses.numbers["late"] == ([] if is_met else [[6.0, 4.0]])
        assert pauses.numbers["usual_s"] == 0.25 and pauses.numbers["longest_before"] == 1.0
        assert first.is_met and first.measured == "2.5 times (10 s, alone 4 s)"


def test_a_short_soak(bundle: Path) -> None:
    status, _, found = run_example("soak_serving.py", str(bundle), "--requests", "30")
    assert sum(found[kind] for kind in ("whole", "schema", "tool", "cancelled", "malformed")) >= 30
    assert (found["problems"], found["stuck"]) == (0, 0)
    assert status == (1 if found["growth"] > 0.05 else 0)


def test_the_cost_of_a_schema_is_measured(bundle: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "structured_cost.py"), str(bundle), "--rows", "2", "--steps", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--rounds", "1"], check=True, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("a step of 2 rows: ") and "following the schema" in done.stdout
