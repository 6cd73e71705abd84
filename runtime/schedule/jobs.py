"""Jobs: what a client asked for, the events it gets, the queue in which it waits, and the observer that counts."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import ContextTooLong, RequestError
from bilevel.runtime.backend.session import Routes
from bilevel.runtime.generate.rows import Row
from bilevel.runtime.generate.sampling import Constraint, SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class TokenRoutes:
    """What one generated token's last word read. candidates: blocks of level 1, ascending (empty without level 1).

    blocks: int32 [routed layers, Hs, K2], -1 in the unused tail. experts: {layer: ids [k]}. position: of the word in the text.
    """

    position: int
    candidates: tuple[int, ...]
    blocks: NDArray[np.int32]
    experts: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class TokenEvent:
    """One step of one job.

    token: None where it ended without one. finish_reason: None, or as in ``results.Event``, or "dead_end" (the constraint
    allows no token), or "error".
    """

    job: TextJob
    token: int | None
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None
    routes: TokenRoutes | None = None
    error: str | None = None
    is_first: bool = False


@dataclass(eq=False)
class TextJob:
    """One text to generate, in token ids. client: whose turn it is in the queue. num_logprobs: None for none at all.

    scores_prompt: the log-probabilities of its tokens, from the second on, are wanted too. They are in prompt_logprobs before
    the first event comes; the prompt is then read token by token, beside the other rows' generation. generates: False ends the
    job where its prompt has been read ("length", without a token). constraint: what the text has to follow; the job's own.

    receive: a function for the job's events, which the scheduler only passes on with them. Times are those of
    time.perf_counter.
    """

    prompt: list[int]
    params: SamplingParams
    client: str = ""
    stream: int = 0
    num_logprobs: int | None = None
    wants_routes: bool = False
    scores_prompt: bool = False
    generates: bool = True
    constraint: Constraint | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    receive: Any = None
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    last_token: float | None = None
    num_reused: int = 0
    is_cancelled: bool = False

    def check(self, vocab_size: int, row_tokens: int) -> None:
        """Raises RequestError for a prompt without tokens or with unknown ones, ContextTooLong for one longer than a row."""
        if not self.prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if any(token >= vocab_size for token, _ in self.params.logit_bias):
            raise RequestError(f"logit_bias names a token that this model does not have; its tokens are 0 to {vocab_size - 1}")
        if self.params.ignore_eos and self.constraint is not None:
            raise RequestError("ignore_eos does not go with a text that follows a grammar, which says where it ends; give one")
        if len(self.prompt) > row_tokens:
            raise ContextTooLong(f"the prompt has {len(self.prompt)} tokens, but this server takes {row_tokens}; shorten it")
        for token in (min(self.prompt), max(self.prompt)):
            if not 0 <= token < vocab_size:
                raise RequestError(f"the prompt holds the token {token}; this model's tokens are 0 to {vocab_size - 1}")

    def cancel(self) -> None:
        """Ask that the job end; it does before the next step."""
        self.is_cancelled = True


class FairQueue:
    """Jobs that wait: first come first served for each client, the clients in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[TextJob]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[TextJob]:
        for jobs in self._waiting.values():
            yield from jobs

    def push(self, job: TextJob) -> None:
        """Append a job to its client's."""
        self._waiting.setdefault(job.client, deque()).append(job)

    def pop(self, is_ready: Callable[[TextJob], bool]) -> TextJob | None:
        """The first ready job of the next client that has one; that client is last from now on."""
        for client, jobs in self._waiting.items():
            job = next((job for job in jobs if is_ready(job)), None)
            if job is not None:
                self._remove(client, job)
                if client in self._waiting:
                    self._waiting.move_to_end(client)
                return job
        return None

    def remove_cancelled(self) -> list[TextJob]:
        """Take out the jobs that were cancelled."""
        gone = [job for job in self if job.is_cancelled]
        for job in gone:
            self._remove(job.client, job)
        return gone

    def _remove(self, client: str, job: TextJob) -> None:
        self._waiting[client].remove(job)
        if not self._waiting[client]:
            del self._waiting[client]


@dataclass(frozen=True)
class SchedulerLimits:
    """What a scheduler takes.

    max_rows: texts generated at once. max_queue: jobs that may wait. row_tokens: prompt and text of one job (None: the
    model's). prefill_chunk: most tokens of a prompt that one call reads (None: the bundle's). speculation: see ``Generator``.
    """

    max_rows: int = 8
    max_queue: int = 64
    row_tokens: int | None = None
    prefill_chunk: int | None = None
    speculation: bool = True


class Observer(Protocol):
    """Whoever counts what the scheduler does; called from the scheduler's thread."""

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A piece of a prompt was read."""

    def decoded(self, rows: Sequence[Row], first: int, routes: Routes | None, seconds: float) -> None:
        """Each of ``rows`` went on; row r is line r.index - first of ``routes``, which are None where there were drafts."""

    def drafted(self, tokens: int, taken: int) -> None:
        """A step had drafts of so many ``tokens``, and the texts went on with ``taken`` of them."""

    def token(self, job: TextJob, now: float) -> None:
        """``job`` got a token; ``job.last_token`` is still the time of the one before."""

    def ended(self, job: TextJob, reason: str) -> None:
        """``job`` has ended."""


def token_routes(routes: Routes | None, row: Row, line: int) -> TokenRoutes | None:
    """What the last word of ``row`` read, copied out of line ``line`` of a decode step's routes."""
    if routes is None:
        return None
    candidates = () if routes.candidates is None else tuple(int(b) for b in routes.candidates[line, 0, 0] if b >= 0)
    experts = {layer: tuple(map(int, ids[line, 0])) for layer, ids in routes.experts.items()}
    return TokenRoutes(row.num_cached - 1, candidates, routes.blocks[:, line, :, 0].copy(), experts)
