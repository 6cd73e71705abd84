"""What a server refuses: the right status, one sentence, nothing about the machine; and it goes on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import BundleError, ContextTooLong, RequestError
from bilevel.runtime.serve import connections
from bilevel.runtime.serve.chat import ChatTemplate
from bilevel.runtime.serve.errors import as_api_error
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.service import HttpLimits
from tests.doubles.bundle import MAX_POSITIONS, predict, write_bundle
from tests.support.http_server import NAME, RunningServer, running

LIMITS = HttpLimits(max_body=20_000, body_seconds=0.5, stall_seconds=1.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle, http=LIMITS, hosts=["x"]) as server:
        yield server


@pytest.fixture(autouse=True)
def still_healthy(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every refusal the server answers as before, and no row is stuck."""
    yield
    if "server" in request.fixturenames:
        server: RunningServer = request.getfixturevalue("server")
        answer = server.complete([5, 6], max_tokens=1)
        assert answer["usage"]["completion_tokens"] == len(predict([5, 6], 1))
        assert server.scheduler.num_active == server.scheduler.num_waiting == 0


def refused(server: RunningServer, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, answer = server.request("POST", path, body, headers)
    error = answer["error"]
    message = error["message"]
    assert message and "\n" not in message and "Traceback" not in message and "/work" not in message and ".py" not in message
    return status, error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 5}, "prompt must be a text, a list of token ids"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": [1.5]}, "prompt must be"),
        ({"prompt": [True]}, "prompt must be"),
        ({"prompt": [-1]}, "prompt must be"),
        ({"prompt": [2**70]}, "prompt must be"),
        ({"prompt": [5] * (MAX_POSITIONS + 1)}, f"the prompt has {MAX_POSITIONS + 1} tokens"),
        (
            {"max_tokens": MAX_POSITIONS + 1},
            f"and {MAX_POSITIONS + 1} were asked for, but this server holds {MAX_POSITIONS} in all",
        ),
        ({"max_tokens": -5}, "max_tokens=-5"),
        ({"max_tokens": 10**40}, "max_tokens="),
        ({"max_tokens": "5"}, "max_tokens='5': input should be a valid integer"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": 1e300}, "temperature=1e+300"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5=101"),
        ({"logit_bias": {"293": 1}}, "logit_bias names a token that this model does not have; its tokens are 0 to 292"),
        ({"store": True}, "store=True"),
        ({"bad_words": ["x"]}, "bad_words=['x']: value error, this server does not have that; leave it out"),
        ({"ignore_eos": True, "guided_choice": ["a"]}, "ignore_eos does not go with a text that follows a grammar"),
        ({"n": 0}, "n=0"),
        ({"n": 10**9}, "n=1000000000"),
        ({"n": 16}, "are 16 texts, this server takes 12"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"stop": [""]}, "stop must be a text of 1 to 200 characters"),
        ({"stop": ["a"] * 17}, "stop must be"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"echo": 1}, "echo=1"),
        ({"colour": "red"}, "colour is nothing that this server knows; leave it out"),
        ({"stream_options": {"x": 1}}, "stream_options.x is nothing that this server knows"),
        ({"model": None}, "model=None"),
    ],
)
def test_fields_that_make_no_sense(server: RunningServer, fields: dict[str, Any], message: str) -> None:
    status, told = refused(server, {"model": NAME, "prompt": [5], **fields})
    assert status == 400 and message in told["message"], told
    assert told["type"] == "invalid_request_error"


def test_a_context_that_is_too_long_has_a_code_of_its_own(server: RunningServer) -> None:
    """By the kind of the error, not by its words."""
    for fields in ({"prompt": [5] * (MAX_POSITIONS + 1)}, {"max_tokens": MAX_POSITIONS + 1}):
        _, error = refused(server, {"model": NAME, "prompt": [5], **fields})
        assert error["code"] == "context_length_exceeded"
    _, error = refused(server, {"model": NAME, "prompt": [MAX_POSITIONS * 100]})
    assert error["code"] is None
    assert as_api_error(ContextTooLong("it does not fit")).code == "context_length_exceeded"
    assert as_api_error(RequestError("the key holds 5 tokens, but one is needed")).code is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON"),
        (b"[]", "the body must be one JSON object"),
        (b"7", "the body must be one JSON object"),
        (b'{"model": "fake", "prompt": "\xff"}', "the body is not valid JSON"),
        (b'{"model": "fake", "prompt": "\\ud800"}', "the body is not valid JSON"),
        (b'{"model": "fake", "prompt": "a", "temperature": NaN}', "temperature="),
        (
            b'{"model": "fake", "prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
            "the body is not valid JSON: number out of range",
        ),
        (b"[" * 10_000, "the body is not valid JSON"),
        (b'{"prompt": "a"}', "model is missing; give it"),
    ],
)
def test_bodies_that_are_no_requests(server: RunningServer, body: bytes, message: str) -> None:
    status, told = refused(server, body)
    assert status == 400 and message in told["message"], told


def test_an_unknown_model(server: RunningServer) -> None:
    status, told = refused(server, {"model": "../../etc/passwd", "prompt": "a"})
    assert (status, told["code"]) == (404, "model_not_found")
    assert told["message"] == "the model '../../etc/passwd' is not served here, 'fake' is"


def test_chat_without_a_template(server: RunningServer) -> None:
    status, told = refused(server, {"model": NAME, "messages": [{"role": "user", "content": "a"}]}, "/v1/chat/completions")
    assert (status, told["message"]) == (400, "this model has no chat template; use /v1/completions")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f..%2fetc", "//", "/v1/"]
)
def test_path_tricks(server: RunningServer, path: str) -> None:
    status, _, answer = server.request("GET", path)
    assert status == 404 and isinstance(answer, dict) and "error" in answer


def test_methods_and_content_types(server: RunningServer) -> None:
    assert server.request("GET", "/v1/completions")[0] == 405
    assert server.request("DELETE", "/")[0] == 405
    body = json.dumps({"model": NAME, "prompt": "a"}).encode()
    status, told = refused(server, body, **{"Content-Type": "text/plain"})
    assert status == 415 and told["message"] == "the content type is text/plain; send application/json"
    status, told = refused(server, body, **{"Content-Encoding": "gzip"})
    assert status == 415


def test_pages_of_others_may_not_ask(server: RunningServer) -> None:
    """A web page that somebody visits must not be able to use the server on his machine."""
    for origin in ("https://evil.example", "null", f"http://localhost:{server.port}"):
        status, told = refused(server, {"model": NAME, "prompt": "a"}, Origin=origin)
        assert status == 403 and told["message"].startswith("a page of another origin")
    assert server.request("GET", "/v1/models", headers={"Origin": server.url})[0] == 200


def test_a_long_body_is_refused_declared_or_not(server: RunningServer) -> None:
    body = json.dumps({"model": NAME, "prompt": "a" * 30_000}).encode()
    assert refused(server, body)[0] == 413
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode() + b"7530\r\n" + b"a" * 30_000 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_slow_body_is_given_up(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_slow_head_is_given_up(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost")
        assert connection.recv(65536) == b""  # closed
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")


def test_a_client_that_leaves_while_it_waits(server: RunningServer) -> None:
    body = json.dumps({"model": NAME, "prompt": [5, 6], "max_tokens": 90, "temperature": 0}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
    wait_for(lambda: not server.scheduler.num_active + server.scheduler.num_waiting)


def test_a_full_queue_answers_429(bundle: Path) -> None:
    with running(bundle, hosts=["x"], max_rows=1, max_queue=1) as server:
        status, headers, answer = server.request("POST", "/v1/completions", {"model": NAME, "prompt": [[5], [6], [7]]})
        assert status == 400  # more than the server could ever hold
        server.scheduler._mean_seconds = 40.0
        server.scheduler.step = lambda: time.sleep(0.01)  # type: ignore[method-assign]
        jobs = {"model": NAME, "prompt": [[5], [6]], "stream": True}
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            body = json.dumps(jobs).encode()
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            status, headers, answer = server.request("POST", "/v1/completions", {"model": NAME, "prompt": [5]})
        del server.scheduler.step
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) == 120
        assert answer["error"]["message"] == "2 requests are waiting already; try again in 120 s"


def test_keys(bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# two users\nfirst-key\nsecond-key\n", encoding="utf-8")
    with running(bundle, keys=keys) as server:
        for path in ("/v1/models", "/metrics", f"/v2/models/{NAME}", "/nowhere"):
            for given in ({}, {"Authorization": "Bearer first"}, {"Authorization": "first-key"}, {"Authorization": "Bearer é"}):
                raw = {name: value.encode().decode("latin-1") for name, value in given.items()}
                status, headers, answer = server.request("GET", path, headers=raw)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
                assert "the API key is missing or wrong" in json.dumps(answer)
            assert server.request("GET", path, headers={"Authorization": "Bearer second-key"})[0] == (
                404 if path == "/nowhere" else 200
            )
        for path in ("/", "/v2/health/live", "/v2/health/ready", "/openapi.json"):
            assert server.request("GET", path)[0] == 200


def held_back(server: RunningServer, turns: int) -> threading.Semaphore:
    """The scheduler takes so many turns, and more as the semaphore is released."""
    allowed, step = threading.Semaphore(turns), server.scheduler.step
    server.scheduler.step = lambda: (allowed.acquire(), step())  # type: ignore[method-assign, assignment]
    return allowed


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_shutting_down_finishes_what_runs_and_refuses_the_rest(bundle: Path) -> None:
    with running(bundle, hosts=["x"], max_rows=1) as server:
        turns = held_back(server, 3)
        body = json.dumps({"model": NAME, "prompt": [5, 6], "max_tokens": 30, "temperature": 0}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: server.scheduler.num_active == 1)
            server.drain()
            wait_for(lambda: server.scheduler.is_closing)
            status, headers, answer = server.request("POST", "/v1/completions", {"model": NAME, "prompt": [5]})
            assert (status, answer["error"]["code"]) == (503, "shutting_down") and "retry-after" in headers
            assert server.request("GET", "/v2/health/ready")[0] == 503
            assert server.request("GET", "/v2/health/live")[0] == 200
            turns.release(100)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 200")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == len(predict([5, 6], 30))


def test_shutting_down_has_a_limit(bundle: Path) -> None:
    with running(bundle, hosts=["x"], max_rows=1, grace=0.1) as server:
        turns = held_back(server, 3)
        body = json.dumps({"model": NAME, "prompt": [5, 6], "max_tokens": 90, "temperature": 0}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: server.scheduler.num_active == 1)
            (job,) = server.scheduler._jobs.values()
            server.drain()
            wait_for(lambda: job.is_cancelled)
            turns.release(100)
            assert connection.recv(65536).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ ('%s' * 9).__mod__ }}{{ 'a'.format.__self__.__class__.__base__ }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_cannot_escape(template: str) -> None:
    with pytest.raises(ApiError) as error:
        ChatTemplate(template, {}).render([{"role": "user", "content": "hi"}])
    assert error.value.status == 500
    assert "template" in error.value.message and "passwd" not in error.value.message


def test_a_template_sees_no_insides() -> None:
    assert ChatTemplate("{{ raise_exception.__globals__ }}{{ strftime_now.__code__ }}", {}).render([]) == ""


def test_a_broken_template_is_found_when_the_server_starts() -> None:
    with pytest.raises(BundleError, match="the chat template is not valid"):
        ChatTemplate("{% for %}", {})


def test_messages_are_never_templates() -> None:
    text = ChatTemplate("{{ messages[0].content }}{{ eos_token }}", {"eos_token": "<eos>"}).render(
        [{"role": "user", "content": "{{ 7 * 7 }}"}]
    )
    assert text == "{{ 7 * 7 }}<eos>"
