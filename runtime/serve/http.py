"""Small HTTP parts: bodies with a limit, event streams that notice who left, keys, and a time limit for slow heads."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from bilevel.errors import RequestError
from bilevel.runtime.serve.errors import ApiError

T = TypeVar("T")
HEAD_SECONDS = 10.0  # for a request's first line and headers


async def read_body(request: Request, limit: int, seconds: float, kinds: Sequence[str] = ("application/json",)) -> bytes:
    """The whole body.

    Raises ApiError when it is too long, too slow, compressed, or of no kind in ``kinds`` ("": none given).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise ApiError(415, f"the content type is {kind[:60] or 'missing'}; send {' or '.join(filter(None, kinds))}")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(415, f"the content encoding is {encoding[:60]}; send the body as it is")
    too_long = ApiError(413, f"the body is longer than {limit} bytes; send less")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s; send it faster") from None


def check_origin(request: Request) -> None:
    """Raises ApiError 403 when a browser sends this on behalf of a page of another origin, against a server on localhost."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and origin.partition("://")[2] != host:
        raise ApiError(403, "a page of another origin sent this request; only this server's own page may")


async def _left(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(main: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, None]) -> T:
    """The result of ``main``; raises ClientDisconnect, and cancels it, when one of the others ends before."""
    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(each) for each in (main, *others)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away."""
    return await _first(work, _left(request.receive))


class EventStream(Response):
    """Server-sent events. Ends, and calls ``on_end``, when the events do, the client goes or takes nothing for ``seconds``."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None], seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end, self._seconds = events, on_end, seconds
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _first(self._pump(send), _left(receive), self._stalled())
        except ClientDisconnect:
            pass
        finally:
            self._on_end()

    async def _pump(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            self._sending_since = clock()
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._sending_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stalled(self) -> None:
        while True:
            await asyncio.sleep(self._seconds / 4)
            since = self._sending_since
            if since is not None and asyncio.get_running_loop().time() - since > self._seconds:
                return


class Keys:
    """The keys that open the server, one on each line of a file. Raises RequestError where the file holds none."""

    def __init__(self, path: Path) -> None:
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        self._digests = [_digest(line) for line in lines if line and not line.startswith("#")]
        if not self._digests:
            raise RequestError(f"{path} holds no key; write one on a line, for example: openssl rand -hex 24 > {path}")

    def find(self, request: Request) -> str:
        """The name under which a key's owner waits in the queue.

        Raises ApiError 401. Every key is compared, in constant time.
        """
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip()) if kind.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            refused = ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")
            refused.headers["WWW-Authenticate"] = "Bearer"
            raise refused
        return f"key {matches.index(True)}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, whose patience with a request's head has an end: HEAD_SECONDS."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Keep the time while no head is complete."""
        is_open = self.conn.their_state is h11.IDLE
        if is_open and self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up)
        elif not is_open and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
