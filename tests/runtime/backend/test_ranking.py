"""What the few best logits of a row decide: always what all of them decide, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bilevel.runtime.backend.ranking import Best
from bilevel.runtime.generate.sampling import Sampler, SamplingParams, log_probabilities

VOCAB, COUNT = 300, 16


class Remote:
    """A row on a device that ranks; counts how often all of it was fetched."""

    def __init__(self, logits: NDArray[np.float32], count: int = COUNT, order: NDArray[np.intp] | None = None) -> None:
        self.logits, self.num_fetched = logits, 0
        ids = np.sort((np.argsort(-logits, kind="stable") if order is None else order)[:count])
        with np.errstate(all="ignore"):
            log_sum = np.float32(np.log(np.exp(logits - logits.max(), dtype=np.float32).sum()) + logits.max())
        self.best: Best | None = Best(ids.astype(np.int32), logits[ids], float(log_sum), logits.size)

    def fetch(self) -> NDArray[np.float32]:
        self.num_fetched += 1
        return self.logits


def rows(number: int, sharpness: float, seed: int = 0) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return [(random.standard_normal(VOCAB) * sharpness).astype(np.float32) for _ in range(number)]


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=5, seed=3),
    SamplingParams(temperature=1.3, top_k=15, top_p=0.8, seed=3),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
    SamplingParams(temperature=0.6, top_p=0.9, seed=3),
    SamplingParams(temperature=1.6, top_p=0.6, seed=3),
    SamplingParams(temperature=1e-3, top_p=0.5, seed=3),
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_the_same_tokens_as_from_all(params: SamplingParams) -> None:
    """Whatever the distribution, the random stream included; mostly without all of them where it is as peaked as a model's.

    Above temperature 1 top-p knows less of what is not among the best.
    """
    for sharpness, most_fetched in ((6.0, 60 if params.temperature > 1.5 else 10), (2.0, 100), (0.1, 100)):
        whole, few = Sampler(params, VOCAB), Sampler(params, VOCAB)
        remotes = [Remote(logits) for logits in rows(100, sharpness)]
        assert [few.sample(remote) for remote in remotes] == [whole.sample(remote.logits) for remote in remotes]
        assert sum(remote.num_fetched for remote in remotes) <= most_fetched


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=1.0, top_k=COUNT, seed=3),
        SamplingParams(temperature=1.0, top_k=200, seed=3),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(temperature=1.0, top_k=4, repetition_penalty=1.2, seed=3),
    ],
    ids=str,
)
def test_what_the_best_do_not_tell_is_taken_from_all(params: SamplingParams) -> None:
    whole, few = Sampler(params, VOCAB, [1]), Sampler(params, VOCAB, [1])
    remotes = [Remote(logits) for logits in rows(10, 2.0)]
    assert [few.sample(remote) for remote in remotes] == [whole.sample(remote.logits) for remote in remotes]
    assert all(remote.num_fetched == 1 for remote in remotes)


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_ties(params: SamplingParams) -> None:
    """Few different values, so that ties lie at every cut; a device may pick any of those that tie."""
    random = np.random.default_rng(1)
    for levels in (1, 2, 4, 40):
        whole, few = Sampler(params, VOCAB), Sampler(params, VOCAB)
        for _ in range(40):
            logits = random.integers(0, levels, VOCAB).astype(np.float32)
            order = random.permutation(VOCAB)
            order = order[np.argsort(-logits[order], kind="stable")]
            remote = Remote(logits, order=order)
            assert few.sample(remote) == whole.sample(logits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    """Nothing is decided by the best alone; all of them are judged as ever."""
    (logits,) = rows(1, 2.0)
    logits[7] = bad
    remote = Remote(logits, order=np.argsort(-np.nan_to_num(logits, nan=-9.0), kind="stable"))
    assert remote.best is not None
    if bad == -np.inf:
        assert Sampler(SamplingParams(), VOCAB).sample(remote) == int(np.argmax(logits)) and remote.num_fetched == 0
        return
    with pytest.raises(Exception, match="logits that are not finite"):
        Sampler(SamplingParams(), VOCAB).sample(remote)


def test_all_of_a_small_vocabulary() -> None:
    """K is the whole vocabulary: nothing is left out, and top-p is decided."""
    params = SamplingParams(temperature=1.5, top_p=0.7, seed=2)
    whole, few = Sampler(params, 12), Sampler(params, 12)
    for logits in rows(20, 1.0):
        remote = Remote(logits[:12], 12)
        assert few.sample(remote) == whole.sample(logits[:12]) and remote.num_fetched == 0


def test_a_device_that_ranks_nothing() -> None:
    (logits,) = rows(1, 2.0)
    remote = Remote(logits)
    remote.best = None
    assert Sampler(SamplingParams(), VOCAB).sample(remote) == int(np.argmax(logits)) and remote.num_fetched == 1


def test_log_probabilities() -> None:
    (logits,) = rows(1, 2.0)
    remote, best = Remote(logits), int(np.argmax(logits))
    for count in (0, 1, 5):
        expected, found = log_probabilities(logits, best, count), log_probabilities(remote, best, count)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top] and len(found.top) == count
        np.testing.assert_allclose(
            [found.chosen, *(log for _, log in found.top)], [expected.chosen, *(log for _, log in expected.top)], atol=1e-5
        )
    assert remote.num_fetched == 0
    worst = int(np.argmin(logits))
    assert log_probabilities(remote, worst, 3) == log_probabilities(logits, worst, 3)
    assert log_probabilities(remote, best, COUNT) == log_probabilities(logits, best, COUNT)
    assert remote.num_fetched == 2
