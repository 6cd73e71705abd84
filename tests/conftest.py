"""Settings that every test shares. The property tests are derandomised: the same examples on every machine and every run."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests are tiny: threads only cost start-up time, and pytest-xdist brings its own parallelism.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "bilevel", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bilevel")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random tensors are the same in every run, alone or among other tests."""
    if importlib.util.find_spec("torch") is None:
        return  # the runtime's tests need no PyTorch
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """preset, weights="fp32", precision="fp32" -> (checkpoint, bundle) of a tiny model. Shared: copy before a change."""
    from tests.support.tiny_models import export_once

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one export for all workers
    return lambda preset, weights="fp32", precision="fp32": export_once(folder / "exported", preset, weights, precision)


@pytest.fixture
def copied(exported: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """As ``exported``, but free to be changed."""

    def copy(*wanted: str) -> tuple[Path, Path]:
        checkpoint, bundle = exported(*wanted)
        return shutil.copytree(checkpoint, tmp_path / "checkpoint"), shutil.copytree(bundle, tmp_path / "bundle")

    return copy


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The two rates of the planted-fault suite, where it ran (``tests/export/check/test_faults.py``)."""
    rates = []
    for test, sentence in (
        ("test_fault_", "faults: {} of {} found at the right place"),
        ("test_harmless_", "harmless: {} of {} pass"),
    ):
        ran = {
            outcome: {r.nodeid for r in terminalreporter.getreports(outcome) if f"test_faults.py::{test}" in r.nodeid}
            for outcome in ("passed", "failed", "error")
        }
        wrong = ran["failed"] | ran["error"]
        if ran["passed"] or wrong:
            rates.append(sentence.format(len(ran["passed"] - wrong), len(ran["passed"] | wrong)))
    if rates:
        terminalreporter.write_line("; ".join(rates))
