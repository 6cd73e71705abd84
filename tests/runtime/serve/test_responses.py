"""/v1/responses, judged by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from bilevel.runtime.serve.responses import Writer
from tests.doubles.bundle import edit_manifest, make_tokenizer, predict
from tests.runtime.serve.test_openai import write_chat_bundle
from tests.runtime.serve.test_structured import Person
from tests.runtime.serve.test_tools import CITY, HERMES_TEMPLATE, SUM
from tests.support.http_server import NAME, running

TOOLS: Any = [
    {"type": "function", "name": "get_weather", "description": "of a city", "parameters": CITY, "strict": True},
    {"type": "function", "name": "add", "parameters": SUM, "strict": False},
]
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    bundle: Path = write_chat_bundle(tmp_path_factory.mktemp("bundle"), HERMES_TEMPLATE)
    edit_manifest(bundle, lambda manifest: manifest["limits"].update(max_positions=2000))
    with running(bundle) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
        assert server.scheduler.num_active == server.scheduler.num_waiting == 0


def ask(client: openai.OpenAI, given: Any = "hi", **fields: Any) -> Any:
    return client.responses.create(**{"model": NAME, "input": given, "max_output_tokens": 300, "temperature": 0, **fields})


def test_text(client: openai.OpenAI) -> None:
    tokenizer = make_tokenizer()
    answer = ask(client, instructions="be brief", max_output_tokens=9)
    prompt = tokenizer.encode("[system]be brief[user]hi").ids
    tokens = predict(prompt, 9, limit=2000)
    assert answer.output_text == tokenizer.decode(tokens)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), len(tokens))
    is_cut = len(tokens) == 9
    assert answer.status == ("incomplete" if is_cut else "completed")
    assert (answer.incomplete_details.reason if is_cut else None) == ("max_output_tokens" if is_cut else None)


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}])
def test_the_events_make_the_same_answer(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = ask(client, **fields)
    with client.responses.stream(model=NAME, input="hi", max_output_tokens=300, temperature=0, **fields) as stream:
        events = list(stream)
    final: Any = events[-1].response  # type: ignore[union-attr]
    assert events[-1].type == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == whole.output_text and final.status == whole.status
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert [(each.type, getattr(each, "arguments", None)) for each in final.output] == [
        (each.type, getattr(each, "arguments", None)) for each in whole.output
    ]


def test_a_stream_that_fails_ends_in_an_event_of_that_name(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "push", lambda *_: 1 / 0)
    with client.responses.with_streaming_response.create(model=NAME, input="hi", stream=True) as response:
        *_, last = response.read().decode().strip().split("\n\n")
    name, _, data = last.partition("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and event["sequence_number"] == 2
    assert (event["type"], event["code"], event["param"]) == ("error", "server_error", None)
    assert "failed on this request" in event["message"]


def test_calls_and_their_results(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "name": "add"}):
        answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        (call,) = answer.output
        assert call.type == "function_call" and answer.status == "completed"
        jsonschema.validate(json.loads(call.arguments), {"get_weather": CITY, "add": SUM}[call.name])
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
        asked = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
        again = ask(client, [asked, *answer.output, result], tools=TOOLS, tool_choice="none", max_output_tokens=5)
        assert again.output[0].type == "message"
        last = ask(client, [asked, *answer.output, result, *again.output, asked], max_output_tokens=5)
        assert last.usage.input_tokens > again.usage.input_tokens


def test_a_type_of_the_clients(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model=NAME, input="hi", text_format=Person, max_output_tokens=800)
    assert isinstance(answer.output_parsed, Person)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store=True"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": [{"role": "user"}]}, "input.0.content is missing"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id is missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{**CALL, "call_id": "c" * 201}]}, "call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c" * 201, "output": "1"}]}, "call_id"),
        ({"input": [CALL] * 129}, "at most 128 items"),
        ({"text": {"format": {"type": "json_schema", "name": "s" * 201, "schema": {}}}}, "name"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": 7}}}}, "response_format"),
    ],
)
def test_refusals(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **{"given": "hi", **{("given" if key == "input" else key): value for key, value in fields.items()}})
