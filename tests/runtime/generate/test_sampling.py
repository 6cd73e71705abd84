"""Choosing tokens: the rules against definitions written out plainly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.errors import BundleError, RequestError
from bilevel.runtime.generate.sampling import Sampler, SamplingParams, largest, nucleus


def logits_of(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def draws(params: SamplingParams, logits: np.ndarray, count: int, **options: Any) -> list[int]:
    sampler = Sampler(params, logits.size, **options)
    return [sampler.sample(logits) for _ in range(count)]


def test_greedy_takes_the_lowest_of_equal_bests() -> None:
    assert draws(SamplingParams(), logits_of(0, 3, 1, 3), 2) == [1, 1]


def test_sample_leaves_the_logits_alone() -> None:
    logits = logits_of(1, 2, -3)
    draws(SamplingParams(temperature=0.5, top_k=2, top_p=0.9, repetition_penalty=2.0, seed=0), logits, 5)
    assert logits.tolist() == [1, 2, -3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = logits_of(1.0, -0.5, 2.0, -math.inf)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    counts = np.bincount(draws(SamplingParams(temperature=temperature, seed=3), logits, 20000), minlength=4)
    assert np.abs(counts / 20000 - expected).max() < 0.02
    assert counts[3] == 0


def test_tiny_temperature_is_greedy() -> None:
    assert set(draws(SamplingParams(temperature=1e-30, seed=0), logits_of(1, 1.5, -2), 20)) == {1}


@pytest.mark.parametrize("top_k", [1, 2, 5, 99])
def test_top_k_keeps_the_k_best(top_k: int) -> None:
    logits = logits_of(0.1, 0.5, 0.3, 0.4, 0.2)
    seen = set(draws(SamplingParams(temperature=5.0, top_k=top_k, seed=1), logits, 500))
    assert seen == set(np.argsort(-logits)[:top_k].tolist())


@pytest.mark.parametrize("top_p, kept", [(0.4, {0}), (0.5, {0}), (0.51, {0, 2}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.125, 0.3, 0.075], np.float32))
    assert set(draws(SamplingParams(temperature=1.0, top_p=top_p, seed=2), logits, 500)) == kept


def test_top_p_counts_within_top_k() -> None:
    """Probabilities are renormalised over what top-k kept: of 0.5 and 0.3 the first alone reaches 0.6."""
    logits = np.log(np.array([0.5, 0.2, 0.3], np.float32))
    assert set(draws(SamplingParams(temperature=1.0, top_k=2, top_p=0.6, seed=0), logits, 200)) == {0}
    assert set(draws(SamplingParams(temperature=1.0, top_p=0.6, seed=0), logits, 200)) == {0, 2}


@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=700), st.floats(0.01, 0.999))
def test_nucleus_is_the_sorted_definition(values: list[float], top_p: float) -> None:
    weights = np.array(values)
    weights[len(values) // 2] = 1.0
    order = sorted(range(len(values)), key=lambda index: (-weights[index], index))
    expected, total = [], 0.0
    for index in order:
        expected.append(index)
        total += weights[index]
        # Sums in another order differ in the last bits; the draw is exact where the definition is not a tie.
        if total >= top_p * weights.sum() - 1e-9:
            break
    found = nucleus(weights, top_p).tolist()
    assert found[: len(expected)] == expected
    assert weights[found[len(expected) :]].sum() <= 1e-9 or abs(total - top_p * weights.sum()) < 1e-9


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.99])
def test_nucleus_of_a_wide_distribution(top_p: float) -> None:
    """Far more tokens than the first sorted few: weights 1 to 2 over 3001 tokens."""
    weights = np.linspace(1, 2, 3001)
    expected = int(np.searchsorted(np.cumsum(weights[::-1]), top_p * weights.sum())) + 1
    assert nucleus(weights, top_p).tolist() == list(range(3000, 3000 - expected, -1))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.integers(1, 50))
def test_largest_is_the_sorted_definition(values: list[int], count: int) -> None:
    cut = sorted(values, reverse=True)[min(count, len(values)) - 1]
    assert largest(np.array(values), count).tolist() == [i for i, value in enumerate(values) if value >= cut]


def test_repetition_penalty_divides_and_multiplies() -> None:
    """Used tokens: 4 becomes 2 (below 3), and -1 becomes -2 (below -1.5)."""
    params = SamplingParams(repetition_penalty=2.0)
    assert Sampler(params, 3, prompt=[0]).sample(logits_of(4, 3, -9)) == 1
    assert Sampler(params, 3, prompt=[1]).sample(logits_of(-1.5, -1, -9)) == 0


def test_repetition_penalty_counts_generated_tokens_once() -> None:
    """Token 0 is weakened after its first use, and no further by the second."""
    assert draws(SamplingParams(repetition_penalty=2.0), logits_of(4, 3, 1), 4) == [0, 1, 0, 0]


@given(st.integers(0, 2**64), st.integers(0, 100))
def test_equal_seeds_give_equal_draws(seed: int, stream: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    logits = np.zeros(50, np.float32)
    first = draws(params, logits, 20, stream=stream)
    assert draws(params, logits, 20, stream=stream) == first
    assert draws(params, logits, 20, stream=stream + 1) != first


def test_no_seed_differs_each_time() -> None:
    params, logits = SamplingParams(temperature=1.0), np.zeros(1000, np.float32)
    assert draws(params, logits, 20) != draws(params, logits, 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    with pytest.raises(BundleError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), 3).sample(logits_of(1, bad, 2))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number"),
        ({"temperature": "1"}, "temperature='1' must be a finite number"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 must be greater than 0"),
        ({"top_p": 1.01}, "top_p=1.01 must be greater than 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be greater than 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"stop": ("",)}, "none of them empty"),
        ({"stop": "END"}, "must be a list of texts"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_sampling_params_refuse(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert message in str(caught.value)


def plainly(logits: np.ndarray, text: list[int], **given: Any) -> np.ndarray:
    """OpenAI's definition of bias and penalties, token by token."""
    bias, presence, frequency = dict(given["logit_bias"]), given["presence_penalty"], given["frequency_penalty"]
    changed = [
        value + bias.get(token, 0) - (presence if token in text else 0) - frequency * text.count(token)
        for token, value in enumerate(logits.tolist())
    ]
    return np.array(changed)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=8),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, 1), st.floats(-9, 9)),
)
def test_bias_and_penalties_are_what_the_api_says(
    values: list[float], presence: float, frequency: float, bias: dict[int, float]
) -> None:
    logits, text = logits_of(*values), []
    given_values: dict[str, Any] = {
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "logit_bias": tuple(bias.items()),
    }
    sampler = Sampler(SamplingParams(**given_values), logits.size, prompt=[0])
    for _ in range(6):
        wanted = plainly(logits, text, **given_values)
        token = sampler.sample(logits)
        assert wanted[token] >= wanted.max() - 1e-5
        text.append(token)


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, {0, 1, 2, 3}), (0.25, {0, 1, 2}), (0.26, {0, 2}), (0.61, {0}), (1.0, {0})])
def test_min_p_keeps_the_tokens_near_the_best(min_p: float, kept: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.126, 0.3, 0.074], np.float32))
    assert set(draws(SamplingParams(temperature=1.0, min_p=min_p, seed=2), logits, 400)) == kept


def test_a_bias_of_a_token_that_is_not_there() -> None:
    with pytest.raises(RequestError, match="logit_bias names the token 3; this model's are 0 to 2"):
        Sampler(SamplingParams(logit_bias=((3, 1.0),)), 3)
    for name in ("min_p", "presence_penalty"):
        with pytest.raises(RequestError, match=f"{name}=nan must be a finite number"):
            SamplingParams(**{name: math.nan})
