"""Logits to the next token, one row at a time, in numpy."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import BundleError, RequestError
from bilevel.runtime.backend.ranking import Best, largest, nucleus


class RemoteLogits(Protocol):
    """One row's logits that lie on a device, where they stay unless they are needed."""

    best: Best | None  # None: the device ranks nothing

    def fetch(self) -> NDArray[np.float32]:
        """All of them, [vocab]: a copy from the device, the first time that a call's are asked for."""


RowLogits = NDArray[np.float32] | RemoteLogits


class Constraint(Protocol):
    """What one row's tokens have to follow, from its first token on."""

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing may follow."""

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next, [vocab]; valid until the next call. Raises DeadEnd where there is none."""

    def accept(self, token: int) -> None:
        """``token``, one of those allowed, has come."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a text ends. Raises RequestError for a value out of range.

    temperature: 0 takes the best token always. top_k: keep the k best tokens (0: all). top_p: keep the fewest best tokens
    whose probabilities reach p. min_p: keep tokens that have at least this share of the best one's probability.
    repetition_penalty: weaken tokens that the prompt or the text already holds (1: off). presence_penalty, frequency_penalty:
    subtracted from the logits of tokens that the text holds, once, and for each time (0: off). logit_bias: (token, what its
    logit gains). ignore_eos: an end token ends nothing.
    seed: the same seed gives the same text (None: a fresh one each time). max_tokens: most tokens generated.
    stop: texts that end generation; they are not part of the result.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), float)
        for name in ("top_k", "max_tokens") + (("seed",) if self.seed is not None else ()):
            _check_number(name, getattr(self, name), int)
        for name, is_valid, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps every token)"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "greater than 0 (1 is neutral)"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ):
            if not is_valid:
                raise RequestError(f"{name}={getattr(self, name)} must be {rule}")
        if not isinstance(self.stop, (list, tuple)) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop={self.stop!r} must be a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def changes_logits(self) -> bool:
        """Whether the order of the tokens depends on more than the model."""
        return self.repetition_penalty != 1 or self.counts_tokens or bool(self.logit_bias)

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often the text holds a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def _check_number(name: str, value: object, kind: type) -> None:
    allowed = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed) or not abs(value) <= sys.float_info.max:
        raise RequestError(f"{name}={value!r} must be a {'finite number' if kind is float else 'whole number'}")


class Sampler:
    """Chooses the tokens of one row.

    Each row has a generator of its own, so its tokens do not depend on the other rows. ``stream`` tells rows apart that share
    a seed. prompt: the ids that the repetition penalty counts as used from the start. constraint: what the tokens have to
    follow. Constraint, bias, penalties, temperature, min-p, top-k and top-p apply in this order: repetition penalty, top-k and
    top-p as in Hugging Face's ``generate``, bias and the other penalties as in OpenAI's API.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt: Iterable[int] = (),
        stream: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        self.params, self._constraint = params, constraint
        self._random = np.random.default_rng(None if params.seed is None else [params.seed, stream])
        self._used = np.zeros(vocab_size, bool)
        self._used[list(prompt)] = True
        self._counts: dict[int, int] = {}  # of the text's tokens, where a penalty asks for them
        self._biased = np.array([token for token, _ in params.logit_bias], np.intp)
        self._biases = np.array([bias for _, bias in params.logit_bias], np.float32)
        if self._biased.size and self._biased.max() >= vocab_size:
            raise RequestError(f"logit_bias names the token {self._biased.max()}; this model's are 0 to {vocab_size - 1}")

    def sample(self, logits: RowLogits) -> int:
        """The next token for logits [vocab], which are left unchanged. Equal best tokens: the lowest id.

        Of logits on a device the few best are looked at where they decide the matter; the token is the same. Raises DeadEnd
        where the constraint allows none, BundleError where the logits are not finite.
        """
        if isinstance(logits, np.ndarray):
            token = self._sample_all(logits)
        elif (best := self._sample_best(logits.best)) is not None:
            token = best
        else:
            token = self._sample_all(logits.fetch())
        self._used[token] = True
        if self.params.counts_tokens:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    @property
    def is_complete(self) -> bool:
        """Whether the constraint allows nothing more."""
        return self._constraint is not None and self._constraint.is_complete

    def _sample_best(self, best: Best | None) -> int | None:
        """The token, None where the best logits alone do not tell it."""
        params = self.params
        if best is None or self._constraint is not None or params.changes_logits or params.min_p or not best.is_usable:
            return None
        if params.temperature == 0:
            return int(best.ids[np.argmax(best.values)])
        if params.top_k == 0 and params.top_p < 1:
            places = best.nucleus(params.temperature, params.top_p)
            top_p = 1.0
        else:
            places = best.largest(params.top_k)
            top_p = params.top_p
        if places is None:
            return None
        return self._draw(best.ids[places], np.exp(best.shifted[places] / params.temperature), top_p)

    def _sample_all(self, logits: NDArray[np.float32]) -> int:
        params = self.params
        if self._constraint is not None:
            logits = np.where(self._constraint.allowed(), logits, np.float32(-np.inf))
        if params.changes_logits:
            logits = self._changed(logits)
        token = int(np.argmax(logits))
        # argmax returns the first NaN if there is one, so this looks at all of them.
        if not np.isfinite(logits[token]):
            raise BundleError(
                "the model returned logits that are not finite; find where: bilevel check BUNDLE --against CHECKPOINT"
            )
        if params.temperature == 0:
            return token
        shifted = logits.astype(np.float64) - float(logits[token])
        ids = largest(shifted, params.top_k or logits.size)
        weights = np.exp(shifted[ids] / params.temperature)
        if params.min_p:
            is_likely = weights >= params.min_p  # the best token's is 1
            ids, weights = ids[is_likely], weights[is_likely]
        return self._draw(ids, weights, params.top_p)

    def _changed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """With bias and penalties; the repetition penalty is Keskar et al.'s (2019, CTRL, section 4.1) for signed logits."""
        params = self.params
        logits = logits.copy()
        logits[self._biased] += self._biases
        if (penalty := params.repetition_penalty) != 1:
            logits = np.where(self._used, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self._counts:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[list(self._counts)] -= params.presence_penalty + params.frequency_penalty * counts
        return logits

    def _draw(self, ids: NDArray[np.integer[Any]], weights: NDArray[np.float64], top_p: float) -> int:
        """One of ``ids`` by their weights, of which top-p keeps the largest."""
        if top_p < 1:
            places = nucleus(weights, top_p)
            ids, weights = ids[places], weights[places]
        cumulative = np.cumsum(weights)
        return int(ids[np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")])


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithm of the chosen token's probability, and the best tokens with theirs, best first.

    They are the model's own, before temperature, top-k, top-p and penalties.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: RowLogits, token: int, count: int) -> TokenLogprobs:
    """Those of ``token`` and of the ``count`` best tokens for logits [vocab]. Equal ones: the lowest id first.

    Those of logits on a device are rounded as its fp32 sum is, to about 1e-5.
    """
    if not isinstance(logits, np.ndarray):
        best = logits.best
        if best is not None and best.is_usable and token in best.ids:
            places = best.largest(count) if count else np.zeros(0, np.intp)
            if places is not None:
                return _ranked(best.ids, best.values.astype(np.float64) - best.log_sum, places, token, count)
        logits = logits.fetch()
    shifted = logits.astype(np.float64) - float(logits.max())
    logs = shifted - np.log(np.exp(shifted).sum())
    ids = np.arange(logs.size)
    return _ranked(ids, logs, largest(logs, count) if count else ids[:0], token, count)


def _ranked(
    ids: NDArray[np.integer[Any]], logs: NDArray[np.float64], places: NDArray[np.intp], token: int, count: int
) -> TokenLogprobs:
    """ids: ascending, with their ``logs``. places: where the best are, and those equal to the last of them."""
    best = places[np.argsort(-logs[places], kind="stable")][:count]
    chosen = float(logs[np.searchsorted(ids, token)])
    return TokenLogprobs(chosen, tuple((int(ids[place]), float(logs[place])) for place in best))
