"""POST /v1/responses: an answer as items, whole or as events (OpenAI's API; its newer clients ask for nothing else)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bilevel.runtime.serve.answers import Answers, Piece
from bilevel.runtime.serve.errors import as_api_error, error_body, first_problem
from bilevel.runtime.serve.format import usage
from bilevel.runtime.serve.http import EventStream, unless_gone
from bilevel.runtime.serve.openai import start_chat
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.requests.responses import ResponseRequest, ResponseToolChoice
from bilevel.runtime.serve.service import Service
from bilevel.runtime.serve.tools.parser import CallDelta, CallParser, Delta

_CUT = {"length": "max_output_tokens", "dead_end": "dead_end"}  # why an answer is incomplete


async def respond(request: Request) -> Response:
    """POST /v1/responses."""
    service: Service = request.app.state.service
    asked = await service.read(ResponseRequest, await service.body(request))
    service.check_model(asked.model)
    for place, item in enumerate(asked.input if isinstance(asked.input, list) else ()):
        if item.missing is not None:
            raise ApiError(400, f"input.{place}.{item.missing} is missing; give it", param=f"input.{place}")
    try:
        chat = asked.as_chat()
    except ValidationError as error:
        raise first_problem(error) from None
    answers, open_parser = await start_chat(service, request, chat)
    writer = Writer(service, asked, None if open_parser is None else open_parser())
    if asked.stream:
        return EventStream(_events(request, answers, writer), answers.cancel)

    async def collect() -> None:
        async for pieces in answers:
            for piece in pieces:
                writer.push(piece)

    await unless_gone(request, collect())
    return JSONResponse(writer.response(answers))


async def _events(request: Request, answers: Answers, writer: Writer) -> AsyncIterator[bytes]:
    yield b"".join(_event(each) for each in writer.begin(answers))
    try:
        async for pieces in answers:
            yield b"".join(_event(event) for piece in pieces for event in writer.push(piece))
    except Exception as error:  # noqa: BLE001 - the status is out, so the error is an event
        body = error_body(as_api_error(error), request.url.path)["error"]
        code = body["type"] if body["code"] is None else body["code"]
        yield _event({**body, "type": "error", "code": code, "sequence_number": writer.number()})
        return
    final = writer.response(answers)
    yield _event({"type": f"response.{final['status']}", "sequence_number": writer.number(), "response": final})


def _event(content: dict[str, Any]) -> bytes:
    return f"event: {content['type']}\ndata: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Writer:
    """Makes one answer's items, and the events that tell of them."""

    def __init__(self, service: Service, asked: ResponseRequest, parser: CallParser | None) -> None:
        self._service, self._asked, self._parser = service, asked, parser
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._items: list[dict[str, Any]] = []
        self._calls: dict[int, int] = {}  # a call's index -> its item's
        self._number, self._reason = -1, ""

    def number(self) -> int:
        """The next event's."""
        self._number += 1
        return self._number

    def begin(self, answers: Answers) -> list[dict[str, Any]]:
        """The events before the first token."""
        response = self.response(answers, "in_progress")
        kinds = ("response.created", "response.in_progress")
        return [{"type": kind, "sequence_number": self.number(), "response": response} for kind in kinds]

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """What one token adds: events."""
        delta = Delta(piece.text)
        if self._parser is not None:
            special = self._service.tokenizer.special
            delta = self._parser.push(piece.text, None if piece.token is None else special.get(piece.token))
            if piece.finish_reason is not None:
                delta.content += self._parser.finish().content
        events = self._text(delta.content) if delta.content else []
        for call in delta.calls:
            events += self._call(call)
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason
            if not self._items:
                events += self._text("")
            events += self._close("incomplete" if piece.finish_reason in _CUT else "completed")
        return events

    def response(self, answers: Answers, status: str | None = None) -> dict[str, Any]:
        """The whole answer, as far as it has come. status: None for what it ended as."""
        cut, asked = _CUT.get(self._reason), self._asked
        counts = usage(answers.choices, 1)
        status = status or ("incomplete" if cut else "completed")
        text = {"format": {"type": "text"}} if asked.text is None else asked.text.model_dump(by_alias=True, exclude_none=True)
        choice = asked.tool_choice
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": cut} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._service.name,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "temperature": asked.temperature,
            "text": text,
            "tool_choice": choice.model_dump() if isinstance(choice, ResponseToolChoice) else choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }  # fmt: skip

    def _tell(self, kind: str, **content: Any) -> dict[str, Any]:
        place = len(self._items) - 1
        of_item = {} if "item" in content else {"item_id": self._items[place]["id"]}
        return {"type": f"response.{kind}", "sequence_number": self.number(), "output_index": place, **of_item, **content}

    def _open(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._close("completed")
        self._items.append(item)
        return [*events, self._tell("output_item.added", item={**item, "content": []} if "content" in item else dict(item))]

    def _text(self, text: str) -> list[dict[str, Any]]:
        events = []
        if not self._items or self._items[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": "message", "role": "assistant", "status": "in_progress", "content": [part]}
            events = self._open({"id": f"msg_{secrets.token_hex(12)}", **item})
            events.append(self._tell("content_part.added", content_index=0, part=dict(part)))
        self._items[-1]["content"][0]["text"] += text
        if text:
            events.append(self._tell("output_text.delta", content_index=0, delta=text, logprobs=[]))
        return events

    def _call(self, call: CallDelta) -> list[dict[str, Any]]:
        events = []
        if call.id is not None:
            item = {"type": "function_call", "status": "in_progress", "call_id": call.id, "name": call.name, "arguments": ""}
            events = self._open({"id": f"fc_{secrets.token_hex(12)}", **item})
        self._items[-1]["arguments"] += call.arguments
        if call.arguments:
            events.append(self._tell("function_call_arguments.delta", delta=call.arguments))
        return events

    def _close(self, status: str) -> list[dict[str, Any]]:
        """The events of an item's end."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            events = [self._tell("output_text.done", content_index=0, text=part["text"], logprobs=[])]
            events.append(self._tell("content_part.done", content_index=0, part=dict(part)))
        else:
            events = [self._tell("function_call_arguments.done", name=item["name"], arguments=item["arguments"])]
        return [*events, self._tell("output_item.done", item=dict(item))]
