"""Settings that every test shares. The property tests are derandomised: the same examples on every machine and every run."""

import os

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
    import torch

    torch.manual_seed(0)
