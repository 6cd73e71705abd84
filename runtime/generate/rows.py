"""One row of a batch: its tokens, what is already in its caches, and when its tokens come to an end."""

from __future__ import annotations

from collections.abc import Collection

from bilevel.runtime.generate.ngrams import Drafter
from bilevel.runtime.generate.sampling import RowLogits, Sampler


class Row:
    """The state of one row, in tokens; ``index`` is its place in the batch.

    limit: tokens that the row's caches may hold. num_cached: tokens already there (the graph's past_len). finish_reason: None
    while the row goes on; then "eos", "complete" (its constraint allows nothing more) or "length" (max_tokens, or no room
    left). Whoever ends it for a reason that tokens do not show sets it.
    """

    def __init__(self, index: int, prompt: list[int], sampler: Sampler, eos: Collection[int], limit: int) -> None:
        self.index, self.limit, self.num_cached = index, limit, 0
        self.num_prompt_tokens = len(prompt)
        self.finish_reason: str | None = None
        self._tokens = list(prompt)
        self._sampler, self._eos = sampler, eos
        self.drafter = Drafter()

    @property
    def is_active(self) -> bool:
        """Whether the row still generates."""
        return self.finish_reason is None

    @property
    def num_pending(self) -> int:
        """Tokens that the graph has not seen yet: the rest of the prompt, or the last token generated."""
        return len(self._tokens) - self.num_cached

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""
        return self._tokens[: self.num_prompt_tokens]

    @property
    def generated_ids(self) -> list[int]:
        """The tokens behind the prompt, the end-of-text token included."""
        return self._tokens[self.num_prompt_tokens :]

    @property
    def cached_ids(self) -> list[int]:
        """The tokens that the row's caches hold."""
        return self._tokens[: self.num_cached]

    @property
    def num_prompt_read(self) -> int:
        """Tokens of the prompt that the graph has seen."""
        return min(self.num_cached, self.num_prompt_tokens)

    @property
    def is_reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.num_cached < self.num_prompt_tokens

    @property
    def last_token(self) -> int:
        """The newest token, of the prompt or generated."""
        return self._tokens[-1]

    def draft(self, most: int) -> list[int]:
        """What the row may go on with, ``most`` tokens at most and no more than it could take; empty where nothing is known."""
        left = self._sampler.params.max_tokens - (len(self._tokens) - self.num_prompt_tokens) - 1
        return self.drafter.draft(self._tokens, max(0, min(most, left, self.limit - self.num_cached - 1)))

    def take(self, most: int) -> list[int]:
        """The next pending tokens, ``most`` at most; they count as cached from now on."""
        tokens = self._tokens[self.num_cached : self.num_cached + most]
        self.num_cached += len(tokens)
        return tokens

    def extend(self, logits: RowLogits) -> int:
        """Choose the next token from logits [vocab]; ``finish_reason`` says whether it is the last."""
        token = self._sampler.sample(logits)
        self._tokens.append(token)
        if token in self._eos:
            self.finish_reason = "eos"
        elif self._sampler.is_complete:
            self.finish_reason = "complete"
        elif len(self._tokens) - self.num_prompt_tokens == self._sampler.params.max_tokens or self.num_cached == self.limit:
            self.finish_reason = "length"
        return token
