"""A small HTTP client for measurements, and a server process to measure: as little of its own as possible."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
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


@contextmanager
def server(bundle: str, *options: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of ``bilevel serve`` on a free port."""
    command = [sys.executable, "-m", "bilevel.runtime.cli", "serve", bundle, "--port", "0", "--no-verify", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
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
