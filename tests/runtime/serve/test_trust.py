"""What a stranger's request or file may do to a server: cost little, and never more than its share."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.bundle.confined import Limits
from bilevel.errors import BundleError, Overloaded
from bilevel.runtime.serve import encoder, http
from bilevel.runtime.serve.connections import PatientProtocol
from bilevel.runtime.serve.encoder import find_template
from bilevel.runtime.serve.http import HeldBodies, check_crowd
from bilevel.runtime.serve.refusal import ApiError
from bilevel.runtime.serve.requests.schemas import CompletionRequest
from bilevel.runtime.serve.server import Server
from bilevel.runtime.serve.service import HttpLimits, Service
from tests.doubles.bundle import MAX_POSITIONS, edit_manifest, file_record, write_bundle
from tests.runtime.serve.test_refusals import wait_for
from tests.support.http_server import NAME, RunningServer, running

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HANGS = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
COSTS = {
    "time while it is read": "{{ 9 ** (9 ** 9) }}",
    "memory": "{% set x = namespace(a='a' * 99999) %}{% for i in range(99) %}{% set x.a = x.a + x.a %}{% endfor %}",
    "memory while it is read": "{{ 'a' * 10 ** 12 }}",
    "formatting": "{{ '%099999999999d' % 1 }}",
    "output": "{{ 'a' * (17 * 2 ** 20) }}",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of the processor's time is enough to see that it ends."""
    monkeypatch.setattr(encoder, "_SHORT", Limits(cpu_seconds=1, start_cpu_seconds=2))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    bundle, limits = write_bundle(tmp_path_factory.mktemp("bundle")), HttpLimits(stall_seconds=0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "Board.lan")
        with running(bundle, http=limits, hosts=["known.example"], origins=["https://chat.example"]) as server:
            yield server


def post(server: RunningServer, path: str, body: bytes) -> tuple[int, str]:
    status, _, answer = server.request("POST", path, body)
    error = answer["error"]
    return status, error if isinstance(error, str) else error["message"]


def prompts(content: str) -> bytes:
    return f'{{"model": "{NAME}", "prompt": {content}}}'.encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (prompts("[" + ",".join(['"a"'] * 300_000) + "]"), "the body holds 300003 texts"),
        (prompts("[" + ",".join(['"a",1'] * 9_000) + "]"), "must be a text, a list"),
        (prompts("[" + ",".join(["[]"] * 300_000) + "]"), "the body holds 300000 values"),
        (prompts("[" + ",".join(["-1"] * 60_000) + "]"), "must be a text, a list"),
        (prompts("[" + ",".join(['"a"'] * 10_000) + "]"), "10000 prompts with n=1 are 10000 texts, this server takes 12"),
        (prompts('"' + "a " * 500_000 + '"'), "the prompt has 1000000 characters, but this server holds 100 tokens"),
        (prompts('"' + "a" * 101 + '"'), f"the prompt has 101 tokens, but this server holds {MAX_POSITIONS} in all"),
        (prompts("[" + ",".join(["1"] * 60_000) + "]"), "the prompt has 60000 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_crowds_are_refused(server: RunningServer, body: bytes, message: str) -> None:
    status, told = post(server, "/v1/completions", body)
    assert status in (400, 413) and message in told


def test_however_many_bodies_come_at_once_the_loop_goes_round_between_any_two(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, seen = 0, list[int]()

    async def count() -> None:
        nonlocal rounds
        while len(seen) < 16:
            rounds += 1
            await asyncio.sleep(0)

    def look(*_: Any) -> None:
        seen.append(rounds)

    async def serve() -> None:
        service = Service(NAME, Mock(row_tokens=9), Mock(), Mock(), "onnx", Mock())
        await asyncio.gather(count(), *(service.read(CompletionRequest, b"{}") for _ in range(8)))

    monkeypatch.setattr("bilevel.runtime.serve.service.check_crowd", look)
    monkeypatch.setattr("bilevel.runtime.serve.service.validated", look)
    asyncio.run(serve())
    assert len(set(seen)) == 16


@pytest.mark.parametrize("shape", [[2**31 - 1, 0], [0, 2**31 - 1], [2**31 - 1, 2**31 - 1], [1, 2**31 - 1]])
def test_a_shape_makes_nothing(server: RunningServer, shape: list[int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = {"name": "input_ids", "shape": shape, "datatype": "INT64", "data": []}
    status, told = post(server, f"/v2/models/{NAME}/infer", json.dumps({"inputs": [tensor]}).encode())
    assert status == 400 and ("this server takes 12" in told or f"holds {MAX_POSITIONS}" in told)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_texts_as_bytes_are_counted_before_they_are_made(server: RunningServer) -> None:
    size = 1_000_000
    tensor = {"name": "text", "shape": [5], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    status, _, answer = server.request("POST", f"/v2/models/{NAME}/infer", head + bytes(size), headers)
    assert status == 400 and "which is 5 values, and 6 were given" in answer["error"]


json_values = st.recursive(
    st.none() | st.integers() | st.text(alphabet='"\\,[]ab', max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(alphabet='"\\,a', max_size=3), inner, max_size=4),
)


def counted(value: Any) -> tuple[int, int]:
    """(texts, commas between values) of a JSON value."""
    if isinstance(value, str):
        return 1, 0
    inner = list(value) + list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    counts = [counted(each) for each in inner]
    return sum(each[0] for each in counts), sum(each[1] for each in counts) + (max(0, len(value) - 1) if inner else 0)


@given(value=json_values)
def test_what_is_counted_is_what_is_there(value: Any) -> None:
    """However texts spell quotes, backslashes and commas."""
    texts, commas = counted(value)
    body = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "MOST_TEXTS", texts)
        check_crowd(body, commas)
        if commas:
            with pytest.raises(ApiError, match=f"holds {commas} values"):
                check_crowd(body, commas - 1)
        if texts:
            patch.setattr(http, "MOST_TEXTS", texts - 1)
            with pytest.raises(ApiError, match=f"holds {texts} texts"):
                check_crowd(body, commas)


def test_bodies_have_room_together() -> None:
    bodies = HeldBodies(100)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"a" * 60, "more_body": True}

    first, forget = bodies.counted(receive)
    asyncio.run(first())
    other, _ = bodies.counted(receive)
    with pytest.raises(Overloaded, match="try again in 1 s"):
        asyncio.run(other())
    forget()
    asyncio.run(other())


def written(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize("what", COSTS)
def test_a_template_that_costs_too_much(what: str, tmp_path: Path) -> None:
    """It is stopped, in whatever it is immoderate, and the next conversation finds it well."""
    limited = "{% if messages[0].content == 'x' %}" + COSTS[what] + "{% endif %}{{ messages[0].content }}"
    with pytest.raises((ApiError, BundleError), match=r"was stopped|MemoryError|OverflowError|is not valid"):
        template = find_template(written(tmp_path, limited))
        assert template is not None
        template.render([{"role": "user", "content": "x"}])
        pytest.fail("it was rendered")
    if "read" not in what:
        assert template is not None and template.render([{"role": "user", "content": "fox"}]) == "fox"


def test_a_template_that_hangs_does_not_hang_the_server(tmp_path: Path) -> None:
    bundle = written(write_bundle(tmp_path), HANGS)
    edit_manifest(bundle, lambda m: m["files"].update({"chat_template.jinja": file_record(bundle / "chat_template.jinja")}))
    with running(bundle) as server:
        body = {"model": NAME, "messages": [{"role": "user", "content": "loop"}], "max_tokens": 2}
        status, told = post(server, "/v1/chat/completions", json.dumps(body).encode())
        assert status == 500 and told == "the model's chat template or its tokenizer took longer than 1 s and was stopped"
        body["messages"] = [{"role": "user", "content": "hi"}]
        assert server.request("POST", "/v1/chat/completions", body)[0] == 200


def test_a_template_that_the_manifest_does_not_list_is_not_used(tmp_path: Path) -> None:
    bundle = written(write_bundle(tmp_path), "{{ messages[0].content }}")
    (bundle / "chat_template.rag.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (bundle / "tokenizer_config.json").write_text('{"chat_template": "x"}', encoding="utf-8")
    with running(bundle) as server:
        status, told = post(
            server, "/v1/chat/completions", json.dumps({"model": NAME, "messages": [{"role": "user", "content": "a"}]}).encode()
        )
        assert (status, told) == (400, "this model has no chat template; use /v1/completions")


def test_a_tokenizer_that_blows_up(tmp_path: Path) -> None:
    """Its normaliser makes 16 letters of one, eight times over."""
    bundle = write_bundle(tmp_path)
    settings = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    settings["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}] * 8,
    }
    (bundle / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    edit_manifest(bundle, lambda m: m["files"].update({"tokenizer.json": file_record(bundle / "tokenizer.json")}))
    with running(bundle) as server:
        status, told = post(server, "/v1/completions", prompts('"a"'))
        assert status == 500 and told.startswith("the model's tokenizer took") and told.endswith("and was stopped")
        status, _, answer = server.request("POST", "/v1/completions", {"model": NAME, "prompt": "fox", "max_tokens": 2})
        assert status == 200, answer


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("known.example.evil", 403),
        ("[::1", 200),
        ("127.0.0.1", 200),
        ("localhost:1234", 200),
        ("LOCALHOST", 200),
        ("a.localhost", 200),
        ("192.168.1.7:8000", 200),
        ("[::1]:8000", 200),
        ("known.example", 200),
        ("board:8000", 200),
        ("board.lan", 200),
        ("Board.local:8000", 200),
        ("board.evil", 403),
        ("evil.local", 403),
        ("Known.Example.:80", 200),
    ],
)
def test_a_name_that_was_made_to_point_here(server: RunningServer, host: str, status: int) -> None:
    """DNS rebinding: the browser takes the page for this server's own, and says so in Host."""
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        found, _, answer = server.request("GET", "/v1/models", headers=headers)
        assert found == status
        assert status == 200 or "this server is not known as" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", f"/v2/models/{NAME}/infer"])
def test_a_fault_of_the_servers_own(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Answered in the API's form, and logged once."""

    async def fail(*_: object) -> None:
        raise ZeroDivisionError("a detail")

    monkeypatch.setattr(Service, "body", fail)
    status, told = post(server, path, prompts('"a"'))
    assert status == 500 and told == "the server failed on this request; its log says why"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_pages_that_are_allowed(server: RunningServer) -> None:
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    status, headers, _ = server.request("OPTIONS", "/v1/completions", headers=asked)
    assert status == 200 and headers["access-control-allow-origin"] == "https://chat.example"
    status, headers, _ = server.request("GET", "/v1/models", headers={"Origin": "https://chat.example"})
    assert status == 200 and headers["access-control-allow-origin"] == "https://chat.example"
    for origin in ("https://chat.example.evil", "http://chat.example", "null"):
        status, headers, _ = server.request("GET", "/v1/models", headers={"Origin": origin})
        assert status == 403 and "access-control-allow-origin" not in headers


def test_an_answer_that_nobody_reads_is_given_up(server: RunningServer) -> None:
    connections = server.server.server_state.connections
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.setblocking(False)
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400
        client.send(asked)
        wait_for(lambda: any(each.transport.get_write_buffer_size() for each in list(connections)))
        wait_for(lambda: not any(each.transport.get_write_buffer_size() for each in list(connections)))
    assert server.request("GET", "/v1/models")[0] == 200


def test_one_connection_too_many(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "most", 2)
    wait_for(lambda: not server.server.server_state.connections)
    kinds = {type(each) for each in list(server.server.server_state.connections)}
    assert not kinds
    with socket.create_connection(("127.0.0.1", server.port)), socket.create_connection(("127.0.0.1", server.port)):
        wait_for(lambda: len(server.server.server_state.connections) == 2)
        protocol = type(next(iter(server.server.server_state.connections)))
        monkeypatch.setattr(protocol, "most", 2)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as third:
            head, _, body = third.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503") and "2 connections" in json.loads(body)["error"]["message"]


def test_what_is_no_http_is_refused_in_json(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"\x16\x03\x01 TLS\r\n\r\n")
        head, _, body = client.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["message"] == "this is no HTTP/1.1 request"


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a thread waits for: nothing is waited for."""

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        assert status == 128 + signal.SIGTERM
        raise Ended

    monkeypatch.setattr("os._exit", end)
    server = Server.__new__(Server)
    server._draining = True
    with pytest.raises(Ended):
        server.handle_exit(signal.SIGTERM, None)
