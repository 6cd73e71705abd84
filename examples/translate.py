"""Translation through the exported bundle and its server, scored by chrF, with the dense model's score beside it.

    pip install django polib sacrebleu
    python examples/translate.py build/smollm2-routed --against build/smollm2-bundle

Translated is what Django's users read: its messages and their translations are a small parallel text that a package brings
along (BSD 3-clause), in a hundred languages. The prompt is a list of English sentences with their translations, which the model
is to go on with, so that a routed model has something far away to read. Messages of one sentence and of several (paragraphs)
are scored apart. chrF (M. Popovic, 2015; sacrebleu's) compares characters, 0 to 100; its signature is printed, and so is its
interval of 95 % and the probability that the two sides are equally good (paired bootstrap, P. Koehn, 2004).

Texts of your own: --pairs FILE, a line for each, the source and its translation with a tab between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving_client import post_json, server

from bilevel.bundle.format import load_bundle
from bilevel.errors import BilevelError, RequestError, require

_PLACEHOLDER = re.compile(r"[%{<&]|\n")  # a message with a hole in it, or with markup
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_LEAST_WORDS = 5
_SAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class Pair:
    """A text and its translation by a person."""

    source: str
    target: str

    @property
    def is_paragraph(self) -> bool:
        """Whether it has several sentences."""
        return len(_SENTENCE_END.findall(self.source)) > 1


def catalogue_pairs(folder: Path, language: str) -> list[Pair]:
    """The messages below ``folder`` that are translated into ``language``: whole texts, without holes. Raises RequestError."""
    polib = require("polib")
    pairs: dict[str, Pair] = {}
    for path in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/django.mo")):
        for entry in polib.mofile(str(path)):
            text = f"{entry.msgid}{entry.msgstr}"
            if entry.msgstr and not _PLACEHOLDER.search(text) and len(entry.msgid.split()) >= _LEAST_WORDS:
                pairs.setdefault(entry.msgid, Pair(entry.msgid, entry.msgstr.replace("\xa0", " ")))
    if not pairs:
        raise RequestError(f"{folder} has no messages in {language!r}; name a language as Django does, for example fr, pt_BR")
    return list(pairs.values())


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a file, a line for each with a tab between its parts. Raises RequestError."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            source, tab, target = line.partition("\t")
            if not (tab and source.strip() and target.strip()):
                raise RequestError(f"line {number} of {path} is no pair: a text, a tab, its translation")
            pairs.append(Pair(source.strip(), target.strip()))
    return pairs


def split(pairs: list[Pair], shots: int, count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Examples for the prompt (single sentences), and at most ``count`` others to translate. Raises RequestError."""
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    shown = [pair for pair in shuffled if not pair.is_paragraph][:shots]
    asked = [pair for pair in shuffled if pair not in shown][:count]
    if len(shown) < shots or not asked:
        raise RequestError(f"{len(pairs)} pairs do not give {shots} examples and a text to translate; use a smaller --shots")
    return shown, asked


def prompt(shown: list[Pair], source: str, language: str) -> str:
    """The list that the model is to go on with."""
    lines = [f"English: {pair.source}\n{language}: {pair.target}\n" for pair in shown]
    return "\n".join([f"Texts in English and their translations into {language}.\n", *lines, f"English: {source}\n{language}:"])


def translate(bundle: Path, prompts: list[str], max_tokens: int, threads: int) -> list[str]:
    """What the bundle's server goes on with, greedily, up to the end of the line."""
    texts, capacity = list[str](), str(load_bundle(bundle, verify=False).max_positions)
    with server(str(bundle), "--max-rows", "1", "--capacity", capacity, "--threads", str(threads)) as (port, _):
        for number, text in enumerate(prompts, 1):
            body = {"prompt": text, "max_tokens": max_tokens, "temperature": 0, "stop": ["\n"]}
            status, answer = asyncio.run(post_json(port, "/v1/completions", {"model": bundle.name, **body}))
            if status != 200:
                raise RequestError(f"the server of {bundle} answers {status}: {answer['error']['message']}")
            texts.append(answer["choices"][0]["text"].strip())
            print(f"\r{bundle}: {number} of {len(prompts)} translated", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return texts


def scores(sides: dict[str, list[str]], references: list[str]) -> list[dict[str, Any]]:
    """chrF of each side; where there are two, with intervals, and the second's probability of such a difference by chance."""
    metric = require("sacrebleu").CHRF()
    rows: list[dict[str, Any]] = [
        {"side": name, "chrf": metric.corpus_score(texts, [references]).score, "signature": str(metric.get_signature())}
        for name, texts in sides.items()
    ]
    if len(rows) > 1:
        from sacrebleu.significance import PairedTest

        test = PairedTest(list(sides.items()), {"chrF": metric}, [references], test_type="bs", n_samples=_SAMPLES)
        for row, each in zip(rows, test()[1]["chrF2"], strict=True):
            row.update(
                interval=[float(each.mean - each.ci), float(each.mean + each.ci)],
                p_value=None if each.p_value is None else float(each.p_value),
            )
    return rows


def report(sides: dict[str, list[str]], asked: list[Pair]) -> dict[str, Any]:
    """Print a table for sentences and for paragraphs, and one example of each; the numbers."""
    found: dict[str, Any] = {}
    for kind, chosen in (
        ("sentences", [i for i, pair in enumerate(asked) if not pair.is_paragraph]),
        ("paragraphs", [i for i, pair in enumerate(asked) if pair.is_paragraph]),
    ):
        if not chosen:
            continue
        found[kind] = scores(
            {name: [texts[i] for i in chosen] for name, texts in sides.items()}, [asked[i].target for i in chosen]
        )
        print(f"\n{len(chosen)} {kind}")
        for row in found[kind]:  # the first of two has no probability
            interval = "  ({:.1f} to {:.1f})".format(*row["interval"]) if "interval" in row else ""
            chance = f"  p = {row['p_value']:.3f}" if row.get("p_value") is not None else ""
            print(f"  chrF {row['chrf']:5.1f}{interval}{chance}  {row['side']}")
        print(f"  for example: {asked[chosen[0]].source}\n    a person   {asked[chosen[0]].target}")
        for name, texts in sides.items():
            print(f"    {name}: {texts[chosen[0]]}")
        print(f"  {found[kind][0]['signature']}")
    return found


def source_pairs(args: argparse.Namespace) -> list[Pair]:
    """As the command says. Raises RequestError."""
    if args.pairs is not None:
        return read_pairs(args.pairs)
    return catalogue_pairs(Path(require("django").__file__).parent, args.language)


def main(argv: list[str] | None = None) -> int:
    """Translate and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder written by bilevel export")
    parser.add_argument("--against", type=Path, metavar="BUNDLE", help="another bundle, of the dense model")
    parser.add_argument("--language", default="fr", help="as Django names it (default: %(default)s)")
    parser.add_argument("--language-name", default="French", help="as the prompt names it (default: %(default)s)")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="texts of your own instead")
    parser.add_argument("--count", type=int, default=60, help="texts to translate (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=24, help="examples in the prompt (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=160, help="of a translation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which texts are examples (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores and texts there too")
    args = parser.parse_args(argv)
    try:
        require("sacrebleu")
        shown, asked = split(source_pairs(args), args.shots, args.count, args.seed)
        prompts = [prompt(shown, pair.source, args.language_name) for pair in asked]
        bundles = [bundle for bundle in (args.against, args.bundle) if bundle is not None]
        sides = {str(bundle): translate(bundle, prompts, args.max_tokens, args.threads) for bundle in bundles}
    except (BilevelError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = report(sides, asked)
    if args.json is not None:
        texts = [{"source": pair.source, "reference": pair.target} for pair in asked]
        args.json.write_text(json.dumps({**found, "texts": texts, "sides": sides}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
