"""A real server on a free port, in a thread of the test process, and plain requests to it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.backend.session import Session
from bilevel.runtime.schedule.jobs import SchedulerLimits
from bilevel.runtime.serve.access import Access, Keys
from bilevel.runtime.serve.server import Server, listen, run_server
from bilevel.runtime.serve.service import HttpLimits

NAME = "fake"


class RunningServer:
    """Where the server listens, and its scheduler."""

    def __init__(self, port: int, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.port, self.server, self.loop = port, server, loop
        self.scheduler = server._scheduler
        self.url = f"http://127.0.0.1:{port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers in lower case, JSON or bytes); a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            content, found = response.read(), {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, found, json.loads(content) if is_json and content else content

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """POST /v1/completions, greedy unless told otherwise; the answer's JSON."""
        status, _, answer = self.request(
            "POST", "/v1/completions", {"model": NAME, "prompt": prompt, "temperature": 0, **fields}
        )
        assert status == 200, answer
        return answer

    def drain(self) -> None:
        """What the first signal does."""
        asyncio.run_coroutine_threadsafe(self.server.drain(), self.loop)


@contextmanager
def running(
    bundle: Path | Session,
    *,
    keys: Path | None = None,
    http: HttpLimits | None = None,
    grace: float = 30.0,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    **limits: Any,
) -> Iterator[RunningServer]:
    """Serve a bundle, or an opened one, for a while."""
    session = OnnxSession.open(bundle, threads=1) if isinstance(bundle, Path) else bundle
    listener = listen("127.0.0.1", 0)
    port, begun, found = listener.getsockname()[1], threading.Event(), []

    async def serve() -> None:
        def on_start(server: Server) -> None:
            found.append((server, asyncio.get_running_loop()))
            begun.set()

        opened = Access(None if keys is None else Keys(keys), hosts, origins)
        settings = SchedulerLimits(**{"max_rows": 4, "max_queue": 8, **limits})
        await run_server(session, NAME, settings, http or HttpLimits(), opened, listener, grace, on_start)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert begun.wait(30)
    server, loop = found[0]
    try:
        yield RunningServer(port, server, loop)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def free_port() -> int:
    """A port that nobody listens on now."""
    with listen("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])
