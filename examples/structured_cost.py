"""What following a JSON schema costs: the processor's time of a decode step, with the schema and without, in turns.

    python examples/structured_cost.py my-bundle --rows 8

Processor time, not the clock's: what else the machine does matters less. Answers are drawn at temperature 1; with the schema
they are JSON, without it whatever comes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from pathlib import Path

from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.grammar.compiler import Compiled, Compiler
from bilevel.runtime.grammar.sources import json_grammar
from bilevel.runtime.schedule.jobs import SchedulerLimits, TextJob
from bilevel.runtime.schedule.scheduler import Scheduler

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "hobbies": {"type": "array", "items": {"type": "string"}, "minItems": 60},  # so that no row ends early
    },
    "required": ["name", "age", "hobbies"],
}


def measure(scheduler: Scheduler, prompt: list[int], rows: int, steps: int, compiled: Compiled | None) -> list[float]:
    """Seconds of each decode step of ``rows`` rows."""
    params = [SamplingParams(temperature=1.0, seed=row, max_tokens=400, ignore_eos=compiled is None) for row in range(rows)]
    jobs = [TextJob(list(prompt), each, constraint=None if compiled is None else compiled.follow()) for each in params]
    scheduler.submit(*jobs)
    while any(job.last_token is None for job in jobs):
        scheduler.step()
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        scheduler.step()
        seconds.append(time.process_time() - start)
        assert scheduler.num_active == rows, "a row ended early"
    scheduler.cancel(*jobs)
    scheduler.step()
    return seconds


def main() -> None:
    """Print both medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    session = OnnxSession.open(args.bundle, threads=1)
    tokenizer = BundleTokenizer(session.bundle.tokenizer_path)
    prompt = tokenizer.encode("A person, as JSON:\n")
    scheduler = Scheduler(session, SchedulerLimits(max_rows=args.rows, row_tokens=512), lambda events: None)
    plain: list[float] = []
    followed: list[float] = []
    with closing(Compiler(tokenizer, session.bundle.vocab_size, session.bundle.eos)) as compiler:
        compiled = compiler.compile(json_grammar(SCHEMA, "schema"), "schema")
        for _ in range(args.rounds):
            plain += measure(scheduler, prompt, args.rows, args.steps, None)
            followed += measure(scheduler, prompt, args.rows, args.steps, compiled)
    without, with_schema = statistics.median(plain), statistics.median(followed)
    print(f"a step of {args.rows} rows: {without * 1000:.2f} ms, following the schema {with_schema * 1000:.2f} ms "
          f"({(with_schema / without - 1) * 100:+.1f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
