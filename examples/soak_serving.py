"""Many short requests at one server, some of them rude: does it leak, answer wrongly, or keep a row?

    python examples/soak_serving.py build/example-bundle --requests 10000

A tenth of the clients hang up midway, a tenth send what is no request, a quarter ask for JSON of a schema or for a call of a
tool; every whole answer is compared with what the model says alone (greedy, token by token: half of the texts repeat
themselves, so that the server drafts), and what follows a schema is parsed. Prints the server's resident memory as it goes.
Exit status 1 where memory grew by more than 5 % after the first fifth, an answer was wrong, a status was not the right one, or
a row or a waiting request was left. Then it is attacked (``serving_attacks.py``), and what that does to ``/v2/health/live`` is
printed, which depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from serving_attacks import measure, with_template
from serving_client import ask, metric, post_json, server

from bilevel.bundle.format import load_bundle
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams

NUM_CLIENTS, NUM_TEXTS, MOST_TOKENS = 12, 60, 16
MALFORMED: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"[]", 400),
    (b'{"model": "MODEL"}', 400),
    (b'{"model": "nobody", "prompt": "a"}', 404),
    (b'{"model": "MODEL", "prompt": [-1]}', 400),
    (b'{"model": "MODEL", "prompt": "a", "max_tokens": -3}', 400),
    (b'{"model": "MODEL", "prompt": "a", "temperature": "hot"}', 400),
    (b'{"model": "MODEL", "prompt": "' + b"a " * 40_000 + b'"}', 400),
]


KINDS = {"whole": 0.55, "schema": 0.15, "tool": 0.1, "cancelled": 0.1, "malformed": 0.1}  # shares of the requests
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 999}, "sound": {"type": "boolean"}},
    "required": ["count", "sound"],
    "additionalProperties": False,
}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def check_object(text: str) -> None:
    """Raises ValueError for what is not of SCHEMA."""
    value = json.loads(text)
    if sorted(value) != ["count", "sound"] or type(value["sound"]) is not bool or not 0 <= value["count"] <= 999:
        raise ValueError(f"{text!r} is not of the schema")


class Soak:
    """The requests that are left, and what went wrong."""

    def __init__(self, port: int, name: str, texts: list[tuple[str, str]], requests: int, capacity: int) -> None:
        self.port, self.name, self.texts, self.left = port, name, texts, requests
        self.counts = dict.fromkeys(KINDS, 0)
        # A tool's description does not fit into the rows of a model made for tests.
        self._kinds = KINDS if capacity >= 512 else {**KINDS, "tool": 0.0, "whole": KINDS["whole"] + KINDS["tool"]}
        self.problems: list[str] = []
        self.followed = 0  # answers that were of the schema
        self._random = np.random.default_rng(0)

    async def client(self) -> None:
        """One client: a request after the other until none is left."""
        while self.left > 0:
            self.left -= 1
            kind = self._random.choice([*self._kinds], p=[*self._kinds.values()])
            try:
                await asyncio.wait_for(getattr(self, f"_{kind}")(), 120)
            except (OSError, asyncio.TimeoutError, LookupError, TypeError, ValueError) as error:
                self.problems.append(f"{kind}: {type(error).__name__} {error}")
            self.counts[kind] += 1

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self.name, "prompt": prompt, "max_tokens": MOST_TOKENS, "temperature": 0, "stream": True}

    async def _whole(self) -> None:
        prompt, expected = self.texts[self._random.integers(len(self.texts))]
        answer = await ask(self.port, self._body(prompt))
        if answer.status != 200 or answer.text != expected:
            self.problems.append(f"{answer.status}: {prompt[-30:]!r} gave {answer.text!r} instead of {expected!r}")

    async def _schema(self) -> None:
        prompt, _ = self.texts[self._random.integers(len(self.texts))]
        form = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA}}
        body = {"model": self.name, "prompt": prompt[:20] or "a", "max_tokens": 64, "response_format": form}
        await self._follow("/v1/completions", body, lambda choice: choice["text"])

    async def _tool(self) -> None:
        function = {"name": "report", "parameters": SCHEMA}
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": "How many?"}],
            "max_tokens": 96,
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
        }

        def arguments(choice: Any) -> str:
            (call,) = choice["message"]["tool_calls"]
            return str(call["function"]["arguments"])

        await self._follow("/v1/chat/completions", body, arguments)

    async def _follow(self, path: str, body: dict[str, Any], read: Callable[[Any], str]) -> None:
        """A whole answer that follows the schema, unless it ran out of tokens."""
        status, answer = await post_json(self.port, path, body)
        if status != 200:
            self.problems.append(f"{path} gave {status}: {str(answer)[:200]}")
        elif (choice := answer["choices"][0])["finish_reason"] != "length":
            check_object(read(choice))
            self.followed += 1

    async def _cancelled(self) -> None:
        prompt, _ = self.texts[self._random.integers(len(self.texts))]
        await ask(self.port, self._body(prompt), stop_after=int(self._random.integers(1, 6)))

    async def _malformed(self) -> None:
        body, status = MALFORMED[self._random.integers(len(MALFORMED))]
        answer = await ask(self.port, body.replace(b"MODEL", self.name.encode()))
        if answer.status != status:
            self.problems.append(f"{body[:60]!r} gave {answer.status} instead of {status}")


def resident(process: int) -> float:
    """Resident memory in MiB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


async def watch(soak: Soak, process: int, requests: int) -> list[tuple[int, float]]:
    """(requests done, MiB), about twenty times until the end."""
    samples: list[tuple[int, float]] = []
    while soak.left > 0:
        done = sum(soak.counts.values())
        if done >= len(samples) * requests / 20:
            samples.append((done, resident(process)))
            print(f"{done:6} requests  {samples[-1][1]:7.1f} MiB  {len(soak.problems)} problems", flush=True)
        await asyncio.sleep(0.2)
    return samples


async def run(soak: Soak, process: int, requests: int) -> list[tuple[int, float]]:
    """All clients at once."""
    watcher = asyncio.create_task(watch(soak, process, requests))
    await asyncio.gather(*(soak.client() for _ in range(NUM_CLIENTS)))
    return [*await watcher, (requests, resident(process))]


def make_texts(bundle: Path) -> list[tuple[str, str]]:
    """Prompts of up to 120 tokens, many of which begin alike, and what the model says alone."""
    generator, random = Generator.open(bundle, verify=False, speculation=False), np.random.default_rng(1)
    tokenizer, vocab_size = generator.tokenizer, generator.session.bundle.vocab_size
    beginnings = [random.integers(2, vocab_size, 60).tolist() for _ in range(4)]
    most = generator.session.bundle.max_positions - MOST_TOKENS
    ids = [
        beginnings[i % 4][: random.integers(0, 60)] + random.integers(2, vocab_size, 1 + i).tolist() for i in range(NUM_TEXTS)
    ]
    ids = [each[-9:] * 6 if i % 2 else each for i, each in enumerate(ids)]
    prompts = [tokenizer.decode(each) for each in ids]
    fitting = [prompt for prompt in prompts if prompt and len(tokenizer.encode(prompt)) <= most]
    params = SamplingParams(max_tokens=MOST_TOKENS)
    return [(prompt, generator.texts([prompt], params)[0]) for prompt in fitting]


def main() -> int:
    """Soak, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder written by bilevel export")
    parser.add_argument("--requests", type=int, default=10_000, help="(default: %(default)s)")
    args = parser.parse_args()
    bundle = args.bundle.resolve()
    texts = make_texts(bundle)
    start = time.perf_counter()
    capacity = min(1024, load_bundle(bundle, verify=False).max_positions)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        served = with_template(bundle, Path(folder) / "bundle", TEMPLATE)
        port, process = stack.enter_context(server(str(served), "--capacity", str(capacity), "--max-queue", "64"))
        soak = Soak(port, served.name, texts, args.requests, capacity)
        samples = asyncio.run(run(soak, process, args.requests))
        time.sleep(1)
        stuck = metric(port, "bilevel_rows") + metric(port, "bilevel_queue")
        drafts = [metric(port, name) for name in ("bilevel_draft_tokens_taken_total", "bilevel_drafted_tokens_total")]
    warm = next(mib for done, mib in samples if done >= args.requests / 5)
    growth = samples[-1][1] / warm - 1
    seconds = time.perf_counter() - start
    print(
        f"{soak.counts} in {seconds:.0f} s; memory {warm:.1f} MiB after a fifth, {samples[-1][1]:.1f} at the end "
        f"({100 * growth:+.1f} %)"
    )
    print(f"{soak.followed} answers of the schema; {drafts[0]:g} of {drafts[1]:g} drafted tokens taken")
    print(f"{len(soak.problems)} problems, {stuck:g} rows or waiting requests left")
    for problem in soak.problems[:5]:
        print(f"  {problem}")
    print("\nwhile somebody attacks:")
    attacks = measure(bundle, rounds=1)
    worst = max(each["health_ms"] for each in attacks.values())
    print(f"the server's health was told within {worst:.0f} ms")
    result = {
        "worst_health_ms": worst,
        **soak.counts,
        "growth": growth,
        "problems": len(soak.problems),
        "stuck": stuck,
        "seconds": seconds,
    }
    print(json.dumps(result))
    return 1 if growth > 0.05 or soak.problems or stuck else 0


if __name__ == "__main__":
    sys.exit(main())
