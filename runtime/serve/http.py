"""Small HTTP parts: bodies with limits of every kind, and event streams that notice who left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from bilevel.errors import Overloaded
from bilevel.runtime.serve.refusal import ApiError

T = TypeVar("T")
MOST_TEXTS = 16_384  # of one body, names included


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


def check_crowd(body: bytes, most_values: int) -> None:
    """Raises ApiError 413 for JSON that holds more texts or values than any request needs, before it is read.

    A few MB hold millions of them, whose reading nothing interrupts. Looking costs a thousandth of that.
    """
    # With what stands in texts: more than there are, and enough to know for nearly all.
    if _count(body, b'"') // 2 <= MOST_TEXTS and _count(body, b",") <= most_values:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if (texts := _count(plain, b'"') // 2) > MOST_TEXTS:
        raise ApiError(413, f"the body holds {texts} texts, names included; send at most {MOST_TEXTS}")
    if (values := _count(b"".join(plain.split(b'"')[::2]), b",")) > most_values:
        raise ApiError(413, f"the body holds {values} values; send at most {most_values}")


def _count(body: bytes, byte: bytes) -> int:
    """As ``body.count``, which takes ten times as long where there are many."""
    return int(np.count_nonzero(np.frombuffer(body, np.uint8) == byte[0]))


class HeldBodies:
    """Bytes of all bodies that are being received or answered. Raises Overloaded for those that find no room."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0

    def counted(self, receive: Receive) -> tuple[Receive, Callable[[], None]]:
        """(``receive``, which counts; a function that forgets what it has counted)."""
        mine = 0

        async def receive_more() -> Message:
            nonlocal mine
            message = await receive()
            size = len(message.get("body", b""))
            if self._held + size > self._most:
                raise Overloaded(f"the requests under way hold {self._held >> 20} MiB; try again in 1 s", 1)
            mine, self._held = mine + size, self._held + size
            return message

        def forget() -> None:
            self._held -= mine

        return receive_more, forget


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
    """Server-sent events. Ends, and calls ``on_end``, when the events do or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _first(self._pump(send), _left(receive))
        except ClientDisconnect:
            pass
        finally:
            self._on_end()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
