"""The largest of many numbers, and how far the few best logits of a row decide what a sampler takes from all of them.

A device that has picked the K best logits itself sends 516 bytes a row instead of 4 for every token of the vocabulary, and the
host ranks 64 numbers instead of all. Measured on one core of a server's CPU, for one row: a vocabulary of 8,192 / 32,768 /
151,936 tokens takes ``Sampler`` 4 / 10 / 27 us for the best token, 83 / 164 / 2,418 us with top-k, and 322 / 978 / 7,722 us
with top-p; its logits cross a bus of 6 GB/s in 5 / 22 / 101 us. So it is worth having where tokens are drawn, above about
16,384 tokens; greedy choice gains the copy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A device sums in fp32, in a tree: the relative error that is allowed for is some thirty times what fp32 rounds a log_sum of 16
# by.
_SUM_ERROR = 3e-5


@dataclass(frozen=True)
class Best:
    """The K best of a row's ``num_logits`` logits.

    ids: int [K], ascending. values: theirs, fp32 [K]. log_sum: of exp over all logits.
    """

    ids: NDArray[np.int32]
    values: NDArray[np.float32]
    log_sum: float
    num_logits: int

    @cached_property
    def shifted(self) -> NDArray[np.float64]:
        """The logits less the best one."""
        return self.values.astype(np.float64) - float(self.values.max())

    @property
    def is_usable(self) -> bool:
        """Whether everything is finite, and something is known to be better than all that is not here."""
        return bool(math.isfinite(self.log_sum) and np.isfinite(self.values).all() and self.shifted.min() < 0)

    def largest(self, count: int) -> NDArray[np.intp] | None:
        """Places of the ``count`` largest logits, and of those equal to the last of them; None where some may not be here."""
        if not 0 < count < self.ids.size:
            return None
        places = largest(self.shifted, count)
        return places if self.shifted[places].min() > self.shifted.min() else None

    def nucleus(self, temperature: float, top_p: float) -> NDArray[np.intp] | None:
        """Places, best first, of what ``nucleus`` keeps of all exp(logits / temperature); None where these do not tell.

        The sum over the logits that are not here is known only between bounds: what it leaves open is where the cut falls.
        """
        weights = np.exp(self.shifted / temperature)
        order = np.argsort(-weights, kind="stable")
        targets = top_p * (weights.sum() + np.array(self._rest(temperature))) * (1 - 1e-9, 1 + 1e-9)
        first, last = np.searchsorted(np.cumsum(weights[order]), targets)
        if first != last or last >= order.size or weights[order[last]] <= weights.min():
            return None
        return order[: first + 1]

    def _rest(self, temperature: float) -> tuple[float, float]:
        """Bounds of the sum of exp(x / temperature) over the logits x that are not here, the best of all being 0.

        Their sum at temperature 1 follows from log_sum; to another power p = 1 / temperature the terms y, none of which exceeds
        the least one here, obey: for p >= 1 mean(y)^p <= mean(y^p) and y^p <= y max(y)^(p-1); for p < 1 mean(y^p) <= mean(y)^p
        and sum(y)^p <= sum(y^p).
        """
        count, power = self.num_logits - self.ids.size, 1 / temperature
        if count == 0:
            return 0.0, 0.0
        total = math.exp(self.log_sum - float(self.values.max()))
        here, least = float(np.exp(self.shifted).sum()), float(self.shifted.min())
        most = count * math.exp(least)
        sums = [min(max(total * factor - here, 0.0), most) for factor in (1 - _SUM_ERROR, 1 + _SUM_ERROR)]
        means = [count * (each / count) ** power for each in sums]
        if power >= 1:
            return means[0], min(sums[1] * math.exp(least * (power - 1)), count * math.exp(least * power))
        return sums[0] ** power, min(means[1], count * math.exp(least * power))


def largest(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Ascending indices of the ``count`` largest of values [n], and of those equal to the last of them; linear time."""
    if count >= values.size:
        return np.arange(values.size)
    cut = values.size - count
    return np.flatnonzero(values >= np.partition(values, cut)[cut])


def nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices, best first, of the fewest largest weights [n] that reach ``top_p`` of their sum (Holtzman et al. 2020)."""
    target, count = top_p * weights.sum(), 64
    # Sorting only the best few is exact as soon as they reach the target.
    while weights[ids := largest(weights, count)].sum() < target and count < weights.size:
        count *= 8
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    return ids[: np.searchsorted(np.cumsum(weights[ids]), target) + 1]
