"""Requests that cost their sender little, and how long ``/v2/health/live`` takes to answer while one of them is on its way.

    python examples/serving_attacks.py build/example-bundle

Each is sent three times in a row, then by eight clients at once, to a server whose chat template has two nested loops that a
certain message starts; printed is the worst answer of another client, who asks after the server's health a hundred times a
second. The server runs with short rows; the first request comes before the attacks, so that nothing is measured while the model
is still being loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from serving_client import server

from bilevel.bundle.format import load_bundle

MOST = (4 << 20) - 300  # bytes: the longest body, less its head
LOOP = (
    "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"
)


def prompt(content: bytes) -> bytes:
    """A completion's body."""
    return b'{"model": "MODEL", "max_tokens": 2, "prompt": ' + content + b"}"


def many(piece: bytes, count: int) -> bytes:
    """A JSON list."""
    return b"[" + b",".join([piece] * count) + b"]"


def chat(*contents: str) -> bytes:
    """A conversation's body."""
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"model": "MODEL", "max_tokens": 2, "messages": messages}).encode()


def tensor(shape: list[int], size: int = 0) -> bytes:
    """A KServe request without its data."""
    place: dict[str, Any] = {"parameters": {"binary_data_size": size}} if size else {"data": []}
    kind = {"name": "text", "datatype": "BYTES"} if size else {"name": "input_ids", "datatype": "INT64"}
    return json.dumps({"inputs": [{**kind, "shape": shape, **place}]}).encode()


INFER, COMPLETIONS, CHAT = "/v2/models/MODEL/infer", "/v1/completions", "/v1/chat/completions"
ATTACKS: dict[str, tuple[str, bytes]] = {
    "a tensor of 2147483647 x 0": (INFER, tensor([2**31 - 1, 0])),
    "a million prompts": (COMPLETIONS, prompt(many(b'"a"', MOST // 4))),
    "700,000 prompts that are none": (COMPLETIONS, prompt(many(b'"a",1', MOST // 6))),
    "two million tokens": (COMPLETIONS, prompt(many(b"1", MOST // 2))),
    "a million lists": (COMPLETIONS, prompt(many(b"[]", MOST // 3))),
    "as many prompts as may be read": (COMPLETIONS, prompt(many(b'"a"', 16_000))),
    "as many tokens as may be read": (COMPLETIONS, prompt(many(b"1", 65_000))),
    "a text of 4 MB": (COMPLETIONS, prompt(b'"' + b"the fox " * (MOST // 8) + b'"')),
    "a text of 4 MB in escapes": (COMPLETIONS, prompt(b'"' + rb"\u00e9" * (MOST // 6) + b'"')),
    "a text as long as is encoded": (COMPLETIONS, prompt(b'"' + b"the fox " * 1_000 + b'"')),
    "4 MB of special tokens": (CHAT, chat("<eos>" * (MOST // 5))),
    "4,000 messages": (CHAT, chat(*["a"] * 4_000)),
    "a number of 4 MB": (COMPLETIONS, prompt(b"9" * MOST)),
    "brackets": (COMPLETIONS, prompt(b"[" * MOST)),
    "200,000 keys": (COMPLETIONS, b"{" + b",".join(b'"%06d":1' % each for each in range(200_000)) + b"}"),
    "a template without end": (CHAT, chat("loop")),
}


async def post(port: int, path: str, body: bytes) -> int:
    """The status of an answer, which is read to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    try:
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        await reader.read()
    finally:
        writer.close()
    return status


def attack(port: int, path: str, body: bytes, clients: int) -> set[int]:
    """The statuses of what ``clients`` are answered who send the same at once; in a process of its own, or it would be measured
    how busy the attacker is."""

    async def send() -> set[int]:
        return set(await asyncio.gather(*(post(port, path, body) for _ in range(clients))))

    return asyncio.run(send())


async def health(port: int) -> float:
    """Seconds until the server has said that it lives."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        if b" 200 " not in await reader.readline():
            raise SystemExit("the server is not well")
    finally:
        writer.close()
    return time.perf_counter() - start


async def suffer(port: int, name: str, rounds: int = 3, clients: int = 8) -> dict[str, dict[str, Any]]:
    """{attack: its status, its seconds, and the worst answer of /v2/health/live in the meantime, in ms}.

    Of each attack ``rounds`` times one client, then once ``clients`` of them.
    """
    found: dict[str, dict[str, Any]] = {}
    loop, attackers = asyncio.get_running_loop(), ProcessPoolExecutor(1)
    for label, (path, body) in {"nothing": (COMPLETIONS, prompt(b"[5]")), **ATTACKS}.items():
        body = body.replace(b'"MODEL"', json.dumps(name).encode())
        start, worst, statuses = time.perf_counter(), 0.0, set[int]()
        for count in [1] * rounds + [clients]:
            task = loop.run_in_executor(attackers, attack, port, path.replace("MODEL", name), body, count)
            while not task.done():
                worst = max(worst, await health(port))
                await asyncio.wait([task], timeout=0.01)
            statuses |= task.result()
        found[label] = {"statuses": sorted(statuses), "seconds": time.perf_counter() - start, "health_ms": 1000 * worst}
    return found


def with_template(bundle: Path, folder: Path, template: str = LOOP) -> Path:
    """The bundle with another chat template; its files are links."""
    folder.mkdir()
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    for name in manifest["files"]:
        (folder / name).symlink_to(bundle / name)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    record = {"sha256": hashlib.sha256(template.encode()).hexdigest(), "bytes": len(template)}
    manifest["files"]["chat_template.jinja"] = record
    (folder / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def measure(bundle: Path, rounds: int = 3, clients: int = 8) -> dict[str, dict[str, Any]]:
    """Start a server, attack it, print a line for each attack."""
    with tempfile.TemporaryDirectory() as folder:
        target = with_template(bundle.resolve(), Path(folder) / "bundle")
        capacity = min(1024, load_bundle(target, verify=False).max_positions)
        with server(str(target), "--capacity", str(capacity), "--max-rows", "2", "--threads", "1") as (port, _):
            found = asyncio.run(suffer(port, target.name, rounds, clients))
    for label, each in found.items():
        print(f"{label:32} {str(each['statuses'])[1:-1]:8} {each['seconds']:6.2f} s  health {each['health_ms']:6.1f} ms")
    return found


def main() -> int:
    """Measure; 1 where the server took more than 100 ms to say that it lives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder written by bilevel export")
    parser.add_argument("--rounds", type=int, default=3, help="of each attack (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="that then send it at once (default: %(default)s)")
    args = parser.parse_args()
    found = measure(args.bundle, args.rounds, args.clients)
    print(json.dumps(found))
    return int(max(each["health_ms"] for each in found.values()) > 100)


if __name__ == "__main__":
    sys.exit(main())
