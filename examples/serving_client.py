"""Small HTTP clients for measurements, and a server process to measure: as little of their own as possible.

``ask`` is one request, for many at once in asyncio. ``Clients`` is for times: it reads bytes and notes when they came, because
on a small machine a client that parses what it reads takes the cores from the model that it measures.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """One streamed answer: its text, its usage, and when (time.perf_counter) it was asked and each token came."""

    asked: float
    status: int = 0
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    moments: list[float] = field(default_factory=list)
    body: bytes = b""

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]


async def ask(port: int, body: Any, stop_after: int | None = None, answer: Answer | None = None) -> Answer:
    """POST /v1/completions; bytes go as they are. stop_after: hang up after so many tokens. answer: filled as tokens come."""
    answer = answer or Answer(0.0)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    answer.asked = time.perf_counter()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        answer.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if answer.status != 200:
                answer.body += line
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            answer.usage = event.get("usage") or answer.usage
            if event.get("choices"):
                answer.moments.append(time.perf_counter())
                answer.text += event["choices"][0]["text"]
                if len(answer.moments) == stop_after:
                    break
    finally:
        writer.close()
    return answer


async def post_json(port: int, path: str, body: Any) -> tuple[int, Any]:
    """The status and the JSON of a whole answer."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    try:
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        answer, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(answer.split()[1]), json.loads(content)


class Stream:
    """One streamed answer as it comes: bytes, and (time.perf_counter, tokens) of each piece."""

    def __init__(self, connection: socket.socket, data: bytes, prompt: list[int]) -> None:
        self.prompt, self.connection, self.raw, self.pieces = prompt, connection, bytearray(), list[tuple[float, int]]()
        self.num_tokens, self.is_open = 0, True
        self.asked = time.perf_counter()
        connection.sendall(data)

    def read(self) -> None:
        """Take what has come."""
        data = self.connection.recv(1 << 16)
        moment, count = time.perf_counter(), data.count(b"data: {")
        self.raw += data
        self.num_tokens += count
        if count:
            self.pieces.append((moment, count))
        if not data or data.endswith(b"0\r\n\r\n"):
            self.is_open = False

    @property
    def moments(self) -> list[float]:
        """When each token came."""
        return [moment for moment, count in self.pieces for _ in range(count)]

    def check(self) -> None:
        """Exits where the server refused."""
        if not self.raw.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server answered {self.raw[:2000].decode()}")

    @property
    def text(self) -> str:
        """The answer."""
        lines = (line[6:] for line in self.raw.splitlines() if line.startswith(b"data: {"))
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


class Clients:
    """Streaming clients of one server, in one thread that sleeps while nothing comes."""

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model, self._selector = port, model, selectors.DefaultSelector()

    def ask(self, prompt: list[int], max_tokens: int) -> Stream:
        """Send a request, greedy; ``wait`` reads the answer."""
        fields = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
        stream = Stream(
            socket.create_connection(("127.0.0.1", self._port)),
            f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body,
            prompt,
        )
        self._selector.register(stream.connection, selectors.EVENT_READ, stream)
        return stream

    def wait(self, streams: Sequence[Stream], tokens: int | None = None) -> None:
        """Read until each of ``streams`` has so many tokens (None: has ended); the others are read too."""
        while any(stream.is_open and (tokens is None or stream.num_tokens < tokens) for stream in streams):
            for key, _ in self._selector.select():
                key.data.read()
                if not key.data.is_open:
                    key.data.check()
                    self._selector.unregister(key.fileobj)
                    key.data.connection.close()

    def leave(self, streams: Sequence[Stream]) -> None:
        """Hang up on those that still run."""
        for stream in streams:
            if stream.is_open:
                self._selector.unregister(stream.connection)
                stream.connection.close()
                stream.is_open = False


@contextmanager
def server(bundle: str, *options: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of ``bilevel serve`` on a free port."""
    command = [sys.executable, "-m", "bilevel.runtime.cli.main", "serve", bundle, "--port", "0", "--no-verify", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            if "http://" not in line:
                raise SystemExit(line + process.stderr.read())
            yield int(line.partition("http://127.0.0.1:")[2].split()[0]), process.pid
        finally:
            process.terminate()
            process.wait(60)


def metric(port: int, name: str) -> float:
    """One number of /metrics."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.split()[0] == name)
