"""What every endpoint shares: the scheduler, the tokenizer, the limits, and who may ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from bilevel.errors import Overloaded, RequestError
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.grammar.compiler import Compiled, Compiler
from bilevel.runtime.schedule.scheduler import Scheduler
from bilevel.runtime.serve.access import Access
from bilevel.runtime.serve.encoder import PromptEncoder
from bilevel.runtime.serve.errors import validated
from bilevel.runtime.serve.http import check_crowd, read_body
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.requests.structured import Wish
from bilevel.runtime.serve.tools.layouts import HERMES, Layout

Asked = TypeVar("Asked", bound=BaseModel)
MOST_VALUES = 65_536  # of one body's JSON, or twice as many as a row has tokens


@dataclass(frozen=True)
class HttpLimits:
    """max_body: bytes. body_seconds: until a body has arrived. stall_seconds: that a client may take nothing of its answer."""

    max_body: int = 4 << 20
    body_seconds: float = 30.0
    stall_seconds: float = 60.0


class Grammars:
    """Compiles what answers have to follow, one at a time, beside the server's loop."""

    MOST_WAITING = 32

    def __init__(self, compiler: Compiler) -> None:
        self._compiler, self._num_waiting = compiler, 0
        self._thread = ThreadPoolExecutor(1, "bilevel-grammars")

    async def compile(self, make: Callable[[], Wish]) -> Compiled:
        """What ``make`` gives, compiled. Raises what it and ``Compiler.compile`` raise, Overloaded where too many wait."""
        if self._num_waiting >= self.MOST_WAITING:
            raise Overloaded(f"{self._num_waiting} grammars wait to be compiled already; try again in 5 s", 5)

        def work() -> Compiled:
            wish = make()
            return self._compiler.compile(wish.grammar, wish.name)

        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """End what works for it."""
        self._thread.shutdown(cancel_futures=True)
        self._compiler.close()


@dataclass(frozen=True)
class Service:
    """One served model.

    backend: ``Session.backend`` of what runs it.
    """

    name: str
    scheduler: Scheduler
    tokenizer: BundleTokenizer
    encoder: PromptEncoder
    backend: str
    grammars: Grammars
    access: Access = field(default_factory=Access)
    limits: HttpLimits = HttpLimits()
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not served here."""
        if name != self.name:
            shown = name if len(name) <= 60 else f"{name[:57]}..."
            raise ApiError(
                404, f"the model {shown!r} is not served here, {self.name!r} is", param="model", code="model_not_found"
            )

    async def body(self, request: Request, *kinds: str) -> bytes:
        """The request's body, within the limits. kinds: content types; JSON where none are given."""
        return await read_body(request, self.limits.max_body, self.limits.body_seconds, kinds or ("application/json",))

    async def read(self, model: type[Asked], content: bytes) -> Asked:
        """JSON as a ``model``. Raises ApiError 413 for what it would take long to read, 400 where a field is wrong.

        Nothing interrupts the looking at 4 MB or the reading of them: one request does either at a time, and the loop goes
        round in between, so that however many come at once, others wait for one of them.
        """
        async with self.turn:
            check_crowd(content, max(MOST_VALUES, 2 * self.scheduler.row_tokens))
            await asyncio.sleep(0)
            asked = validated(model, content)
            await asyncio.sleep(0)
        return asked

    async def encode(self, prompts: Sequence[str | list[int]], choices: int = 1) -> list[list[int]]:
        """Token ids of prompts, each of which is generated from ``choices`` times; ids go through as they are.

        Raises RequestError, before anything is encoded, where they are more texts than there is room for.
        """
        self.check_count(len(prompts), choices)
        return [await self.encoder.text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def check_count(self, prompts: int, choices: int = 1) -> None:
        """Raises RequestError where these are more texts than may run and wait, or none."""
        most = self.scheduler.limits.max_rows + self.scheduler.limits.max_queue
        if not 1 <= prompts * choices <= most:
            texts = f"{prompts} prompts with n={choices} are {prompts * choices} texts"
            raise RequestError(f"{texts}, this server takes {most}; give between 1 and that")

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        name: str | None,
        settings: dict[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation, as ``ChatTemplate.encode`` gives them. Raises ApiError where there is no template."""
        if not self.encoder.has_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        return await self.encoder.chat(messages, name=name, settings=settings, tools=list(tools))

    def template_knows(self, name: str | None, variable: str) -> bool:
        """Whether the chat template of this name speaks of a variable."""
        return self.encoder.knows(variable, name)

    def tool_layout(self, name: str | None) -> Layout:
        """How the model writes tool calls when it is asked by the template of this name."""
        return self.encoder.layout(name) or HERMES

    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "bilevel",
            "max_model_len": self.scheduler.row_tokens,
            "has_chat_template": self.encoder.has_template,
            "gives_routes": self.scheduler.gives_routes,
        }
