"""Chats in a terminal: a bundle's chat template, and a conversation whose turns read only what is new."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bilevel.bundle.format import Bundle
from bilevel.errors import RequestError, require
from bilevel.runtime.backend.session import Session
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import TextAssembler, Tokenizer
from bilevel.runtime.schedule.jobs import SchedulerLimits, TextJob, TokenEvent
from bilevel.runtime.schedule.scheduler import Scheduler

Messages = Sequence[Mapping[str, Any]]


def add_template_options(parser: argparse.ArgumentParser) -> None:
    """--system, --template and --template-option."""
    parser.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    parser.add_argument("--template", metavar="NAME", help="of the model's chat templates, where it has several")
    parser.add_argument(
        "--template-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what a chat template sees besides, such as enable_thinking=false (value: JSON, or text); may be repeated",
    )


def read_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE. Raises RequestError where there is no =."""
    name, is_given, value = text.partition("=")
    if not (is_given and name.isidentifier()):
        raise RequestError(f"template option {text!r} must be NAME=VALUE, for example enable_thinking=false")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


class ChatEncoder:
    """Conversations to token ids by a bundle's chat template. Raises RequestError where it has none.

    most: tokens that a prompt may have. settings: what the template sees besides; may be changed.
    """

    def __init__(self, bundle: Bundle, most: int, template: str | None, settings: Mapping[str, Any]) -> None:
        require("jinja2")
        from bilevel.runtime.serve.encoder import PromptEncoder

        self._encoder, self._template, self.settings = PromptEncoder(bundle, most), template, dict(settings)
        if not self._encoder.has_template:
            self.close()
            raise RequestError("this model has no chat template; use bilevel run, with the text that it is to continue")

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of the prompt for the next answer. Raises RequestError where the template refuses the messages."""
        from bilevel.runtime.serve.refusal import ApiError

        try:
            return asyncio.run(self._encoder.chat(list(messages), name=self._template, settings=self.settings))
        except ApiError as error:
            raise RequestError(error.message) from None

    def close(self) -> None:
        """End its processes."""
        self._encoder.close()


class Conversation:
    """Messages, and a model that answers. limits: of one row.

    Raises RequestError for an answer that cannot be given; the question is not kept then.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer, encoder: ChatEncoder, limits: SchedulerLimits, params: SamplingParams
    ) -> None:
        self._tokenizer, self.encoder, self._params = tokenizer, encoder, params
        self._events: list[TokenEvent] = []
        self._scheduler = Scheduler(session, limits, self._events.extend)
        self.messages: list[dict[str, Any]] = []
        self.system: str | None = None
        self.job: TextJob | None = None
        """The latest answer's."""
        self.finish_reason: str | None = None
        self.num_new_tokens = 0
        self._num_asked = 0

    def ask(self, text: str) -> Iterator[str]:
        """The answer to ``text``, piece by piece; what has come is kept where the caller leaves early."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self.encoder.encode(self.whole)
            room = self._scheduler.row_tokens + 1 - len(prompt)
            params = replace(self._params, max_tokens=max(1, min(room, self._params.max_tokens)), stop=())
            job = TextJob(prompt, params, stream=self._num_asked)  # a question asked again is answered anew
            self._num_asked += 1
            self._scheduler.submit(job)
        except BaseException:
            self.messages.pop()
            raise
        self.job, self.num_new_tokens = job, 0
        assembler = TextAssembler(self._tokenizer, self._params.stop, prompt)
        try:
            yield from self._pieces(job, assembler)
        except RequestError:
            self.messages.pop()
            raise
        finally:
            if assembler.finish_reason is None:
                job.cancel()
                self._scheduler.step()
                self._events.clear()
                assembler.end("cancelled")
            self.finish_reason = assembler.finish_reason
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.append({"role": "assistant", "content": assembler.text})

    @property
    def whole(self) -> list[dict[str, Any]]:
        """The messages behind the system's."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.messages]

    def _pieces(self, job: TextJob, assembler: TextAssembler) -> Iterator[str]:
        while assembler.finish_reason is None:
            self._scheduler.step()
            events, self._events[:] = list(self._events), []
            for event in events:
                if event.job is not job or assembler.finish_reason is not None:
                    continue
                if event.token is None:
                    raise RequestError(event.error or "the answer was not completed")
                self.num_new_tokens += 1
                yield assembler.push(event.token, event.finish_reason)
        if not job.is_cancelled:  # it may have ended at a stop text, of which the scheduler knows nothing
            job.cancel()
            self._scheduler.step()
            self._events.clear()
