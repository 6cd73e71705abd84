"""One row of a batch: its tokens, what is already in its caches, and how it ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from bilevel.runtime.generate.sampling import RowLogits, Sampler
from bilevel.runtime.generate.text import TextStream


@dataclass(frozen=True)
class Event:
    """One step of one row.

    token: the id generated, None where the row ended without one. text: what became certain with it (may be empty: part of a
    character or of a possible stop text is held back). finish_reason: None while the row goes on, then "eos", "stop" (a stop
    text), "length" (max_tokens, or no room left) or "cancelled".
    """

    row: int
    token: int | None
    text: str
    finish_reason: str | None


@dataclass
class Completion:
    """What one row has generated so far. token_ids holds the end-of-text token and a stop text's tokens; text does not."""

    num_prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Row:
    """The state of one row; ``index`` is its place in the batch.

    limit: tokens that the row's caches may hold. num_cached: tokens already there (the graph's past_len).
    """

    def __init__(
        self, index: int, prompt: list[int], sampler: Sampler, stream: TextStream, eos: Collection[int], limit: int
    ) -> None:
        self.index, self.limit, self.num_cached = index, limit, 0
        self.completion = Completion(len(prompt))
        self._tokens = list(prompt)
        self._sampler, self._stream, self._eos = sampler, stream, eos

    @property
    def is_active(self) -> bool:
        """Whether the row still generates."""
        return self.completion.finish_reason is None

    @property
    def num_pending(self) -> int:
        """Tokens that the graph has not seen yet: the rest of the prompt, or the last token generated."""
        return len(self._tokens) - self.num_cached

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""
        return self._tokens[: self.completion.num_prompt_tokens]

    @property
    def cached_ids(self) -> list[int]:
        """The tokens that the row's caches hold."""
        return self._tokens[: self.num_cached]

    @property
    def num_prompt_read(self) -> int:
        """Tokens of the prompt that the graph has seen."""
        return min(self.num_cached, self.completion.num_prompt_tokens)

    @property
    def is_reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.num_cached < self.completion.num_prompt_tokens

    def take(self, most: int) -> list[int]:
        """The next pending tokens, ``most`` at most; they count as cached from now on."""
        tokens = self._tokens[self.num_cached : self.num_cached + most]
        self.num_cached += len(tokens)
        return tokens

    def extend(self, logits: RowLogits) -> Event:
        """Choose the next token from logits [vocab]."""
        token = self._sampler.sample(logits)
        self._tokens.append(token)
        self.completion.token_ids.append(token)
        if token in self._eos:
            return self._event(token, self._stream.flush(), "eos")
        text = self._stream.push(token)
        if self._stream.is_stopped:
            return self._event(token, text, "stop")
        if len(self.completion.token_ids) == self._sampler.params.max_tokens or self.num_cached == self.limit:
            return self._event(token, text + self._stream.flush(), "length")
        return self._event(token, text, None)

    def cancel(self) -> Event:
        """End the row where it is."""
        return self._event(None, self._stream.flush(), "cancelled")

    def _event(self, token: int | None, text: str, finish_reason: str | None) -> Event:
        self.completion.text += text
        self.completion.finish_reason = finish_reason
        return Event(self.index, token, text, finish_reason)
