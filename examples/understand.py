"""Questions about a long document, asked of the exported bundle's server: the answers, and the blocks they were read from.

    python examples/understand.py build/smollm2-routed --against build/smollm2-bundle
    python examples/understand.py build/smollm2-routed --documents LICENSE examples/understand/document.txt     twice as long

The default document describes a town that does not exist, so that no model knows an answer beforehand. Each question is a chat
of its own: the documents, then the question. An answer is right where it is, or has in it, one of the given ones, after case,
punctuation and articles are taken off (P. Rajpurkar et al., SQuAD, 2016); exact is the stricter of the two.

Where a bundle routes its attention, the server says which blocks each layer read for each word of the answer. Some blocks are
read whatever is asked, so blocks are ranked by how many layers read them for a word of this answer beyond what the answers to
all questions average. Printed is how often the block that holds the answer is among the five first, beside chance, and with
--show the first block of each answer.

Questions of your own: --questions FILE, a line for each, with a tab before the answer and | between several right ones.
"""

from __future__ import annotations

import argparse
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
    """What one side answered. blocks: the prompt's, as texts, where attention is routed. layers: how many layers read each of
    them, for a word of the answer on average."""

    answer: str
    is_exact: bool
    is_right: bool
    blocks: Sequence[str] = ()
    layers: Sequence[float] = ()


@dataclass(frozen=True)
class Source:
    """Where an answer was read. text: of the block that was read most beyond the average. rank: of the block that holds the
    answer, from 1; None where it is no block of its own. chance: that blind ranking has it among the MOST_READ first."""

    text: str
    rank: int | None
    chance: float


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
    blocks = next((event["prompt_blocks"][0] for event in events if "prompt_blocks" in event), ())
    counts, words = [0.0] * len(blocks), [choice["routes"]["blocks"] for choice in choices if choice.get("routes")]
    for block in (block for word in words for layer in word for block in layer if block < len(blocks)):
        counts[block] += 1 / len(words)
    return Found(answer, exact, right, blocks, counts)


def sources(questions: Sequence[Question], found: Sequence[Found]) -> list[Source]:
    """Of each answer, by its own document blocks; the prompts differ in their ends alone."""
    shared = min((document_blocks(each.blocks) for each in found), key=len)
    average = {block: sum(each.layers[block] for each in found) / len(found) for block in shared}
    results = []
    for question, each in zip(questions, found, strict=True):
        ranked = sorted(shared, key=lambda block, each=each: average[block] - each.layers[block])  # type: ignore[misc]
        holders = {block for block in shared if any(holds(each.blocks, block, answer) for answer in question.answers)}
        rank = next((place for place, block in enumerate(ranked, 1) if block in holders), None)
        chance = 1 - (1 - len(holders) / max(1, len(shared))) ** MOST_READ
        results.append(Source(" ".join(each.blocks[ranked[0]].split()) if ranked else "", rank, chance))
    return results


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


def report(sides: dict[str, list[Found]], questions: list[Question], show: bool) -> dict[str, list[Source]]:
    """Print a table, and with ``show`` every answer; where the routed sides read."""
    read = {name: sources(questions, found) for name, found in sides.items() if all(each.blocks for each in found)}
    for place, question in enumerate(questions if show else []):
        print(f"{question.text} ({question.answers[0]})")
        for name, found in sides.items():
            where = f"   read in: {read[name][place].text}" if name in read else ""
            print(f"  {'right' if found[place].is_right else 'wrong'}  {name}: {found[place].answer!r}{where}")
    print(f"{len(questions)} questions       right (95 %)          exact")
    for name, found in sides.items():
        right, exact = (sum(getattr(each, kind) for each in found) for kind in ("is_right", "is_exact"))
        low, high = wilson(right, len(found))
        line = f"  {right:3} ({low:.0%} to {high:.0%})".ljust(24) + f"  {exact:3}   {name}"
        if name in read:
            near = sum(each.rank is not None and each.rank <= MOST_READ for each in read[name])
            chance = sum(each.chance for each in read[name])
            line += f"; the answer's block is among the {MOST_READ} most read for {near} (chance {chance:.1f})"
        print(line)
    if len(sides) == 2:
        dense, routed = ([float(each.is_right) for each in found] for found in sides.values())
        if interval := difference_interval(routed, dense):
            difference = (sum(routed) - sum(dense)) / len(questions)
            print(f"  the second less the first: {difference:+.0%} ({interval[0]:+.0%} to {interval[1]:+.0%})")
    return read


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
    read = report(sides, questions, args.show)
    if args.json is not None:
        answers = {
            name: [{"answer": each.answer, "is_right": each.is_right, "is_exact": each.is_exact} for each in found]
            for name, found in sides.items()
        }
        rows = {name: [asdict(each) for each in found] for name, found in read.items()}
        asked = [asdict(question) for question in questions]
        told = {"questions": asked, "answers": answers, "read": rows}
        args.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
