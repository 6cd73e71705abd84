"""Intervals against closed forms, and that they hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.runtime.quality.statistics import difference_interval, mean_interval, ratio, ratio_interval, wilson


@given(trials=st.integers(1, 200), data=st.data())
def test_wilson_solves_its_equation(trials: int, data: st.DataObject) -> None:
    """At either end the share lies 1.96 standard errors away, of the end's own spread; the share lies inside."""
    successes = data.draw(st.integers(0, trials))
    share, bounds = successes / trials, wilson(successes, trials)
    assert 0 <= bounds[0] <= share <= bounds[1] <= 1
    for end in bounds:
        if 0 < end < 1:
            assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / trials, rel=1e-4, abs=1e-12)


def test_wilson_without_trials() -> None:
    assert wilson(0, 0) == (0, 1)
    assert wilson(14, 24) == pytest.approx((0.388, 0.755), abs=5e-4)


def test_mean_interval_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400).tolist()
    low, high = mean_interval(values) or (0.0, 0.0)
    middle, error = float(np.mean(values)), float(np.std(values)) / 20
    assert low == pytest.approx(middle - 1.96 * error, abs=0.05) and high == pytest.approx(middle + 1.96 * error, abs=0.05)


def test_pairs_stay_together() -> None:
    """Two sides that differ by a constant: the difference is certain, though each side alone is not."""
    values = np.random.default_rng(2).normal(0.0, 5.0, 50)
    assert difference_interval((values + 1).tolist(), values.tolist()) == pytest.approx((1, 1))
    low, high = mean_interval(values.tolist()) or (0.0, 0.0)
    assert high - low > 1


def test_ratios() -> None:
    assert ratio([1, 0, 1], [1, 1, 1]) == pytest.approx(2 / 3) and ratio([1, 0], [0, 0]) is None
    assert ratio_interval([1, 0], [0, 0]) is None, "nowhere defined"
    bounds = ratio_interval([1, 0, 1, 1] * 6, [1, 1, 1, 1] * 6)
    assert bounds is not None and bounds[0] < 0.75 < bounds[1] < 1


def test_one_value_has_no_interval() -> None:
    assert mean_interval([1.0]) is None and mean_interval([]) is None
