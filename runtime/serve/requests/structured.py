"""From what a request wants its answer to be like to a grammar: response_format, structured_outputs, tools."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field

from bilevel.errors import RequestError
from bilevel.runtime.grammar.sources import (
    ANY_OBJECT,
    choice_grammar,
    free_grammar,
    json_grammar,
    json_rule,
    regex_grammar,
)
from bilevel.runtime.serve.requests.habits import Strict
from bilevel.runtime.serve.requests.messages import AllowedTools, FunctionTool, NamedTool, ToolChoice
from bilevel.runtime.serve.tools.grammar import Literals, Tool, calls_grammar
from bilevel.runtime.serve.tools.layouts import Layout

MOST_TEXTS = 1000  # to choose from
SchemaName = Annotated[str, Field(max_length=200)]
Choice = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_TEXTS)]


class NamedSchema(Strict):
    """A JSON schema. strict: taken as said either way, for it is always enforced."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)
    name: SchemaName
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    description: str | None = None
    strict: bool | None = None


class PlainFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's name for the same and more; one of them is given. json: a schema, or its text."""

    json_: dict[str, Any] | str | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Structured(Protocol):
    """A request that may say what its answer is to be like."""

    response_format: PlainFormat | SchemaFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: dict[str, Any] | str | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


@dataclass(frozen=True)
class Wish:
    """What an answer has to follow. name: of the field that says so, for errors. schema: where it is JSON."""

    name: str
    grammar: str
    schema: Mapping[str, Any] | None = None


def asks_for_structure(asked: Structured) -> bool:
    """Whether the text of the answer has to follow something."""
    return next(iter(_given(asked)), None) is not None


def read_wish(asked: Structured) -> Wish:
    """What the text of the answer has to follow, where there is something.

    Raises RequestError, also where two fields ask for something.
    """
    given = dict(_given(asked))
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} both say what the answer has to be like; give one of them")
    ((name, (kind, value)),) = given.items()
    if kind == "json":
        schema = _schema(value, name)
        return Wish(name, json_grammar(schema, name), schema)
    make = {"regex": regex_grammar, "choice": choice_grammar, "grammar": free_grammar}[kind]
    return Wish(name, make(value, name))


def _given(asked: Structured) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(field, (kind, value)) of each field that asks for something."""
    form = asked.response_format
    if isinstance(form, SchemaFormat):
        yield "response_format", ("json", form.json_schema.schema_)
    elif form is not None and form.type == "json_object":
        yield "response_format", ("json", ANY_OBJECT)
    outputs = asked.structured_outputs or StructuredOutputs()
    for kind in ("json", "regex", "choice", "grammar"):
        for name, value in (
            (f"structured_outputs.{kind}", outputs.json_ if kind == "json" else getattr(outputs, kind)),
            (f"guided_{kind}", getattr(asked, f"guided_{kind}")),
        ):
            if value is not None:
                yield name, (kind, value)
    if outputs.json_object:
        yield "structured_outputs.json_object", ("json", ANY_OBJECT)


def _schema(value: Any, name: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(f"{name} is no JSON; give a schema, as an object or as its text") from None
        if not isinstance(value, dict):
            raise RequestError(f"{name} must be a JSON schema, which is an object")
    return dict(value)


@dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may call.

    tools: as templates read them; functions: as the grammar does. is_required: one is called. is_parallel: several may be.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    functions: tuple[Tool, ...] = ()
    is_required: bool = False
    is_parallel: bool = True

    def wish(self, layout: Layout, special: Mapping[int, str], text: Wish | None) -> Wish:
        """A grammar of answers that call them. text: what an answer without a call has to follow."""
        rule = None
        if text is not None and not self.is_required:
            if text.schema is None:
                raise RequestError(
                    f"{text.name} does not go with tools that may be called; set tool_choice to none or required"
                )
            rule = json_rule(text.schema, text.name)
        grammar = calls_grammar(
            layout, self.functions, Literals(special), required=self.is_required, parallel=self.is_parallel, text=rule
        )
        return Wish("tools", grammar)


def read_tools(tools: list[FunctionTool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """The tools that may be called. Raises RequestError for names given twice, unknown ones, and parameters of no object."""
    known = {tool.function.name: tool for tool in tools or ()}
    if len(known) < len(tools or ()):
        raise RequestError("tools holds two tools of one name; give each a name of its own")
    for name, tool in known.items():
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise RequestError(f"the parameters of tool {name} must be a schema of an object")
    names, is_required = list(known), choice == "required"
    if isinstance(choice, NamedTool):
        names, is_required = [choice.function.name], True
    elif isinstance(choice, AllowedTools):
        names = [each.function.name for each in choice.allowed_tools.tools]
        is_required = choice.allowed_tools.mode == "required"
    if unknown := next((name for name in names if name not in known), None):
        raise RequestError(f"tool_choice names {unknown}, which is none of tools")
    if is_required and not names:
        raise RequestError("tool_choice=required goes with tools; give some")
    if choice == "none" or not names:
        return ToolUse()
    chosen = [known[name] for name in dict.fromkeys(names)]
    return ToolUse(
        tuple(tool.as_template_input() for tool in chosen),
        tuple(tool.as_tool() for tool in chosen),
        is_required,
        parallel is not False and not isinstance(choice, NamedTool),
    )
