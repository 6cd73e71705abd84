"""Prompts and chats to token ids, in processes of their own: a tokenizer or a template from a bundle may take any time.

Short texts have one process, long ones another, so that nobody's word waits for somebody's book. Each does one thing at a time.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bilevel.bundle.chat import ChatSources, read_sources
from bilevel.bundle.confined import Confined, Limits, Overrun, WorkError
from bilevel.bundle.format import Bundle
from bilevel.errors import BundleError, ContextTooLong
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.serve.chat import ChatTemplate, knows, layout_of
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.tools.layouts import Layout

LONG_TEXT = 10_000  # characters
_SHORT, _LONG = Limits(), Limits(cpu_seconds=20, wall_seconds=60.0, memory=1 << 30, answer=64 << 20)


class PromptEncoder:
    """A bundle's tokenizer and chat templates. Raises BundleError where one of them cannot be used.

    most: tokens that a prompt may have; of a longer one only their number is told.
    """

    def __init__(self, bundle: Bundle, most: int) -> None:
        sources = read_sources(bundle.folder, bundle.files)
        self.most, self._templates = most, sources.templates
        argument = {**_described(sources), "tokenizer": str(bundle.tokenizer_path.resolve()), "most": most}
        self._lanes = [_Lane(argument, limits) for limits in (_SHORT, _LONG)]
        described = self._lanes[0].describe()
        self.most_characters = most * int(described["longest"])

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._templates)

    def layout(self, name: str | None) -> Layout | None:
        """How the model writes tool calls when it is asked by the template of this name; None where it says nothing of it."""
        return layout_of(self._templates, name) if self._templates else None

    def knows(self, variable: str, name: str | None) -> bool:
        """Whether the template of this name speaks of a variable."""
        return bool(self._templates) and knows(self._templates, name, variable)

    async def text(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises ContextTooLong for one of more than ``most``, ApiError where the tokenizer fails."""
        self._check_length(len(text))
        return await self._ask(len(text), {"text": text})

    async def chat(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> list[int]:
        """Token ids of a conversation; given: what ``ChatTemplate.encode`` takes besides. Raises as ``text`` does."""
        length = _characters([messages, given])
        self._check_length(length)
        return await self._ask(length, {"messages": messages, "given": given})

    def close(self) -> None:
        """End the processes."""
        for lane in self._lanes:
            lane.close()

    def _check_length(self, length: int) -> None:
        if length > self.most_characters:
            raise ContextTooLong(
                f"the prompt has {length} characters, but this server holds {self.most} tokens, which are at most "
                f"{self.most_characters} characters; shorten it"
            )

    async def _ask(self, length: int, question: dict[str, Any]) -> list[int]:
        answer = await self._lanes[length > LONG_TEXT].ask(question)
        if answer["count"] > self.most:
            raise ContextTooLong(
                f"the prompt has {answer['count']} tokens, but this server holds {self.most} in all; shorten it"
            )
        return list(answer["ids"])


class _Lane:
    """One process, made when it is first needed, and the thread that waits for it."""

    def __init__(self, argument: dict[str, Any], limits: Limits) -> None:
        self._argument, self._limits = argument, limits
        self._worker: Confined | None = None
        self._thread = ThreadPoolExecutor(1, "bilevel-encoder")

    def describe(self) -> dict[str, Any]:
        """What the tokenizer is like. Raises BundleError."""
        try:
            return dict(self._open().ask({}))
        except WorkError as error:
            raise BundleError(error.message) from None
        except Overrun as error:
            raise BundleError(f"the tokenizer or the chat template {error}; make the bundle anew with bilevel export") from None

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        return dict(await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(self._ask, question)))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._worker is not None:
            self._worker.close()

    def _open(self) -> Confined:
        if self._worker is None:
            self._worker = Confined("bilevel.runtime.serve.encoder:open_encoder", self._argument, self._limits)
        return self._worker

    def _ask(self, question: dict[str, Any]) -> Any:
        what = "tokenizer" if "text" in question else "chat template or its tokenizer"
        try:
            return self._open().ask(question)
        except WorkError as error:
            raise _as_refusal(error, what) from None
        except Overrun as error:
            raise ApiError(500, f"the model's {what} {error}") from None


def _as_refusal(error: WorkError, what: str) -> ApiError:
    """What the child raised: a refusal of its own, or something that it did not expect."""
    if error.kind == "ApiError":
        fields = error.fields
        return ApiError(fields["status"], error.message, param=fields["param"], code=fields["code"])
    return ApiError(500, f"the model's {what} failed on this prompt ({error.kind})")


def _characters(value: Any) -> int:
    """Of all texts in it."""
    count, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
    return count


class ConfinedTemplate:
    """A folder's chat templates. Raises BundleError where they are none."""

    def __init__(self, sources: ChatSources) -> None:
        try:
            self._worker = Confined(
                "bilevel.runtime.serve.encoder:open_encoder", {**_described(sources), "tokenizer": None}, _SHORT
            )
        except WorkError as error:
            raise BundleError(error.message) from None
        except Overrun as error:
            raise BundleError(f"the chat template {error}; mend it and export again") from None

    def render(self, messages: Sequence[Mapping[str, Any]], name: str | None = None, settings: Any = None) -> str:
        """As ``ChatTemplate.render``; ApiError too where it takes more time or memory than it may."""
        try:
            return str(self._worker.ask({"messages": messages, "render": {"name": name, "settings": settings}}))
        except WorkError as error:
            raise _as_refusal(error, "chat template") from None
        except Overrun as error:
            raise ApiError(500, f"the model's chat template {error}") from None


def find_template(folder: Path, files: Any = None) -> ConfinedTemplate | None:
    """The templates among a bundle's tokenizer files (``bilevel.bundle.chat``), or None. Raises BundleError.

    files: names of those that may be read, as a bundle's manifest lists them (None: all).
    """
    sources = read_sources(folder, files)
    return ConfinedTemplate(sources) if sources.templates else None


def _described(sources: ChatSources) -> dict[str, Any]:
    return {"templates": sources.templates, "special": sources.special}


def open_encoder(argument: dict[str, Any]) -> Any:
    """What the processes do."""
    tokenizer = None if argument["tokenizer"] is None else BundleTokenizer(Path(argument["tokenizer"]))
    template = ChatTemplate(None, argument["special"], argument["templates"]) if argument["templates"] else None

    def answer(question: dict[str, Any]) -> Any:
        if "render" in question:
            assert template is not None
            return template.render(question["messages"], **question["render"])
        assert tokenizer is not None
        if not question:
            return {"longest": tokenizer.longest_token}
        if "text" in question:
            ids = tokenizer.encode(question["text"])
        else:
            assert template is not None
            ids = template.encode(question["messages"], tokenizer, **question["given"])
        return {"count": len(ids), "ids": ids if len(ids) <= argument["most"] else []}

    return answer
