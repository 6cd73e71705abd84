"""POST /v1/responses: its body, and the chat that it asks for, which is all in it: the server keeps no conversations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bilevel.runtime.serve.requests.habits import Habits, Nothing, StreamHabits, Strict
from bilevel.runtime.serve.requests.messages import FIRST_ERROR, MOST_TOOLS, SOME, CallId, Function, ToolName
from bilevel.runtime.serve.requests.schemas import ChatRequest, Number
from bilevel.runtime.serve.requests.structured import SchemaName


class Part(Strict):
    """One piece of a message's content, given or answered."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Nothing = None
    logprobs: Any = None


Content = str | Annotated[list[Part], FIRST_ERROR]
Status = Literal["in_progress", "completed", "incomplete"]


class Item(Strict):
    """One item of the input: a message, a call of an earlier answer, or what a call gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    call_id: CallId | None = None
    name: ToolName | None = None
    arguments: str | None = None
    output: Content | None = None
    id: str | None = None
    status: Status | None = None
    parsed_arguments: Any = None

    @property
    def missing(self) -> str | None:
        """The first field that an item of this type needs, and does not have."""
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }[self.type]
        return next((name for name in needed if getattr(self, name) is None), None)


class ResponseTool(Function):
    """A function that may be called."""

    type: Literal["function"]


class ResponseToolChoice(Strict):
    """This tool is called."""

    type: Literal["function"]
    name: ToolName


class TextForm(Strict):
    """What the text of an answer is like; name, schema and strict belong to json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None
    description: str | None = None


class TextSettings(Strict):
    """format: of the text."""

    format: TextForm | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """effort: as in chats."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: None = None


class ResponseRequest(Habits):
    """POST /v1/responses: text in, text and calls out."""

    model: str
    input: str | Annotated[list[Item], SOME, FIRST_ERROR]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = 1.0
    stream: bool | None = False
    stream_options: StreamHabits | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS), FIRST_ERROR] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: Nothing = None
    top_logprobs: Literal[0] | None = None
    max_tool_calls: None = None

    def as_chat(self) -> ChatRequest:
        """The chat that is asked for, whose messages are not yet looked at. Raises ValidationError where it is none."""
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        choice = self.tool_choice
        named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, ResponseToolChoice) else choice
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()]
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": [*system, *_messages(items)],
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "tools": tools,
                "tool_choice": named,
                "parallel_tool_calls": self.parallel_tool_calls,
                "response_format": _format(self.text),
                "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            }
        )


def _messages(items: list[Item]) -> list[dict[str, Any]]:
    """Items as a chat's messages; calls belong to the answer before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item.type == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif item.type == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": item.role, "content": _text(item.content)})
    return messages


def _text(content: Content | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _format(text: TextSettings | None) -> dict[str, Any] | None:
    form = None if text is None else text.format
    if form is None:
        return None
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": form.type, "json_schema": {"name": form.name or "", "schema": form.schema_ or {}, "strict": form.strict}}
