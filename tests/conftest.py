"""Settings that every test shares. The property tests are derandomised: the same examples on every machine and every run."""

import atexit
import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.summary import fault_rates, skip_reasons

# Tests are tiny: threads only cost start-up time, and pytest-xdist brings its own parallelism.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What this user trusts is none of the tests'.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="bilevel-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

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
    """preset, weights, precision and caches="fp32" -> (checkpoint, bundle) of a tiny model. Shared: copy before a change."""
    from tests.support.tiny_models import export_once

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one export for all workers
    return lambda preset, *formats, **named: export_once(folder / "exported", preset, *formats, **named)


@pytest.fixture
def copied(exported: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """As ``exported``, but free to be changed."""

    def copy(*wanted: str) -> tuple[Path, Path]:
        checkpoint, bundle = exported(*wanted)
        return shutil.copytree(checkpoint, tmp_path / "checkpoint"), shutil.copytree(bundle, tmp_path / "bundle")

    return copy


def pytest_collection_finish() -> None:
    """What all tests share is imported by now and stays: the collector of garbage need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines of whole models first: the longest tests, behind which no process shall wait at the end."""
    items.sort(key=lambda item: "tests/export/engine/" not in item.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped for which reason, a line each, and the rates of the planted-fault suite."""
    for reason, count in skip_reasons(terminalreporter.getreports("skipped")).most_common():
        terminalreporter.write_line(f"skipped: {count} {'test' if count == 1 else 'tests'}: {reason}")
    if rates := fault_rates(terminalreporter):
        terminalreporter.write_line(rates)
