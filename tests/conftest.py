"""Settings that every test shares. The property tests are derandomised: the same examples on every machine and every run."""

import importlib.util
import os
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
    """preset, weights="fp32", precision="fp32" -> (checkpoint, bundle) of a tiny model. Shared by all tests: copy before changing anything."""
    from tests.tiny_models import export_once

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one export for all workers
    return lambda preset, weights="fp32", precision="fp32": export_once(folder / "exported", preset, weights, precision)
