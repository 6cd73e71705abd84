"""``examples/route_report.py`` on a tiny model, and the gates in ``examples/smollm2``."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib import pyplot

from bilevel.export.route.adapter import load_adapter, save_adapter
from tests import ROOT
from tests.export.route.models import save_checkpoint
from tests.export.route.test_adapter import make_adapter

SMOLLM2 = ROOT / "examples" / "smollm2"


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("route_report")
    sys.path.remove(str(ROOT / "examples"))


def test_report(report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_checkpoint(tmp_path / "base")
    adapter = make_adapter(base)
    lines = [{"update": 0, "recall": 0.5, "needle": 0.4}, {"update": 50, "recall": 0.7, "needle": 0.6, "loss": 2.0}]
    adapter.log = {"training": lines}
    save_adapter(adapter, tmp_path / "adapter")
    folders = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    options = ["--contexts", "640,960", "--arm", "0.6:1", "--cases", "1"]
    assert report.main([*folders, *options]) == 0
    contexts = json.loads((tmp_path / "out" / "report.json").read_text())["contexts"]
    assert list(contexts) == ["640", "960"]
    for rows in contexts.values():
        assert [row["key"] for row in rows] == ["dense", "gate", "bounds", "mean"]
        assert all(row["share"] <= 0.6 and row["dense_layers"] == [1] and 4 < row["asked"] <= 16 for row in rows[1:])
        assert all(0 < row["needle_mass_kept"] <= 1 for row in rows[1:])
    assert contexts["960"][1]["blocks"] > contexts["640"][1]["blocks"]
    image = pyplot.imread(tmp_path / "out" / "curve.png")
    assert float(image.std()) > 0.02
    assert report.main([*folders, "--contexts", "640", "--arm", "0.34:1"]) == 2
    assert "leaves" in capsys.readouterr().err


def test_gates_of_smollm2() -> None:
    """At most 8 MB, every layer's, with the log of their training."""
    adapter = load_adapter(SMOLLM2)
    assert sum(path.stat().st_size for path in SMOLLM2.iterdir()) < 8e6
    assert set(adapter.gates) == set(range(30)) and adapter.routing.key == "gate"
    assert adapter.gates[0]["query_weight"].shape == (3, 192, 64)
    lines = json.loads((SMOLLM2 / "log.json").read_text())["training"]
    assert lines[-1]["needle"] > lines[0]["needle"] + 0.1
