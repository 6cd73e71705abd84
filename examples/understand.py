"""Questions about a long document, asked of the exported bundle's server: the answers, and the blocks they were read from.

    python examples/understand.py build/smollm2-routed --against build/smollm2-bundle
    python examples/understand.py build/smollm2-routed --documents LICENSE examples/understand/document.txt     twice as long

The default document describes a town that does not exist, so that no model knows an answer beforehand. Each question is a chat
of its own: the documents, then the question. An answer is right where it is, or has in it, one of the given ones, after case,
punctuation and articles are taken off (P. Rajpurkar et al., SQuAD, 2016); exact is the stricter of the two.

Where a bundle routes its attention, the server says which blocks each layer read for each word of the answer. Blocks are ranked
by how many layers and words read them; printed is how often the block that holds the answer is among the five most read, beside
chance, and with --show the most read block of each answer.

Questions of your own: --questions FILE, a line for each, with a tab before the answer and | between several right ones.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving_client import server

from bilevel.bundle.format import load_bundle
from bilevel.errors import BilevelError, RequestError
from bilevel.runtime.quality.statistics import difference_interval, wilson

HERE = Path(__file__).parent / "understand"
INSTRUCTION = "Answer with a few words from the text."
MOST_READ = 5  # blocks


@dataclass(frozen=True)
class Question:
    """A question, and the answers that are right."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What one side answered. rank: of the block with the answer among those read, from 1; None where it was not read or
    nothing is routed. most_read: the text of the most read block. chance: that it would be among the MOST_READ first."""

    answer: str
    is_exact: bool
    is_right: bool
    rank: int | None = None
    most_read: str = ""
    chance: float | None = None


def normal(text: str) -> str:
    """Without case, punctuation, articles and doubled spaces."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in {"a", "an", "the"})


def has(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, as whole words."""
    return f" {normal(answer)} " in f" {normal(text)} "


def read_questions(path: Path, document: str) -> list[Question]:
    """The questions of a file. Raises RequestError for a line that is none, or whose answer the document does not have."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        text, tab, answers = line.partition("\t")
        given = tuple(answer.strip() for answer in answers.split("|") if normal(answer))
        if not (tab and text.strip() and given):
            raise RequestError(f"line {number} of {path} is no question: its text, a tab, its answer")
        if not any(has(document, answer) for answer in given):
            raise RequestError(f"line {number} of {path}: {given[0]!r} is not in the document, so nobody can read it there")
        questions.append(Question(text.strip(), given))
    if not questions:
        raise RequestError(f"{path} has no questions; write one a line: its text, a tab, its answer")
    return questions


def ask(port: int, model: str, prompt: str, with_routes: bool) -> Iterator[dict[str, Any]]:
    """The events of a streamed chat answer. Raises RequestError where the server refuses."""
    body = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0,
        "stream": True, "routes": with_routes,
    }  # fmt: skip
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
    except urllib.error.HTTPError as error:
        raise RequestError(f"the server answers {error.code}: {json.load(error)['error']['message']}") from None


def judge(question: Question, events: Sequence[dict[str, Any]]) -> Found:
    """The answer of a stream, and where it was read."""
    choices = [event["choices"][0] for event in events if event.get("choices")]
    answer = "".join(choice["delta"].get("content") or "" for choice in choices).strip()
    first_line = answer.partition("\n")[0]
    exact = any(normal(first_line) == normal(each) for each in question.answers)
    right = any(has(answer, each) for each in question.answers)
    blocks = next((event["prompt_blocks"][0] for event in events if "prompt_blocks" in event), None)
    if blocks is None:
        return Found(answer, exact, right)
    counts: collections.Counter[int] = collections.Counter()
    for choice in choices:
        for layer in (choice.get("routes") or {}).get("blocks", []):
            counts.update(block for block in layer if block < len(blocks))
    document = document_blocks(blocks)
    inner = [block for block, _ in counts.most_common() if block in document]
    holders = {block for block in document if any(holds(blocks, block, each) for each in question.answers)}
    rank = next((place for place, block in enumerate(inner, 1) if block in holders), None)
    chance = 1 - (1 - len(holders) / max(1, len(document))) ** MOST_READ
    return Found(answer, exact, right, rank, " ".join(blocks[inner[0]].split()) if inner else "", chance)


def document_blocks(blocks: Sequence[str]) -> range:
    """Those that hold nothing but document: neither the first one, which every word reads anyway, nor the question."""
    before_question = "".join(blocks).rpartition(INSTRUCTION)[0]
    last, characters = 0, 0
    while last < len(blocks) and characters + len(blocks[last]) <= len(before_question):
        characters += len(blocks[last])
        last += 1
    return range(1, last)


def holds(blocks: Sequence[str], block: int, answer: str) -> bool:
    """Whether an answer begins in this block and ends in it or in the next one."""
    pair = "".join(blocks[block : block + 2])
    return has(pair, answer) and not has("".join(blocks[block + 1 : block + 2]), answer)


def answer_all(bundle: Path, prompts: list[str], questions: list[Question], threads: int) -> list[Found]:
    """Ask the bundle's server everything. Raises RequestError."""
    manifest, found = load_bundle(bundle, verify=False), list[Found]()
    with_routes = manifest.graph.routes is not None
    options = ("--max-rows", "1", "--capacity", str(manifest.max_positions), "--threads", str(threads))
    with server(str(bundle), *options) as (port, _):
        for number, (prompt, question) in enumerate(zip(prompts, questions, strict=True), 1):
            found.append(judge(question, list(ask(port, bundle.name, prompt, with_routes))))
            print(f"\r{bundle}: {number} of {len(prompts)} answered", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def report(sides: dict[str, list[Found]], questions: list[Question], show: bool) -> None:
    """Print a table, and with ``show`` every answer."""
    if show:
        for place, question in enumerate(questions):
            print(f"{question.text} ({question.answers[0]})")
            for name, found in sides.items():
                each = found[place]
                where = f"   read in: {each.most_read}" if each.most_read else ""
                print(f"  {'right' if each.is_right else 'wrong'}  {name}: {each.answer!r}{where}")
        print()
    print(f"{len(questions)} questions       right (95 %)          exact")
    for name, found in sides.items():
        right, exact = (sum(getattr(each, kind) for each in found) for kind in ("is_right", "is_exact"))
        low, high = wilson(right, len(found))
        line = f"  {right:3} ({low:.0%} to {high:.0%})".ljust(24) + f"  {exact:3}   {name}"
        if chances := [each.chance for each in found if each.chance is not None]:
            near = sum(each.rank is not None and each.rank <= MOST_READ for each in found)
            line += f"; the answer's block is among the {MOST_READ} most read for {near} (chance {sum(chances):.1f})"
        print(line)
    if len(sides) == 2:
        dense, routed = ([float(each.is_right) for each in found] for found in sides.values())
        if interval := difference_interval(routed, dense):
            difference = (sum(routed) - sum(dense)) / len(questions)
            print(f"  the second less the first: {difference:+.0%} ({interval[0]:+.0%} to {interval[1]:+.0%})")


def main(argv: list[str] | None = None) -> int:
    """Ask and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder written by bilevel export, of a model with a chat template")
    parser.add_argument("--against", type=Path, metavar="BUNDLE", help="another bundle, of the dense model")
    parser.add_argument(
        "--documents", type=Path, nargs="+", default=[HERE / "document.txt"], metavar="FILE", help="read in turn"
    )
    parser.add_argument("--questions", type=Path, default=HERE / "questions.tsv", metavar="FILE")
    parser.add_argument("--count", type=int, metavar="N", help="the first N questions (default: all)")
    parser.add_argument("--show", action="store_true", help="print every answer, and where it was read")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers there too")
    args = parser.parse_args(argv)
    try:
        document = "\n\n".join(path.read_text(encoding="utf-8").strip() for path in args.documents)
        questions = read_questions(args.questions, document)[: args.count]
        prompts = [f"{document}\n\n{INSTRUCTION} {question.text}" for question in questions]
        bundles = [bundle for bundle in (args.against, args.bundle) if bundle is not None]
        sides = {str(bundle): answer_all(bundle, prompts, questions, args.threads) for bundle in bundles}
    except (BilevelError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(sides, questions, args.show)
    if args.json is not None:
        rows = {name: [asdict(each) for each in found] for name, found in sides.items()}
        asked = [asdict(question) for question in questions]
        args.json.write_text(json.dumps({"questions": asked, "sides": rows}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
