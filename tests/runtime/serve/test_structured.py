"""Structured output and tools over HTTP, judged by OpenAI's own client: whatever a model wants to say, the answer fits."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
import regex
from pydantic import BaseModel

from bilevel.errors import MissingDependency
from bilevel.runtime.serve.errors import as_api_error
from tests.doubles.bundle import edit_manifest
from tests.runtime.serve.test_openai import write_chat_bundle
from tests.runtime.serve.test_tools import CITY, HERMES_TEMPLATE, SUM
from tests.support.http_server import NAME, RunningServer, running

ASK: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "add", "parameters": SUM, "strict": True}},
]
SCHEMAS = {"get_weather": CITY, "add": SUM}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    bundle = write_chat_bundle(tmp_path_factory.mktemp("bundle"), HERMES_TEMPLATE)
    edit_manifest(bundle, lambda manifest: manifest["limits"].update(max_positions=2000))
    with running(bundle) as server:
        yield server
        assert server.scheduler.num_active == server.scheduler.num_waiting == 0


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, messages: Any = ASK, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": NAME, "messages": messages, "max_tokens": 400, "temperature": 0, **fields}
    )


class Person(BaseModel):
    kind: Literal["cat", "dog"]
    is_old: bool
    toys: list[Literal["ball", "bone"]]


def test_the_clients_own_parser_gets_its_type(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(model=NAME, messages=ASK, response_format=Person, seed=seed, max_tokens=800)
        assert isinstance(answer.choices[0].message.parsed, Person)
        assert answer.choices[0].finish_reason == "stop"
        again: Any = [*ASK, answer.choices[0].message, *ASK]  # with "parsed", which only the client's object has
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the client, at its own object
            assert ask(client, again, max_tokens=1).choices


def test_a_package_that_is_missing_is_named() -> None:
    refused = as_api_error(MissingDependency("llguidance is not installed: pip install 'bilevel[serve]'"))
    assert refused.status == 501 and "llguidance" in refused.message


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-f]{3,9}"}, "[a-f]{3,9}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_json": {"enum": [7]}}, "7"),
        ({"guided_json": '{"enum": [7]}'}, "7"),
        ({"guided_grammar": 'root ::= "ab" "c"'}, "abc"),
        ({"structured_outputs": {"regex": "x{4}"}}, "xxxx"),
        ({"structured_outputs": {"choice": ["für"]}}, "für"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "[ab]"),
        ({"structured_outputs": {"json": {"type": "null"}}}, "null"),
        ({"structured_outputs": {"json_object": True}, "stop": ["}"]}, r"\{.*"),
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"response_format": {"type": "text"}}, ".*"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_texts_follow_what_was_asked_for(server: RunningServer, fields: dict[str, Any], pattern: str, stream: bool) -> None:
    for path, prompt in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": ASK})):
        body = {"model": NAME, "max_tokens": 60, "temperature": 0, "stream": stream, **prompt, **fields}
        status, _, answer = server.request("POST", path, body)
        assert status == 200, answer
        if stream:
            lines = [line for line in answer.decode().splitlines() if line.startswith("data: {")]
            choices = [json.loads(line[6:])["choices"][0] for line in lines]
            text = "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
        else:
            choices = answer["choices"]
            text = choices[0].get("text") or choices[0]["message"]["content"]
        assert regex.fullmatch(pattern, text, regex.DOTALL, partial=choices[-1]["finish_reason"] == "length"), text


def test_rows_of_different_wishes_run_side_by_side(client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}

    def run(index: int) -> None:
        extra = {"guided_regex": f"[{chr(97 + index)}]{{{5 + 3 * index}}}"} if index % 3 else {}
        texts[index] = ask(client, max_tokens=40, extra_body=extra).choices[0].message.content

    threads = [threading.Thread(target=run, args=(index,)) for index in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(texts[index] == chr(97 + index) * (5 + 3 * index) for index in range(9) if index % 3)
    assert texts[0] == texts[3] == texts[6]


def test_several_choices_each_follow(client: openai.OpenAI) -> None:
    answer = ask(client, n=4, temperature=1.0, seed=1, extra_body={"guided_regex": "[a-z]{12}"})
    texts = [choice.message.content for choice in answer.choices]
    assert all(regex.fullmatch("[a-z]{12}", text) for text in texts) and len(set(texts)) > 1


def test_a_limit_in_the_middle_says_so(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["a" * 50]}}}
    answer = ask(client, max_tokens=4, response_format=schema)
    assert answer.choices[0].finish_reason == "length"
    answer = ask(client, max_tokens=4, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content


def test_a_dead_end_says_so(server: RunningServer) -> None:
    """A state with more ways on than one step may look at; a later request is none the worse for it."""
    rule = 'start: x\nx: x x | ("a"{1000}){1000} | "b"'
    body = {"model": NAME, "prompt": "a", "guided_grammar": rule, "temperature": 0, "max_tokens": 200}
    status, _, answer = server.request("POST", "/v1/completions", body)
    assert status == 400 or answer["choices"][0]["finish_reason"] in ("dead_end", "length")
    assert server.complete("a", guided_choice=["ok"])["choices"][0]["text"] == "ok"


def calls_of(answer: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls or []]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_calls_fit_their_schemas_streamed_or_whole(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(3):
        fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "temperature": 1.0, "seed": seed}
        answer = ask(client, **fields)
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        ((name, arguments),) = calls_of(answer)
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert isinstance(choice, str) or name == "add"
        with client.chat.completions.stream(model=NAME, messages=ASK, max_tokens=400, **fields) as stream:
            final = stream.get_final_completion()
        assert calls_of(final) == calls_of(answer) and final.choices[0].finish_reason == "tool_calls"
        assert final.choices[0].message.tool_calls[0].id.startswith("call_")


def test_calls_and_results_are_taken_back(client: openai.OpenAI) -> None:
    """Whatever the server says, it understands in the next turn: calls, text, and what was cut off."""
    for fields in ({"tool_choice": "required", "parallel_tool_calls": False}, {}, {"tool_choice": "none"}, {"max_tokens": 30}):
        given: dict[str, Any] = {"tools": TOOLS, "max_tokens": 200, **fields}
        message = ask(client, **given).choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "42"}]}
            for call in message.tool_calls or []
        ]
        again = ask(client, [*ASK, message, *results, *ASK], tools=TOOLS, tool_choice="none", max_tokens=5)
        assert again.choices[0].finish_reason in ("stop", "length")


def test_auto_reads_what_the_model_says(client: openai.OpenAI) -> None:
    answer = ask(client, tools=TOOLS, max_tokens=60)
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": 7}}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}}, "give one of them"),
        ({"extra_body": {"guided_json": "["}}, "guided_json is no JSON"),
        ({"extra_body": {"guided_json": "[]"}}, "guided_json must be a JSON schema"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"structured_outputs": {"xml": "a"}}}, "structured_outputs.xml is nothing that this server knows"),
        ({"tools": TOOLS, "tool_choice": "often"}, "tool_choice must be none, auto, required or"),
        ({"tool_choice": "required"}, "tool_choice=required goes with tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id belongs to the role tool"),
        ({"messages": [{"role": "user"}]}, "content is missing"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]}, "tool_calls belong to the role assistant"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **{"messages": ASK, **fields})
