"""The exams of a plan: facts, key-value pairs, rare strings and plain text, drawn from a seed.

Every number, key and string is drawn anew, so that no model has seen it, and stands exactly once in its text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bilevel.errors import RequestError
from bilevel.runtime.quality.exams import COPY, LOSS, NEEDLES, PAIRS, Encoder, Exam, Prompt, Question, Wording, fit, make_exam
from bilevel.runtime.quality.filler import Filler
from bilevel.runtime.quality.phrases import DIGITS, draw_facts

PER_TEXT = 8  # questions that share a text
STRETCHES, QUICK_STRETCHES = 16, 8  # of a text whose loss is measured
STRETCH = 24  # tokens of a stretch
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class Source:
    """What exams are made from; every exam draws from a stream of its own, so that plans share what they have in common.

    rendered: what encodes a prompt that the chat template wrote, which holds its special tokens already; None: encoder.
    """

    encoder: Encoder
    wording: Wording
    filler: Filler
    seed: int
    rendered: Encoder | None = None

    @property
    def asking(self) -> Encoder:
        """What encodes questions."""
        return self.encoder if self.rendered is None else self.rendered

    def rng(self, task: str, length: int, index: int) -> random.Random:
        """The stream of one exam."""
        return random.Random(f"{self.seed}/{task}/{length}/{index}")


def draw_exams(source: Source, task: str, length: int, questions: int) -> list[Exam]:
    """Exams of one task whose texts have up to ``length`` tokens, with ``questions`` questions in all.

    Fewer share a text where PER_TEXT do not fit. Raises RequestError where not even one fits.
    """
    make = {NEEDLES: _needles, PAIRS: _pairs, COPY: _copy}[task]
    exams: list[Exam] = []
    left, index = questions, 0
    while left:
        exam = _most_questions(make, source, length, index, min(PER_TEXT, left))
        exams.append(exam)
        left, index = left - len(exam.questions), index + 1
    return exams


def _most_questions(make: Callable[..., Exam], source: Source, length: int, index: int, most: int) -> Exam:
    for count in range(most, 1, -1):
        try:
            return make(source, length, index, count)
        except RequestError:
            continue
    return make(source, length, index, 1)


def _spread(count: int, index: int) -> list[float]:
    """Depths of ``count`` things in a text, evenly spread; each text (``index``) shifts them a little."""
    shift = (0.5, 0.2, 0.8, 0.35, 0.65)[index % 5]
    return [(place + shift) / count for place in range(count)]


def _hide(pieces: Sequence[str], hidden: Sequence[str], depths: Sequence[float]) -> tuple[str, list[int]]:
    """(the pieces with the hidden texts as sentences among them, where each hidden text begins in characters)."""
    total = sum(map(len, pieces))
    ends = [0, *itertools.accumulate(map(len, pieces))]
    where = [min(range(len(ends)), key=lambda place: abs(ends[place] - depth * total)) for depth in depths]
    text, starts = "", [0] * len(hidden)
    for place in range(len(pieces) + 1):
        for index in (index for index, at in enumerate(where) if at == place):
            starts[index] = len(text)
            text += f"{hidden[index]} "
        text += pieces[place] if place < len(pieces) else ""
    return text.rstrip(), starts


def _pieces(source: Source, rng: random.Random, length: int, secrets: Sequence[str]) -> list[str]:
    """More pieces than ``length`` tokens can hold, none of which holds a secret by chance."""
    pieces: list[str] = []
    tokens = 0
    for piece in source.filler.pieces(rng):
        if any(secret in piece for secret in secrets):
            continue
        pieces.append(piece)
        tokens += len(source.encoder.encode(piece))
        if tokens > length:
            return pieces
    raise AssertionError("pieces have no end")


def _needles(source: Source, length: int, index: int, count: int) -> Exam:
    rng = source.rng(NEEDLES, length, index)
    facts = draw_facts(rng, count)
    pieces = _pieces(source, rng, length, [fact.number for fact in facts])
    depths = rng.sample(_spread(count, index), count)

    def build(size: int) -> Exam | None:
        text, starts = _hide(pieces[:size], [fact.statement for fact in facts], depths)
        prompts = []
        for fact, start in zip(facts, starts, strict=True):
            whole = source.wording(text, fact.question, fact.lead)
            place = start + fact.statement.index(fact.number) + max(whole.find(text), 0)
            prompts.append(Prompt(whole, f" {fact.number}", (place, place + len(fact.number))))
        return make_exam(source.asking, NEEDLES, length, prompts)

    return fit(build, len(pieces), f"{length} tokens are too few for a hidden fact and its question")


def _pairs(source: Source, length: int, index: int, count: int) -> Exam:
    rng = source.rng(PAIRS, length, index)
    most = max(length // 2, PER_TEXT)  # a pair takes more than two tokens, so these are enough
    keys = [f"{number >> 16:04x}-{number & 0xFFFF:04x}" for number in rng.sample(range(16**8), most)]
    values = [str(number) for number in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), most)]
    pairs = list(zip(keys, values, strict=True))

    def build(size: int) -> Exam | None:
        kept = pairs[: max(size, count)]
        text = "\n".join(f"{key}: {value}" for key, value in kept)
        asked = sorted({min(int(depth * len(kept)), len(kept) - 1) for depth in _spread(count, index)})
        prompts = []
        for key, value in (kept[place] for place in asked):
            question = f"The list above gives a value for each key. Which value does it give for the key {key}?"
            whole = source.wording(text, question, f"{key}:")
            place = whole.index(f"{key}: {value}") + len(key) + 2
            prompts.append(Prompt(whole, f" {value}", (place, place + len(value))))
        return make_exam(source.asking, PAIRS, length, prompts)

    return fit(build, len(pairs), f"{length} tokens are too few for {count} pairs and a question")


def rare_string(rng: random.Random) -> tuple[str, str]:
    """(start, rest) of a string of random syllables and digits that nobody has seen."""
    groups = []
    for place in range(7):
        is_number = place % 3 == 1
        groups.append(str(rng.randrange(100, 1000)) if is_number else "".join(rng.choice(_SYLLABLES) for _ in range(3)))
    return "-".join(groups[:3]), "-" + "-".join(groups[3:])


def _copy(source: Source, length: int, index: int, count: int) -> Exam:
    rng = source.rng(COPY, length, index)
    strings = [rare_string(rng) for _ in range(count)]
    pieces = _pieces(source, rng, length, [start for start, _ in strings])
    depths = rng.sample(_spread(count, index), count)

    def build(size: int) -> Exam | None:
        text, starts = _hide(pieces[:size], [start + rest for start, rest in strings], depths)
        prompts = []
        for (start, rest), begins in zip(strings, starts, strict=True):
            place = begins + len(start)
            prompts.append(Prompt(f"{text}\n\n{start}", rest, (place, place + len(rest))))
        return make_exam(source.asking, COPY, length, prompts)

    return fit(build, len(pieces), f"{length} tokens are too few for a rare string")


def draw_loss_text(source: Source, length: int, index: int, stretches: int) -> Exam:
    """Plain text of exactly ``length`` tokens, read from its beginning to its end.

    Its questions are stretches of it that follow each other: suffix, what is read before; answer, what is scored. A suffix
    begins with the last token of the answer before it, which was scored but not read. There is no shared context.
    """
    rng = source.rng(LOSS, length, index)
    ids = source.encoder.encode("".join(_pieces(source, rng, 2 * length, ())))[:length]
    if len(ids) < 4 * stretches:
        raise RequestError(f"{length} tokens are too few for {stretches} stretches of loss; give longer texts with --lengths")
    size = min(STRETCH, length // (2 * stretches))
    questions, start = [], 0
    for place in range(stretches):
        end = length * (place + 1) // stretches
        questions.append(Question(end / length, tuple(ids[start : end - size]), tuple(ids[end - size : end]), (0, 0)))
        start = end - 1
    return Exam(LOSS, length, (), tuple(questions))
