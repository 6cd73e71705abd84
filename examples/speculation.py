"""What prompt-lookup speculation gains, and what it costs where a text repeats nothing.

    python examples/speculation.py build/smollm2-bundle

Greedy and sampled answers to prompts of four kinds, each with speculation and without, in turns; the texts must be the same.
Printed for each kind: tokens a second with and without (the best of the rounds, since other work on a machine only slows),
their ratio, and how much of what was drafted was taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel.runtime.cli.conversation import ChatEncoder
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams

ARTICLE = (
    "The lighthouse at Cape Ferrol was built in 1871 by the engineer Anna Lindqvist. It stands 43 metres above the sea and "
    "its lamp can be seen from 27 nautical miles. In 1923 the oil lamp was replaced by an electric one, and in 1988 the last "
    "keeper, Tomas Berg, left the island. Since 2004 the tower has been a museum, which about 12,000 people visit each year."
)
CODE = """def total_price(items, tax_rate):
    subtotal = 0
    for item in items:
        subtotal = subtotal + item.price * item.quantity
    tax = subtotal * tax_rate
    total = subtotal + tax
    print("subtotal", subtotal)
    print("tax", tax)
    return total
"""
PROMPTS = {
    "summary": f"Summarize this text in three sentences, in the words of the text:\n\n{ARTICLE}",
    "correction": f"Repeat this text, but write 1872 instead of 1871:\n\n{ARTICLE}",
    "code": f"Rename the variable subtotal to net in this Python function. Write the whole function.\n\n```python\n{CODE}```",
    "story": "Write a short story about a bear who learns to swim.",
}
SETTINGS = {"greedy": SamplingParams(max_tokens=160), "sampled": SamplingParams(max_tokens=160, temperature=0.7, seed=3)}


@dataclass
class Rates:
    """Tokens a second of each round, with speculation and without; of the drafts, how many tokens there were and were taken."""

    by_mode: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    drafted: int = 0
    taken: int = 0

    @property
    def gain(self) -> float:
        """With over without."""
        return max(self.by_mode[True]) / max(self.by_mode[False])


def measure(generator: Generator, prompts: dict[str, list[int]], rounds: int) -> dict[str, Rates]:
    """Rates by "kind, setting". Raises SystemExit where the texts differ."""
    rates: dict[str, Rates] = {}
    for _ in range(rounds):
        for kind, prompt in prompts.items():
            for name, params in SETTINGS.items():
                entry, texts = rates.setdefault(f"{kind}, {name}", Rates()), set()
                for generator.speculation in (True, False):
                    generation = generator.generate([prompt], params)
                    (completion,) = generation.finish()
                    texts.add(completion.text)
                    entry.by_mode[generator.speculation].append(generation.stats.decode_tokens_per_second or 0.0)
                    entry.drafted += generation.stats.num_drafted_tokens
                    entry.taken += generation.stats.num_draft_tokens_taken
                if len(texts) > 1:
                    raise SystemExit(f"{kind}, {name}: the texts differ: {texts}")
    return rates


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder written by bilevel export; of a model with a chat template")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    generator = Generator.open(args.bundle, "onnx", threads=args.threads)
    bundle = generator.session.bundle
    if bundle.graph.head is None:
        raise SystemExit(f"{args.bundle} has no head.onnx, without which nothing is drafted; export it again")
    with closing(ChatEncoder(bundle, bundle.max_positions, None, {})) as encoder:
        prompts = {kind: encoder.encode([{"role": "user", "content": text}]) for kind, text in PROMPTS.items()}
    rates, rows = measure(generator, prompts, args.rounds), dict[str, Any]()
    for name, each in rates.items():
        fast, slow = (max(each.by_mode[mode]) for mode in (True, False))
        taken = f"{each.taken} of {each.drafted} drafted tokens taken"
        print(f"{name:20} {fast:6.1f} against {slow:6.1f} tokens/s  {each.gain:4.2f} times  {taken}")
        rates_of = {"with": each.by_mode[True], "without": each.by_mode[False]}
        rows[name] = {**rates_of, "drafted": each.drafted, "taken": each.taken}
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
