"""Requests and templates: a status below 500 or a template's own fault, JSON in the API's form, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.bundle.chat import ChatSources
from bilevel.bundle.confined import Limits
from bilevel.runtime.serve import encoder
from bilevel.runtime.serve.encoder import ConfinedTemplate
from bilevel.runtime.serve.refusal import ApiError
from tests.doubles.bundle import predict
from tests.fuzz.oracles import cases, outcome
from tests.fuzz.values import altered, no_json, odd_texts, written
from tests.runtime.serve.test_openai import write_chat_bundle
from tests.support.http_server import NAME, RunningServer, running

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": NAME, "prompt": ["a", "b"], "max_tokens": 2, "temperature": 1.0, "top_p": 0.5, "n": 1, "stop": ["x"],
        "stream": False, "logprobs": 2, "echo": True, "stream_options": {"include_usage": True},
    },
    "/v1/chat/completions": {
        "model": NAME, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 2,
        "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"a": [1]}, "response_format": {"type": "text"},
    },
    f"/v2/models/{NAME}/infer": {
        "id": "1", "parameters": {"max_tokens": 2, "temperature": 0.5},
        "inputs": [{"name": "input_ids", "shape": [2, 2], "datatype": "INT64", "data": [5, 6, 7, -1]}],
        "outputs": [{"name": "text"}, {"name": "output_ids", "parameters": {"binary_data": False}}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(write_chat_bundle(tmp_path_factory.mktemp("bundle"))) as server:
        yield server
        assert server.complete([5, 6], max_tokens=5)["usage"]["completion_tokens"] == len(predict([5, 6], 5))
        assert server.scheduler.num_active == server.scheduler.num_waiting == 0


def check(server: RunningServer, path: str, body: bytes, headers: dict[str, str] | None = None) -> None:
    status, _, answer = server.request("POST", path, body, headers)
    assert status < 500, answer
    if status != 200:
        error = answer["error"]
        message = error if path.startswith("/v2") else error["message"]
        assert message and "\n" not in message and "Traceback" not in message and len(message) < 3000


@cases(90)
@given(data=st.data(), path=st.sampled_from(sorted(REQUESTS)))
def test_a_request(server: RunningServer, data: st.DataObject, path: str) -> None:
    body = data.draw(altered(REQUESTS[path]).map(written) | no_json)
    outcome(lambda: check(server, path, body))


@cases(30)
@given(
    head=altered(REQUESTS[f"/v2/models/{NAME}/infer"]).map(written), tail=st.binary(max_size=64), length=st.integers(-2, 400)
)
def test_a_request_in_bytes(server: RunningServer, head: bytes, tail: bytes, length: int) -> None:
    headers = {"Inference-Header-Content-Length": str(length), "Content-Type": "application/octet-stream"}
    outcome(lambda: check(server, f"/v2/models/{NAME}/infer", head + tail, headers))


@cases(30)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "OPTIONS", "HEAD", "TRACE"]),
    path=st.sampled_from(
        ["/", "/v1/models", "/v1/completions", "/metrics", "/v2/models/x/versions/9/infer", "/v1/../etc", "/%00"]
    ),
    name=st.sampled_from(["Host", "Origin", "Authorization", "Content-Length", "Content-Type", "Transfer-Encoding", "Expect"]),
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)
def test_a_head(server: RunningServer, method: str, path: str, name: str, value: str) -> None:
    body = b"{}" if name != "Content-Length" else b""
    try:
        status, _, _ = server.request(method, path, body, {name: value})
    except OSError:
        return  # it waited for the body that was promised, or found no request in it
    assert status < 500


expressions = st.sampled_from(
    ["messages", "messages[0].content", "messages | length", "messages | tojson(indent=99999)", "bos_token * 9",
     "nothing.at.all",
     "''.__class__", "messages.append(1)", "cycler('a')", "'%s' % messages", "'{0.__class__}'.format(1)",
     "range(10**9)", "1/0",
     "strftime_now('%Y' * 9)",
     "raise_exception('no')", "'a' * 10 ** 10", "9 ** 9 ** 9", "namespace(a=1)",
     "self", "lipsum(999)",
     "messages | map(attribute='content') | join", "messages | sort | list", "joiner", "dict(a=1) | dictsort",
     "'x' | center(10**9)"]
)  # fmt: skip
templates = st.recursive(
    expressions.map(lambda text: f"{{{{ {text} }}}}")
    | odd_texts
    | st.sampled_from(["{%", "{{", "{#", "%}", "{% include 'x' %}"]),
    lambda inner: st.one_of(
        st.tuples(expressions, inner).map(lambda pair: f"{{% for m in {pair[0]} %}}{pair[1]}{{% endfor %}}"),
        st.tuples(expressions, inner).map(lambda pair: f"{{% if {pair[0]} %}}{pair[1]}{{% else %}}x{{% endif %}}"),
        st.tuples(expressions, inner).map(lambda pair: f"{{% set x = {pair[0]} %}}{pair[1]}"),
        st.tuples(inner, inner).map("".join),
        inner.map(lambda text: f"{{% macro m() %}}{text}{{% endmacro %}}{{{{ m() }}}}{{% generation %}}x{{% endgeneration %}}"),
    ),
    max_leaves=5,
)


@cases(12)
@given(source=templates)
def test_a_template(source: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_SHORT", Limits(cpu_seconds=1, start_cpu_seconds=2))

        def render() -> None:
            ConfinedTemplate(ChatSources({"default": source}, {"bos_token": "<s>"})).render([{"role": "user", "content": "a"}])

        outcome(render, ApiError)


def test_the_requests_are_requests(server: RunningServer) -> None:
    """Before they are altered."""
    for path, body in REQUESTS.items():
        status, _, answer = server.request("POST", path, json.loads(json.dumps(body)))
        assert status == 200, answer
