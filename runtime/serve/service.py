"""What every endpoint shares: the scheduler, the tokenizer, the limits, and who may ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from bilevel.errors import Overloaded
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.grammar.compiler import Compiled, Compiler
from bilevel.runtime.schedule.scheduler import Scheduler
from bilevel.runtime.serve.chat import ChatTemplate
from bilevel.runtime.serve.errors import ApiError
from bilevel.runtime.serve.http import Keys, read_body
from bilevel.runtime.serve.structured import Wish
from bilevel.runtime.serve.tools.layouts import HERMES, Layout

_LONG_TEXT = 10_000  # characters


@dataclass(frozen=True)
class HttpLimits:
    """max_body: bytes. body_seconds: until a body has arrived. stall_seconds: that a reader of a stream may take nothing."""

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

    backend: ``Session.backend`` of what runs it. keys: None where no key is asked for.
    """

    name: str
    scheduler: Scheduler
    tokenizer: BundleTokenizer
    backend: str
    grammars: Grammars
    template: ChatTemplate | None = None
    keys: Keys | None = None
    limits: HttpLimits = HttpLimits()
    created: int = field(default_factory=lambda: int(time.time()))

    def client(self, request: Request) -> str:
        """Whose turn in the queue a request takes: the key's, or the address's."""
        if self.keys is not None:
            return self.keys.find(request)
        return request.client.host if request.client is not None else ""

    def check_key(self, request: Request) -> None:
        """Raises ApiError 401 where a key is asked for and the request has none that fits."""
        if self.keys is not None:
            self.keys.find(request)

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not served here."""
        if name != self.name:
            shown = name if len(name) <= 60 else f"{name[:57]}..."
            raise ApiError(
                404, f"the model {shown!r} is not served here, {self.name!r} is", param="model", code="model_not_found"
            )

    async def body(self, request: Request, *kinds: str) -> bytes:
        """The request's body, within the limits."""
        return await read_body(request, self.limits.max_body, self.limits.body_seconds, kinds or ("application/json",))

    async def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt; ids go through as they are. A long text is encoded beside the server's loop."""
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) < _LONG_TEXT:
            return self.tokenizer.encode(prompt)
        return await asyncio.to_thread(self.tokenizer.encode, prompt)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        name: str | None,
        settings: dict[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation, as ``ChatTemplate.encode`` gives them. Raises ApiError where there is no template."""
        template = self.template
        if template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        # Beside the server's loop: the first content that names a special token has a second tokenizer made.
        return await asyncio.to_thread(template.encode, messages, self.tokenizer, name, settings, tools)

    def tool_layout(self, name: str | None) -> Layout:
        """How the model writes tool calls when it is asked by the template of this name."""
        found = None if self.template is None else self.template.layout(name)
        return found or HERMES

    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "bilevel",
            "max_model_len": self.scheduler.row_tokens,
            "has_chat_template": self.template is not None,
            "gives_routes": self.scheduler.gives_routes,
        }
