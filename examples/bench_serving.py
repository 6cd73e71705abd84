"""What serving costs and gives, in numbers, each beside its goal. Nothing else should run on the machine.

    python examples/bench_serving.py                                 geometry "small" with random weights, made once; 7 minutes
    python examples/bench_serving.py build/example-bundle            a bundle of yours
    python examples/bench_serving.py --only overhead,batching        a part of it

overhead   one client's time per token, first to last token, against the loop of ``bilevel run`` in a process of its own: same
           prompt, in turns, the median of the rounds' ratios; goal: at most 5 % more
batching   tokens per second of 8 clients at once, from request to last token, against one client's: medians of the rounds; goal
           on geometry "small": 2.5 times
equality   each of those answers is, token by token, what the prompt gets alone (greedy); goal: all
reading    time between tokens of 4 clients while a prompt of 16,384 tokens is read, against their median before; goal: the
           longest is under 3 times the median. A machine's own hiccups count too, so the longest without the prompt stands
           beside it. And how long the prompt takes to its first token; goal: at most 3 times what it takes alone

One token a call throughout (``speculation.py`` measures drafts): random weights repeat themselves. Exit status 1 where a goal
is missed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from serving_client import Clients, Stream, server

from bilevel.bundle.format import load_bundle
from bilevel.runtime.cli.bench import geometry_bundle
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams

NUM_CLIENTS, NUM_OTHERS = 8, 4


@dataclass
class Result:
    """One line of the table. is_met: None where there is no goal. numbers: for the JSON line."""

    name: str
    goal: str
    measured: str
    is_met: bool | None
    numbers: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Measurements on one bundle."""

    def __init__(self, bundle: Path, args: argparse.Namespace) -> None:
        self.bundle, self.tokens, self.rounds = bundle, args.tokens, args.rounds
        self.long, self.others, self.steps = args.long, args.others, args.steps
        self.is_small = bundle.name.startswith("small-")
        self._loaded, self._random = load_bundle(bundle, verify=False), np.random.default_rng(0)

    def prompt(self, tokens: int = 32) -> list[int]:
        """Random words."""
        return self._random.integers(2, self._loaded.vocab_size, tokens).tolist()

    def capacity(self, most: int) -> str:
        """``most`` tokens a row, or the model's."""
        return str(min(most, self._loaded.max_positions))

    def overhead(self) -> list[Result]:
        """Seconds per token as the reader of a pipe and the reader of a socket see them."""
        generator, params = Generator.open(self.bundle, verify=False, speculation=False), SamplingParams(max_tokens=self.tokens)
        run, served = [], []
        with (
            server(str(self.bundle), "--capacity", self.capacity(2048), "--no-speculation") as (port, _),
            open(os.devnull, "w") as terminal,
        ):
            clients = Clients(port, self.bundle.name)
            clients.wait([clients.ask(self.prompt(), 16)])
            for _ in range(3 * self.rounds):
                prompt, moments = self.prompt(), []
                for event in generator.generate([prompt], params):
                    terminal.write(event.text)
                    terminal.flush()
                    moments.append(time.perf_counter())
                time.sleep(0.1)  # ONNX Runtime's threads spin for a while after a call
                clients.wait([stream := clients.ask(prompt, self.tokens)])
                time.sleep(0.1)
                if min(len(moments), stream.num_tokens) > 1:  # else the model ended its text at once
                    run.append(per_token(moments))
                    served.append(per_token(stream.moments))
        ratios = [there / here - 1 for there, here in zip(served, run, strict=True)]
        overhead, (low, high) = median(ratios), interval_of_median(ratios)
        text = (
            f"{100 * overhead:+.1f} % (95 % interval {100 * low:+.1f} to {100 * high:+.1f} %; {1e3 * median(served):.2f} ms a "
            f"token, {1e3 * median(run):.2f} by bilevel run)"
        )
        numbers = {"overhead": overhead, "interval": [low, high], "served_s": median(served), "run_s": median(run)}
        return [Result("overhead", "at most +5 %", text, overhead <= 0.05, numbers)]

    def batching(self) -> list[Result]:
        """Tokens per second, reading prompts of 32 tokens included; and whether the answers are right."""
        speeds: dict[int, list[float]] = {1: [], NUM_CLIENTS: []}
        answers: list[Stream] = []
        with server(str(self.bundle), "--capacity", self.capacity(2048), "--no-speculation") as (port, _):
            clients = Clients(port, self.bundle.name)
            clients.wait([clients.ask(self.prompt(), 16)])
            for _ in range(self.rounds):
                for count, found in speeds.items():
                    streams = [clients.ask(self.prompt(), self.tokens) for _ in range(count)]
                    clients.wait(streams)
                    seconds = max(each.moments[-1] for each in streams) - streams[0].asked
                    found.append(sum(each.num_tokens for each in streams) / seconds)
                    answers += streams
        one, many = median(speeds[1]), median(speeds[NUM_CLIENTS])
        generator, params = Generator.open(self.bundle, verify=False, speculation=False), SamplingParams(max_tokens=self.tokens)
        equal = sum(generator.texts([each.prompt], params)[0] == each.text for each in answers)
        text = f"{many / one:.2f} times ({many:.0f} tokens/s of {NUM_CLIENTS} clients, {one:.0f} of one)"
        goal, is_met = ("at least 2.5 times", many >= 2.5 * one) if self.is_small else ("none for this model", None)
        return [
            Result("batching", goal, text, is_met, {"speeds": speeds}),
            Result("equality", "every answer", f"{equal} of {len(answers)} answers", equal == len(answers)),
        ]

    def reading(self) -> list[Result]:
        """Time between tokens beside a long prompt."""
        capacity = self.long + 64
        with server(str(self.bundle), "--capacity", str(capacity), "--no-speculation") as (port, _):
            clients = Clients(port, self.bundle.name)
            others = [clients.ask(self.prompt(self.others), capacity - self.others) for _ in range(NUM_OTHERS)]
            clients.wait(others, 10)
            start = time.perf_counter()
            clients.wait(others, 10 + self.steps)
            first = clients.ask(self.prompt(self.long), 1)
            clients.wait([first])
            still_running = all(each.is_open for each in others)
            clients.leave(others)
            time.sleep(0.5)
            clients.wait([alone := clients.ask(self.prompt(self.long), 1)])
        if not still_running:
            raise SystemExit("the other clients' texts ended before the long prompt was read; give a larger --long")
        seconds = alone.moments[0] - alone.asked
        return judge_pauses(self.long, [each.moments for each in others], start, first.asked, first.moments[0], seconds)


def judge_pauses(long: int, others: list[list[float]], start: float, asked: float, came: float, alone: float) -> list[Result]:
    """others: when each one's tokens came; alone from ``start``, beside the long prompt from ``asked`` to ``came``.

    alone: seconds that such a prompt takes by itself.
    """
    before, during = gaps(others, start, asked), gaps(others, asked, came)
    usual = median(gap for _, gap in before)
    times = np.array([gap for _, gap in during]) / usual
    late = [[round(moment - asked, 2), round(gap / usual, 2)] for moment, gap in during if gap >= 3 * usual]
    longest, longest_before, share = float(times.max()), max(gap for _, gap in before) / usual, len(late) / len(times)
    text = (
        f"{longest:.1f} times ({1e3 * longest * usual:.0f} of {1e3 * usual:.1f} ms); {100 * share:.2f} % are over 3 times, of "
        "which "
        f"{sum(moment <= 1 for moment, _ in late)} of {len(late)} in the first second; median {median(times):.2f}, 99 % within "
        f"{np.quantile(times, 0.99):.2f}; longest without the prompt {longest_before:.1f}"
    )
    numbers = {"usual_s": usual, "longest": longest, "longest_before": longest_before, "share_over_3": share, "late": late}
    numbers |= {"gaps": len(times), "median": float(median(times)), "p99": float(np.quantile(times, 0.99))}
    return [
        Result(f"beside {long} tokens", "longest under 3 times", text, longest < 3, numbers),
        Result(
            "  its first token",
            "at most 3 times alone",
            f"{(came - asked) / alone:.1f} times ({came - asked:.0f} s, alone {alone:.0f} s)",
            came - asked <= 3 * alone,
            {"first_token_s": came - asked, "alone_s": alone},
        ),
    ]


def per_token(moments: list[float]) -> float:
    """Seconds per token between the first and the last of an answer."""
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """Where the median lies with a certainty of 95 %, by drawing anew from the values."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(values, (2000, len(values))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def gaps(clients: list[list[float]], start: float, end: float) -> list[tuple[float, float]]:
    """(when, seconds) between the tokens of each client that came between two moments."""
    return [(b, b - a) for moments in clients for a, b in pairwise(moments) if start <= a and b <= end]


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help='folder written by bilevel export (default: geometry "small")')
    parser.add_argument("--only", default="overhead,batching,reading", help="parts, with commas between (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="generated by each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="overhead takes three times as many (default: %(default)s)")
    parser.add_argument("--long", type=int, default=16_384, help="tokens of the long prompt (default: %(default)s)")
    # So much text that a word of theirs costs as much at the end as at the beginning.
    parser.add_argument("--others", type=int, default=1100, help="tokens of the others' prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="tokens of each before the long prompt (default: %(default)s)")
    args = parser.parse_args()
    bundle = (args.bundle or geometry_bundle("small", "fp32", print)).resolve()
    bench, results = Bench(bundle, args), list[Result]()
    parts: dict[str, Callable[[], list[Result]]] = {
        "overhead": bench.overhead,
        "batching": bench.batching,
        "reading": bench.reading,
    }
    for name in args.only.split(","):
        if name not in parts:
            parser.error(f"--only {name} is none of {', '.join(parts)}")
    print(f"{bundle.name}\n{'':22} {'goal':24} measured")
    for name in args.only.split(","):
        if name == "reading" and args.long + 64 > load_bundle(bundle, verify=False).max_positions:
            print(f"reading is left out: the model has fewer than {args.long} positions")
            continue
        for result in parts[name]():
            results.append(result)
            verdict = {None: "", True: "met     ", False: "MISSED  "}[result.is_met]
            print(f"{result.name:22} {result.goal:24} {verdict}{result.measured}", flush=True)
    print(json.dumps({"bundle": bundle.name, "results": [asdict(result) for result in results]}))
    return 1 if any(result.is_met is False for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
