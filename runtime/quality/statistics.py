"""Intervals of 95 %: of a share by Wilson, of a mean and of a paired difference by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
LEVEL, RESAMPLES = 0.95, 2000
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a share (E. B. Wilson, 1927); (0, 1) where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, _Z**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    reach = _Z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # Rounding may leave the end a hair inside of what was measured.
    return min(max(middle - reach, 0.0), share), max(min(middle + reach, 1.0), share)


def bootstrap(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], values: Sequence[Sequence[float]], seed: int = 0
) -> Interval | None:
    """The percentile interval of a statistic of rows that are drawn together, or None where it is nowhere defined.

    values: [n, columns], a row for each question, so that columns (sides) stay paired. statistic: of drawn rows
    [resamples, n, columns] -> [resamples]; a resample for which it is not finite is left out.
    """
    rows = np.asarray(values, np.float64)
    if len(rows) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(rows), size=(RESAMPLES, len(rows)))
    with np.errstate(all="ignore"):
        results = statistic(rows[drawn])
    results = results[np.isfinite(results)]
    if len(results) < RESAMPLES / 2:
        return None
    low, high = np.quantile(results, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Of a mean."""
    return bootstrap(lambda drawn: drawn[..., 0].mean(1), [[value] for value in values])


def difference_interval(values: Sequence[float], others: Sequence[float]) -> Interval | None:
    """Of mean(values) - mean(others), paired."""
    return bootstrap(lambda drawn: (drawn[..., 0] - drawn[..., 1]).mean(1), list(zip(values, others, strict=True)))


def ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    """sum(values) / sum(others); None where the latter is 0."""
    return sum(values) / sum(others) if sum(others) else None


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> Interval | None:
    """Of ``ratio``, paired."""
    return bootstrap(lambda drawn: drawn[..., 0].sum(1) / drawn[..., 1].sum(1), list(zip(values, others, strict=True)))
