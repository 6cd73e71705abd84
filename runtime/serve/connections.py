"""Connections: how many there may be, and how long a client may do nothing, neither say what it wants nor read what it got."""

from __future__ import annotations

import asyncio
import json
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for a request's first line and headers
MOST_CONNECTIONS = 1000
_SPARE_FILES = 100  # that are not connections


def raise_file_limit() -> int:
    """Let this process have as many connections as it takes; how many those are, at most MOST_CONNECTIONS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, max(1, soft - _SPARE_FILES))


def _refusal(status: int, phrase: str, message: str) -> bytes:
    """A whole answer in JSON, which closes the connection."""
    kind = "service_unavailable_error" if status == 503 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
    lines = (
        f"HTTP/1.1 {status} {phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Counted:
    """A transport that knows how much was written to it."""

    def __init__(self, transport: Any) -> None:
        self._transport, self._written = transport, 0

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    @property
    def taken(self) -> int:
        """Bytes that the client's side has taken."""
        return self._written - int(self._transport.get_write_buffer_size())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, whose patience has an end: with a request's head, and with who does not read the answer.

    stall_seconds: that a client may take nothing of what is there for it. most: connections.
    """

    stall_seconds = 60.0
    most = MOST_CONNECTIONS
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _seen: tuple[int, float] = (0, 0.0)  # bytes taken, and since when no more

    def connection_made(self, transport: Any) -> None:
        """Begin to keep the time; one connection too many is told so."""
        super().connection_made(_Counted(transport))  # type: ignore[arg-type]
        if len(self.connections) > self.most:
            message = f"this server has {self.most} connections already; try again later"
            self.transport.write(_refusal(503, "Service Unavailable", message))
            self.transport.close()
        self._watch_head()
        self._watch_reader()

    def data_received(self, data: bytes) -> None:
        """Whoever was refused is not listened to."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What was sent is no HTTP: told in JSON, as every other refusal."""
        self.transport.write(_refusal(400, "Bad Request", "this is no HTTP/1.1 request"))
        self.transport.close()

    def _watch_head(self) -> None:
        """Keep the time while no head is complete."""
        is_open = self.conn.their_state is h11.IDLE
        if is_open and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)
        elif not is_open and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def _watch_reader(self) -> None:
        """Cut off a client for whom something is there and who takes nothing."""
        now, taken = self.loop.time(), self.transport.taken  # type: ignore[attr-defined]
        if not self.transport.get_write_buffer_size() or taken != self._seen[0]:
            self._seen = (taken, now)
        elif now - self._seen[1] >= self.stall_seconds:
            self.transport.abort()
            return
        self._read_timer = self.loop.call_later(self.stall_seconds / 4, self._watch_reader)
