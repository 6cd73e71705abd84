"""Messages to a prompt: the chat template of the bundle's tokenizer files, in Jinja's sandbox.

A template may compute for ever: what is here runs in a process of its own (``runtime/serve/encoder.py``).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from bilevel.bundle.chat import DEFAULT, compile_template
from bilevel.runtime.generate.literal import SEAMS
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.tools.as_text import as_text
from bilevel.runtime.serve.tools.layouts import Layout, find_layout

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
TOOL_USE = "tool_use"  # the template for tools, of models that have several
_OWN = ("messages", "add_generation_prompt", "tools", "raise_exception", "strftime_now")  # no client's to set


class _Refusal(TemplateError):
    """Raised by a template that does not take these messages."""


def _refuse(message: str) -> None:
    raise _Refusal(message)


def find_name(templates: Mapping[str, str], name: str | None, has_tools: bool = False) -> str:
    """The name of the template that is meant. Raises ApiError where there is none of it."""
    if name is None and has_tools and TOOL_USE in templates:
        return TOOL_USE
    if name is None:
        name = DEFAULT if DEFAULT in templates or len(templates) > 1 else next(iter(templates))
    if name not in templates:
        known = ", ".join(map(repr, sorted(templates)))
        raise ApiError(400, f"chat_template={name[:60]!r} is none of this model's: {known}", param="chat_template")
    return name


def knows(templates: Mapping[str, str], name: str | None, variable: str) -> bool:
    """Whether the template of this name speaks of a variable."""
    return re.search(rf"\b{variable}\b", templates[find_name(templates, name)]) is not None


def layout_of(templates: Mapping[str, str], name: str | None) -> Layout | None:
    """How a model writes tool calls; None where its template knows none, and they are given and asked for as text."""
    return find_layout(templates[find_name(templates, name, has_tools=True)])


class ChatTemplate:
    """How a model wants its turns written. Raises BundleError when a template is no valid Jinja.

    source: the template; None where none stands for all of them. special: the special tokens' texts. named: more, by name.
    """

    def __init__(self, source: str | None, special: Mapping[str, str], named: Mapping[str, str] | None = None) -> None:
        self._sources = {**(named or {}), **({} if source is None else {DEFAULT: source})}
        self._templates = {name: compile_template(text, _refuse) for name, text in self._sources.items()}
        self._special = dict(special)

    def render(
        self,
        messages: Messages,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        tools: Tools = (),
        seam: str = "",
    ) -> str:
        """The prompt that these messages make.

        name: of the template (None: the default one). settings: more that it sees (a request's ``chat_template_kwargs``).
        tools: the functions that the model may call, as OpenAI's API describes them. seam: what breaks markers in contents
        (``encode``). Raises ApiError: 400 where the template refuses or loses messages, 500 where it fails.
        """
        name = self._find(name, bool(tools))
        settings = {**self._checked(settings or {}), "tools": list(tools) or None}
        has_calls = any(each["role"] == "tool" or each.get("tool_calls") for each in messages)
        if (tools or has_calls) and find_layout(self._sources[name]) is None:
            messages, settings = as_text(messages, tools), {**settings, "tools": None}
        kept = self._whole(messages, name, settings)
        if seam:
            # A template may have written a seam as JSON's escape of it.
            return self._render(kept, name, settings).replace(json.dumps(seam)[1:-1], seam)
        return self._render(kept, name, settings)

    def encode(
        self,
        messages: Messages,
        tokenizer: BundleTokenizer,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        tools: Tools = (),
    ) -> list[int]:
        """Token ids of the prompt. No special token is added to the template's own, and what contents hold of them is text.

        The contents' special tokens are broken by a character that no text has; ``BundleTokenizer.encode_rendered`` joins them
        again without taking them for tokens. So nobody forges a turn, and other contents are encoded as ever.
        """
        source = self._sources[self._find(name, bool(tools))]
        known = json.dumps([messages, settings, tools], ensure_ascii=False, default=str) + source
        seam = next((each for each in SEAMS if each not in known and json.dumps(each)[1:-1] not in known), None)
        if seam is None:
            raise ApiError(400, "the messages hold Unicode's noncharacters U+FDD1 to U+FDEF; leave them out", param="messages")
        strict, loose = self._markers(tokenizer, self._find(name, bool(tools)))
        broken = [
            {key: value if key == "role" else _broken(value, seam, strict if each["role"] == "assistant" else loose)
             for key, value in each.items()}
            for each in messages
        ]  # fmt: skip
        text = self.render(broken, name, _broken(dict(settings or {}), seam, loose), _broken(list(tools), seam, loose), seam)
        return tokenizer.encode_rendered(text, seam)

    def _find(self, name: str | None, has_tools: bool = False) -> str:
        return find_name(self._sources, name, has_tools)

    def _checked(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if taken := next((key for key in settings if key in _OWN or key in self._special), None):
            raise ApiError(
                400, f"chat_template_kwargs.{taken} is the server's to give; leave it out", param="chat_template_kwargs"
            )
        return settings

    @functools.lru_cache(maxsize=8)  # noqa: B019 - lives as long as the server
    def _markers(self, tokenizer: BundleTokenizer, name: str) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        """What contents may not hold as tokens: in answers the special tokens, elsewhere also those that the template writes.

        Whitespace that a vocabulary has as added tokens is no marker.
        """
        special = {*tokenizer.special.values(), *self._special.values()}
        written = {each for each in tokenizer.added_names if each.strip() and each in self._sources[name]}
        return _starts(special), _starts(special | written)

    def _whole(self, messages: Messages, name: str, settings: Mapping[str, Any]) -> Messages:
        """The messages in roles that the template writes. Raises ApiError for one that it would leave out."""
        if "developer" not in self._sources[name]:
            messages = [_as_system(each) for each in messages]
        lost = self._lost(messages, name, settings)
        if lost is not None and messages[lost]["role"] == "developer":
            messages = [_as_system(each) for each in messages]
            lost = self._lost(messages, name, settings)
        if lost is not None:
            role = messages[lost]["role"]
            raise ApiError(
                400, f"the model's chat template leaves out message {lost}, of the role {role!r}; give it another role",
                param=f"messages.{lost}",
            )  # fmt: skip
        return messages

    def _lost(self, messages: Messages, name: str, settings: Mapping[str, Any]) -> int | None:
        """The first message that the template would leave out: rendered with short contents that can be told apart.

        Of an answer that calls tools the calls have to be there; what was said beside them, some templates leave out.
        """
        probe = [_probe(place, each) for place, each in enumerate(messages)]
        try:
            text = self._render([each for each, _ in probe], name, settings)
        except ApiError:
            return None  # the messages themselves will say why
        return next((place for place, (_, mark) in enumerate(probe) if mark is not None and mark not in text), None)

    def _render(self, messages: Messages, name: str, settings: Mapping[str, Any]) -> str:
        given = {"messages": messages, "add_generation_prompt": True, **self._special, **settings}
        try:
            return str(self._templates[name].render(given))
        except _Refusal as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", param="messages") from None
        except SecurityError:
            raise ApiError(500, "the model's chat template reaches for what it may not have, and was stopped") from None
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise ApiError(500, f"the model's chat template failed on these messages ({type(error).__name__})") from None


def _as_system(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _probe(place: int, message: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """(the message with a mark in place of what it says, the mark; None where it says nothing)."""
    mark = f"zq{place}qz"
    if calls := message.get("tool_calls"):
        marked = [{**call, "function": {**call["function"], "name": mark}} for call in calls]
        return {**message, "tool_calls": marked}, mark
    return ({**message, "content": mark}, mark) if message.get("content") else (message, None)


def _starts(names: set[str]) -> re.Pattern[str] | None:
    """Finds the first character of each of ``names``, of those too that overlap; None where there are none to find."""
    listed = sorted((re.escape(name) for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile(rf"(?=(?:{'|'.join(listed)}))(.)", re.DOTALL) if listed else None


def _broken(value: Any, seam: str, starts: re.Pattern[str] | None) -> Any:
    """``value`` with a seam in each marker that its texts hold."""
    if starts is None:
        return value
    if isinstance(value, str):
        return starts.sub(rf"\1{seam}", value)
    if isinstance(value, Mapping):
        return {_broken(key, seam, starts): _broken(each, seam, starts) for key, each in value.items()}
    return [_broken(each, seam, starts) for each in value] if isinstance(value, list) else value
