"""Logits to the next token, one row at a time, in numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.plugins.errors import BundleError, RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a text ends. Raises RequestError for a value out of range.

    temperature: 0 takes the best token always. top_k: keep the k best tokens (0: all). top_p: keep the fewest best tokens
    whose probabilities reach p. repetition_penalty: weaken tokens that the prompt or the text already holds (1: off).
    seed: the same seed gives the same text (None: a fresh one each time). max_tokens: most tokens generated.
    stop: texts that end generation; they are not part of the result.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            _check_number(name, getattr(self, name), float)
        for name in ("top_k", "max_tokens") + (("seed",) if self.seed is not None else ()):
            _check_number(name, getattr(self, name), int)
        for name, is_valid, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps every token)"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "greater than 0 (1 is neutral)"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ):
            if not is_valid:
                raise RequestError(f"{name}={getattr(self, name)} must be {rule}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop={self.stop!r} must be a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(self.stop))


def _check_number(name: str, value: object, kind: type) -> None:
    allowed = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        raise RequestError(f"{name}={value!r} must be a {'finite number' if kind is float else 'whole number'}")


class Sampler:
    """Chooses the tokens of one row.

    Each row has a generator of its own, so its tokens do not depend on the other rows. ``stream`` tells rows apart that share
    a seed. prompt: the ids that the repetition penalty counts as used from the start.
    Penalty, temperature, top-k and top-p apply in this order, as in Hugging Face's ``generate``.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Iterable[int] = (), stream: int = 0) -> None:
        self.params = params
        self._random = np.random.default_rng(None if params.seed is None else [params.seed, stream])
        self._used = np.zeros(vocab_size, bool)
        self._used[list(prompt)] = True

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token for logits [vocab], which are left unchanged. Equal best tokens: the lowest id."""
        if self.params.repetition_penalty != 1:
            logits = self._penalised(logits)
        token = int(np.argmax(logits))
        # argmax returns the first NaN if there is one, so this looks at all of them.
        if not np.isfinite(logits[token]):
            raise BundleError(
                "the model returned logits that are not finite; find where: bilevel check BUNDLE --against CHECKPOINT"
            )
        if self.params.temperature > 0:
            token = self._draw(logits.astype(np.float64) - float(logits[token]))
        self._used[token] = True
        return token

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keskar et al. 2019 (CTRL), section 4.1, in the form for signed logits that Hugging Face uses."""
        penalty = self.params.repetition_penalty
        weaker = np.where(logits > 0, logits / penalty, logits * penalty)
        return np.where(self._used, weaker, logits)

    def _draw(self, logits: NDArray[np.float64]) -> int:
        """Draw from what top-k and top-p keep of logits [vocab], the best of which is 0."""
        ids = largest(logits, self.params.top_k or logits.size)
        weights = np.exp(logits[ids] / self.params.temperature)
        if self.params.top_p < 1:
            kept = nucleus(weights, self.params.top_p)
            ids, weights = ids[kept], weights[kept]
        cumulative = np.cumsum(weights)
        return int(ids[np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")])


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


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithm of the chosen token's probability, and the best tokens with theirs, best first.

    They are the model's own, before temperature, top-k, top-p and penalties.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """Those of ``token`` and of the ``count`` best tokens for logits [vocab]. Equal ones: the lowest id first."""
    shifted = logits.astype(np.float64) - float(logits.max())
    logs = shifted - np.log(np.exp(shifted).sum())
    ids = largest(logs, count) if count else np.zeros(0, np.intp)
    best = ids[np.argsort(-logs[ids], kind="stable")][:count]
    return TokenLogprobs(float(logs[token]), tuple((int(i), float(logs[i])) for i in best))
