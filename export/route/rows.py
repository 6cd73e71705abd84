"""Rows of tokens that ask for what was said far above: facts, keys of lists, and copied passages amid ordinary text.

Each row knows its answers: the positions whose next token can only be known from another place, and that place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bilevel.export.route.phrases import EVALUATION, TRAINING, fact, pairs
from bilevel.export.route.texts import Filler, beginning

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PASSAGE = 24  # tokens, of which a third is given
_EVENT_TOKENS = 110  # of text per thing that is said and asked again


@dataclass(frozen=True)
class Row:
    """ids: int64 [L]. answers: int64 [A], positions before an answer's tokens. sources: int64 [A], where that token stood."""

    ids: np.ndarray
    answers: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True)
class Question:
    """A question with its answer, asked behind a context.

    ids: int64 [Q], the last ``num_answer`` of which are the answer. sources: int64 [num_answer], positions of the answer's
    tokens in the context. is_fact: a hidden fact, or else the rest of a passage that the context holds.
    """

    ids: np.ndarray
    num_answer: int
    sources: np.ndarray
    is_fact: bool = True


@dataclass(frozen=True)
class Case:
    """A context, int64 [M], and questions about it."""

    context: np.ndarray
    questions: tuple[Question, ...]


class _Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []


@dataclass
class _Said:
    """What a row has said: the tokens of an answer, where they stood, and the question for them."""

    question: list[int]
    answer: list[int]
    place: int


def training_row(documents: Sequence[str], tokenizer: Tokenizer, length: int, seed: int, index: int) -> Row:
    """Row ``index`` of a run, of ``length`` tokens; it depends on the arguments alone."""
    rng, encode = np.random.default_rng([seed, index]), _Encoder(tokenizer)
    filler = Filler(documents, tokenizer, rng)
    ids = beginning(tokenizer)
    said: list[_Said] = []
    answers: list[int] = []
    sources: list[int] = []

    def repeat(question: list[int], answer: list[int], place: int) -> None:
        ids.extend(question)
        answers.extend(range(len(ids) - 1, len(ids) - 1 + len(answer)))
        sources.extend(range(place, place + len(answer)))
        ids.extend(answer)

    while len(ids) < length:
        early = len(ids) < length // 3
        kind = rng.random()
        if kind < (0.55 if early else 0.2):
            said += _state(ids, encode, rng)
        elif kind < (0.75 if early else 0.4) and len(ids) > 500:
            count = int(rng.integers(12, 48))
            place = int(rng.integers(len(ids) - 200 - count))
            copied = ids[place : place + count]  # its first tokens say which passage it is
            repeat(copied[:4], copied[4:], place + 4)
        elif said:
            # Mostly what lies far away.
            order = sorted(rng.choice(len(said), size=min(2, len(said)), replace=False).tolist())
            chosen = said.pop(order[0]) if rng.random() < 0.5 else said[order[0]]
            repeat(chosen.question, chosen.answer, chosen.place)
        ids.extend(filler.take(int(rng.integers(10, 2 * _EVENT_TOKENS))))
    inside = [i for i, answer in enumerate(answers) if answer < length - 1]
    return Row(np.array(ids[:length]), np.array(answers)[inside].astype(int), np.array(sources)[inside].astype(int))


def _state(ids: list[int], encode: _Encoder, rng: np.random.Generator) -> list[_Said]:
    """Append a fact or a list of pairs to ``ids``; returns what can be asked of it."""
    said = []
    if rng.random() < 0.7:
        new = fact(rng, TRAINING)
        ids.extend(encode(f"\n{new.before}"))
        answer = encode(new.answer)
        said.append(_Said(encode(f"\n{new.question}"), answer, len(ids)))
        ids.extend([*answer, *encode(f"{new.after}\n")])
        return said
    for key, value in pairs(rng, int(rng.integers(4, 14))):
        name, answer = encode(f"\n{key}"), encode(value)
        ids.extend(name)
        said.append(_Said(name, answer, len(ids)))
        ids.extend(answer)
    ids.extend(encode("\n"))
    return said


def evaluation_case(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    seed: int,
    index: int,
    *,
    facts: int = 16,
    passages: int = 4,
) -> Case:
    """A context of ``length`` tokens with up to ``facts`` hidden facts at even distances, a question for each, and beginnings
    of ``passages`` passages whose rest the context tells.

    Phrasings are none of training's. Four facts in a row share one, so that it does not tell which of them is asked for.
    """
    rng, encode = np.random.default_rng([seed, index, 1]), _Encoder(tokenizer)
    filler = Filler(documents, tokenizer, rng)
    ids = beginning(tokenizer)
    questions = []
    for i in range(facts):
        end = round(length * (i + 1) / (facts + 1))
        new = fact(rng, EVALUATION, i // 4)
        before, answer, after = encode(f"\n{new.before}"), encode(new.answer), encode(f"{new.after}\n")
        gap = max(0, end - len(ids) - len(before) - len(answer) - len(after))
        ids.extend([*filler.take(gap), *before])
        sources = np.arange(len(ids), len(ids) + len(answer))
        ids.extend([*answer, *after])
        questions.append(Question(np.array([*encode(new.question), *answer]), len(answer), sources))
    ids.extend(filler.take(max(0, length - len(ids))))
    context = np.array(ids[:length])
    questions = [each for each in questions if each.sources[-1] < length]  # a short context holds fewer
    for first in rng.integers(length * 3 // 4, size=passages).tolist():
        passage = context[first : first + _PASSAGE]
        rest = len(passage) * 2 // 3
        questions.append(Question(passage, rest, np.arange(first + len(passage) - rest, first + len(passage)), is_fact=False))
    return Case(context, tuple(questions))
