"""The program that measures packed caches, on tiny bundles: that it asks every side, and what it says of their sizes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.bundle.format import load_bundle
from tests import ROOT


@pytest.mark.thorough
def test_every_side_is_measured(
    exported: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("cache_cost", ROOT / "examples" / "cache_cost.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    bundles = {kv: exported("two_level", caches="fp32" if kv == "fp32" else "int8")[1] for kv in program.CACHES}
    monkeypatch.setattr(program, "geometry_bundle", lambda name, weights, show, kv: bundles[kv])
    monkeypatch.setattr(program, "apart", program.measure)
    monkeypatch.setattr("sys.argv", ["cache_cost.py", "--contexts", "9", "--rounds", "1", "--steps", "2"])
    program.main()
    lines = capsys.readouterr().out.splitlines()
    sides = ["fp32 caches", "int8 caches", "int4 caches", "dense twin"]
    assert [line.split(":")[0] for line in lines] == [f"9 tokens, {side}" for side in sides]
    for line, kv in zip(lines, [*program.CACHES, None], strict=True):
        found = re.fullmatch(r".*: [\d.]+ ms, peak [\d.]+ GB, caches ([\d.]+) GB", line)
        bundle = (
            load_bundle(bundles["int8"], verify=False).dense_twin() if kv is None else load_bundle(bundles[kv], verify=False)
        )
        assert found is not None and float(found[1]) == round(bundle.state_bytes(1, 64) / 1e9, 3)
