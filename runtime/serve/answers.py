"""From the scheduler's thread to the web server's loop: jobs go in, pieces of text come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bilevel.runtime.generate.sampling import TokenLogprobs
from bilevel.runtime.generate.text import TextAssembler, Tokenizer
from bilevel.runtime.schedule.jobs import TextJob, TokenEvent, TokenRoutes
from bilevel.runtime.schedule.scheduler import Scheduler
from bilevel.runtime.serve.refusal import ApiError


def publish_on(loop: asyncio.AbstractEventLoop) -> Any:
    """For ``Scheduler``: hands a turn's events to those who wait in ``loop``, waking it once."""

    def deliver(events: Sequence[TokenEvent]) -> None:
        for event in events:
            event.job.receive(event)

    def publish(events: Sequence[TokenEvent]) -> None:
        try:
            loop.call_soon_threadsafe(deliver, events)
        except RuntimeError:
            pass  # the loop is closed: no request waits any more

    return publish


@dataclass(eq=False)
class AnswerChoice:
    """One answer as far as it has come. token_ids holds the end-of-text token and a stop text's tokens; text does not."""

    index: int
    job: TextJob
    assembler: TextAssembler
    token_ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What is certain so far."""
        return self.assembler.text

    @property
    def finish_reason(self) -> str | None:
        """None while the answer goes on; then "eos", "stop", "complete", "length" or "dead_end"."""
        return self.assembler.finish_reason


@dataclass(frozen=True)
class Piece:
    """What one token added to a choice. token: None where none was to be generated, or none could be."""

    choice: AnswerChoice
    token: int | None
    text: str
    finish_reason: str | None
    logprobs: TokenLogprobs | None
    routes: TokenRoutes | None


class Answers:
    """The answers to one request. Submitting happens at once, so that a refusal is still a status.

    Raises what ``Scheduler.submit`` raises. Iterating gives the pieces of all choices, as many at a time as have come, and ends
    when all have ended; leaving it early, for whatever reason, frees the rows.
    """

    def __init__(self, scheduler: Scheduler, jobs: Sequence[TextJob], tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._scheduler = scheduler
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        for job in jobs:
            job.receive = self._events.put_nowait
        scheduler.submit(*jobs)  # which also checks the prompts that the texts stand behind
        self.choices = [AnswerChoice(index, job, TextAssembler(tokenizer, stops, job.prompt)) for index, job in enumerate(jobs)]
        self._by_job = {choice.job: choice for choice in self.choices}

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        try:
            num_open = len(self.choices)
            while num_open:
                events = [await self._events.get()]
                while not self._events.empty():
                    events.append(self._events.get_nowait())
                pieces = [piece for event in events if (piece := self._piece(event)) is not None]
                num_open -= sum(piece.finish_reason is not None for piece in pieces)
                if pieces:
                    yield pieces
        finally:
            self.cancel()

    async def finish(self) -> list[AnswerChoice]:
        """Wait for the end of all."""
        async for _ in self:
            pass
        return self.choices

    def cancel(self) -> None:
        """Free the rows of those that have not ended."""
        if jobs := [choice.job for choice in self.choices if choice.finish_reason in (None, "stop")]:
            self._scheduler.cancel(*jobs)

    def _piece(self, event: TokenEvent) -> Piece | None:
        choice = self._by_job[event.job]
        if choice.finish_reason is not None:
            return None  # it ended at a stop text; the scheduler learned of it a token later
        if event.token is None:
            if event.finish_reason in ("length", "dead_end"):  # it asked for no token, or there is none that it may have
                return Piece(choice, None, choice.assembler.end(event.finish_reason), event.finish_reason, None, None)
            if event.finish_reason == "cancelled":
                raise ApiError(503, "the server stopped before this answer was complete; ask again", code="shutting_down")
            raise ApiError(500, event.error or "the server failed on this request; its log says why")
        choice.token_ids.append(event.token)
        text = choice.assembler.push(event.token, event.finish_reason)
        if choice.finish_reason == "stop":
            self._scheduler.cancel(choice.job)
        return Piece(choice, event.token, text, choice.finish_reason, event.logprobs, event.routes)
