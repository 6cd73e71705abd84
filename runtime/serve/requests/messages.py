"""The turns of a chat and the tools that it may call, as clients send them and as chat templates read them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from bilevel.runtime.serve.requests.habits import AnswerHabits, PartHabits, Strict
from bilevel.runtime.serve.tools.grammar import Tool

MOST_TOOLS = 128
SOME = Field(min_length=1)
# Of a long list one error is enough to refuse it; collecting them all takes seconds.
FIRST_ERROR = Field(fail_fast=True)
CallId = Annotated[str, Field(max_length=200)]
ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_./:-]+$")]


class TextPart(PartHabits):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call: arguments are JSON, or what there was of it when the answer ended."""

    name: ToolName
    arguments: str
    parsed_arguments: Any = None  # the same, as the client read them


class ToolCall(Strict):
    """One call of an answer, as the server wrote it."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates read it: the arguments are an object where they are one."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        given = arguments if isinstance(arguments, dict) else self.function.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": given}}


class Message(AnswerHabits):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], FIRST_ERROR] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS), FIRST_ERROR] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates read it: content is text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        given = {name: getattr(self, name) for name in ("name", "tool_call_id", "reasoning_content")}
        message = {"role": self.role, "content": content, **{name: value for name, value in given.items() if value is not None}}
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        return message

    @property
    def problem(self) -> str | None:
        """What is missing or out of place, None for nothing."""
        if self.tool_calls and self.role != "assistant":
            return f"tool_calls belong to the role assistant, not {self.role}"
        if (self.tool_call_id is not None) != (self.role == "tool"):
            return "tool_call_id belongs to the role tool, which needs one"
        if self.content is None and self.role != "assistant":
            return "content is missing; give it"
        return None


class Function(Strict):
    """A function that may be called. parameters: a JSON schema of an object."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    """One tool."""

    type: Literal["function"]
    function: Function

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates read it: without what only this server heeds."""
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"}, exclude_none=True)}

    def as_tool(self) -> Tool:
        """As the grammar reads it; parameters are an object whether they say so or not."""
        given, is_strict = self.function.parameters, bool(self.function.strict)
        if not given:
            return Tool(self.function.name, is_strict=is_strict)
        return Tool(self.function.name, {"type": "object", **given}, is_strict)


class NamedFunction(Strict):
    """The name of a tool."""

    name: ToolName


class NamedTool(Strict):
    """tool_choice: this tool is called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedSet(Strict):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedTools(Strict):
    """tool_choice: these of the tools, and no others, may or must be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet


ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
