"""What serving costs and gives, in numbers, each beside its goal. Nothing else should run on the machine.

    python examples/bench_serving.py                      geometry "small" with random weights, made once
    python examples/bench_serving.py build/example-bundle --long 0

overhead   one client's time per token, against the loop of ``bilevel run`` (same prompt, in turns, the best of the rounds)
batching   tokens per second of 8 clients at once, against one (the best of the rounds); each answer compared with what it is alone (greedy)
reading    time between tokens of 4 clients while a long prompt is read, against their median before

Exit status 1 where a goal is missed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from serving_client import Answer, ask, server

from bilevel.runtime.bundle import load_bundle
from bilevel.runtime.cli_bench import geometry_bundle
from bilevel.runtime.generate import Generator
from bilevel.runtime.sampling import SamplingParams
from bilevel.runtime.text import BundleTokenizer

NUM_CLIENTS, NUM_OTHERS, WARM = 8, 4, 60


class Prompts:
    """Random prompts, as text that becomes the same tokens again."""

    def __init__(self, bundle: Path) -> None:
        self._bundle, self._random = load_bundle(bundle, verify=False), np.random.default_rng(0)
        self._tokenizer = BundleTokenizer(self._bundle.tokenizer_path)

    def make(self, tokens: int) -> str:
        """About ``tokens`` tokens."""
        return self._tokenizer.decode(self._random.integers(2, self._bundle.vocab_size, tokens).tolist())


def body(name: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}


def measure_overhead(bundle: Path, prompts: Prompts, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds per token in turns, the best of each side: what else runs on the machine can only slow them.

    The other side is the loop of ``bilevel run``, in this process, which otherwise sleeps, as the server does meanwhile.
    """
    generator, params = Generator.open(bundle, verify=False), SamplingParams(max_tokens=tokens)
    alone, served = [], []
    with server(str(bundle), "--capacity", "2048") as (port, _):
        asyncio.run(ask(port, body(bundle.name, prompts.make(32), 16)))
        for _ in range(rounds):
            prompt = prompts.make(32)
            generation = generator.generate([prompt], params)
            generation.finish()
            alone.append(1 / (generation.stats.decode_tokens_per_second or float("nan")))
            answer = asyncio.run(ask(port, body(bundle.name, prompt, tokens)))
            served.append((answer.moments[-1] - answer.moments[0]) / (len(answer.moments) - 1))
            time.sleep(0.2)  # ONNX Runtime's threads spin for a while after a call
    overhead = min(served) / min(alone) - 1
    return {"run_ms": 1e3 * min(alone), "served_ms": 1e3 * min(served), "overhead": overhead, "met": overhead <= 0.05}


async def together(port: int, name: str, prompts: list[str], tokens: int) -> tuple[list[Answer], float]:
    """The answers to all at once, and the tokens per second of all."""
    answers = await asyncio.gather(*(ask(port, body(name, prompt, tokens)) for prompt in prompts))
    start, end = min(each.asked for each in answers), max(each.moments[-1] for each in answers)
    return list(answers), sum(len(each.moments) for each in answers) / (end - start)


def measure_batching(bundle: Path, prompts: Prompts, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second from request to last token, prompts of 32 tokens read included."""
    one, eight, asked = [], [], {}
    with server(str(bundle), "--capacity", "2048") as (port, _):
        asyncio.run(ask(port, body(bundle.name, prompts.make(32), 16)))
        for _ in range(rounds):
            one.append(asyncio.run(together(port, bundle.name, [prompts.make(32)], tokens))[1])
            wanted = [prompts.make(32) for _ in range(NUM_CLIENTS)]
            answers, speed = asyncio.run(together(port, bundle.name, wanted, tokens))
            eight.append(speed)
            asked |= dict(zip(wanted, (answer.text for answer in answers), strict=True))
    generator = Generator.open(bundle, verify=False)
    equal = sum(generator.texts([prompt], SamplingParams(max_tokens=tokens))[0] == text for prompt, text in asked.items())
    factor = max(eight) / max(one)
    found = {"one": max(one), "eight": max(eight), "factor": factor, "equal": equal, "of": len(asked)}
    return {**found, "met": factor >= 2.5 and equal == len(asked)}


async def _watch(port: int, name: str, prompts: Prompts, long: int) -> tuple[list[float], list[float], float]:
    """(gaps before, gaps while, seconds) of NUM_OTHERS clients beside one that has a long prompt."""
    others = [Answer(0.0) for _ in range(NUM_OTHERS)]
    tasks = [asyncio.create_task(ask(port, body(name, prompts.make(64), 12_000), answer=answer)) for answer in others]
    while min(len(answer.moments) for answer in others) < 2 * WARM:
        await asyncio.sleep(0.05)
    before = [gap for answer in others for gap in answer.gaps[-WARM:]]
    first = await ask(port, body(name, prompts.make(long), 1))
    moments = [[moment for moment in answer.moments if moment >= first.asked] for answer in others]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    during = [b - a for each in moments for a, b in pairwise(each)]
    return before, during, first.moments[0] - first.asked


def measure_reading(bundle: Path, prompts: Prompts, long: int) -> dict[str, Any]:
    """Time between tokens beside a prompt of ``long`` tokens."""
    with server(str(bundle), "--capacity", str(long + 64)) as (port, _):
        before, during, seconds = asyncio.run(_watch(port, bundle.name, prompts, long))
    usual = median(before)
    over = float(np.mean([gap > 3 * usual for gap in during]))
    found = {"usual_ms": 1e3 * usual, "median_ms": 1e3 * median(during), "p99_ms": 1e3 * float(np.quantile(during, 0.99))}
    found |= {"max_ms": 1e3 * max(during), "share_over_3": over, "seconds": seconds}
    return {**found, "met": found["p99_ms"] < 3 * found["usual_ms"]}


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help='folder written by bilevel export (default: geometry "small")')
    parser.add_argument("--tokens", type=int, default=128, help="generated by each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--long", type=int, default=16_384, help="tokens of the long prompt; 0 leaves it out (default: %(default)s)"
    )
    args = parser.parse_args()
    bundle = (args.bundle or geometry_bundle("small", "fp32", print)).resolve()
    prompts, result = Prompts(bundle), {}
    result["overhead"] = cost = measure_overhead(bundle, prompts, args.tokens, args.rounds)
    print(
        f"overhead  {cost['served_ms']:.2f} ms a token, bilevel run {cost['run_ms']:.2f}: {100 * cost['overhead']:+.1f} %  (goal: at most +5 %)"
    )
    result["batching"] = many = measure_batching(bundle, prompts, args.tokens, args.rounds)
    print(
        f"batching  {many['eight']:.0f} tokens/s for {NUM_CLIENTS} clients, {many['one']:.0f} for one: {many['factor']:.2f} times  (goal: 2.5); "
        f"{many['equal']} of {many['of']} answers equal what they are alone"
    )
    if args.long:
        result["reading"] = gaps = measure_reading(bundle, prompts, args.long)
        print(
            f"reading   {args.long} tokens in {gaps['seconds']:.0f} s; {NUM_OTHERS} others: {gaps['usual_ms']:.1f} ms between tokens before, "
            f"{gaps['median_ms']:.1f} meanwhile, 99 % within {gaps['p99_ms']:.1f}, longest {gaps['max_ms']:.1f}; "
            f"{100 * gaps['share_over_3']:.2f} % over 3 times  (goal: 99 % within 3 times)"
        )
    missed = [name for name, found in result.items() if not found["met"]]
    print("every goal is met" if not missed else f"missed: {', '.join(missed)}")
    print(json.dumps({"bundle": bundle.name, **result}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
