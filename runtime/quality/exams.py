"""What is asked: texts, the questions behind each, and the answers that must come, all as token ids.

The questions of one text share its beginning, which is read once; each question is then read and answered behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bilevel.errors import BilevelError, RequestError

NEEDLES, PAIRS, COPY, LOSS = "needles", "pairs", "copy", "loss"
TASKS = {
    NEEDLES: "numbers hidden in a text as sentences, asked for at its end",
    PAIRS: "a list of random keys and values, a key's value asked for",
    COPY: "random strings that stand in a text, continued at its end",
    LOSS: "the text's own next tokens, early and late",
}


class Encoder(Protocol):
    """A tokenizer, as far as it is needed here."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included."""


@dataclass(frozen=True)
class Question:
    """One question. suffix: its tokens behind the shared ones. answer: the tokens that are scored.

    evidence: the tokens of the shared text in which the answer stands, first and one past the last. depth: where that is, as a
    share of the shared text. A question whose text the tokens do not tell apart has no evidence (0, 0).
    """

    depth: float
    suffix: tuple[int, ...]
    answer: tuple[int, ...]
    evidence: tuple[int, int]


@dataclass(frozen=True)
class Exam:
    """A text and its questions. length: tokens that it may have, answers included. context: the tokens all questions share."""

    task: str
    length: int
    context: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Prompt:
    """A whole text, cut where its answer begins; evidence: the answer's characters in ``text``, first and one past the last."""

    text: str
    answer: str
    evidence: tuple[int, int]


class Wording:
    """How a text and a question become a prompt: in the model's chat template where it has one.

    form: what is done, in words. is_chat: whether the chat template writes the prompt.
    """

    def __init__(self, render: Callable[[list[dict[str, str]]], str] | None, form: str) -> None:
        self._render, self.form = render, form
        self.is_chat = render is not None

    def __call__(self, text: str, question: str, lead: str) -> str:
        """The prompt up to where the answer begins."""
        if self._render is None:
            return f"{text}\n\nQuestion: {question}\nAnswer: {lead}"
        return self._render([{"role": "user", "content": f"{text}\n\n{question}"}]) + lead


def load_wording(folder: Path, files: Collection[str] | None = None) -> Wording:
    """The bundle's chat template, or plain questions where it has none that can be used; ``form`` says why.

    files: those that the manifest lists (None: all that are there).
    """
    plain = "plain text, question and answer"
    try:
        from bilevel.runtime.serve.encoder import find_template
        from bilevel.runtime.serve.refusal import ApiError
    except ModuleNotFoundError as error:
        return Wording(None, f"{plain} (the chat template needs {error.name}: pip install 'bilevel[serve]')")
    try:
        template = find_template(folder, files)
        if template is None:
            return Wording(None, f"{plain} (the bundle has no chat template)")
        template.render([{"role": "user", "content": "text"}])
    except (ApiError, BilevelError) as error:
        return Wording(None, f"{plain} ({error})")
    return Wording(template.render, "the bundle's chat template")


def make_exam(encoder: Encoder, task: str, length: int, prompts: Sequence[Prompt]) -> Exam | None:
    """The prompts as an exam; None where one of them, with its answer, is longer than ``length`` tokens."""
    whole = [encoder.encode(prompt.text + prompt.answer) for prompt in prompts]
    if any(len(ids) > length for ids in whole):
        return None
    # Where the answer begins, a tokenizer may join characters of both sides; such a token belongs to the answer.
    starts = [common_prefix(ids, encoder.encode(prompt.text)) for ids, prompt in zip(whole, prompts, strict=True)]
    shared = min(starts)
    for ids in whole[1:]:
        shared = min(shared, common_prefix(whole[0], ids))
    if len(prompts) == 1:  # something must be left to ask
        shared = max(starts[0] - 1, 0)
    questions = []
    for prompt, ids, start in zip(prompts, whole, starts, strict=True):
        first, last = (len(encoder.encode(prompt.text[:place])) for place in prompt.evidence)
        evidence = (max(first - 1, 0), last) if 0 < last <= shared and first < last else (0, 0)
        depth = evidence[0] / max(shared, 1)
        questions.append(Question(depth, tuple(ids[shared:start]), tuple(ids[start:]), evidence))
    return Exam(task, length, tuple(whole[0][:shared]), tuple(questions))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts share from the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def fit(build: Callable[[int], Exam | None], most: int, what: str) -> Exam:
    """The longest exam that fits: ``build(size)`` for the largest size up to ``most``, found by halving.

    build: gives None where its exam is too long, which it is for every larger size too. Raises RequestError where not even
    size 1 fits.
    """
    best = build(1)
    if best is None:
        raise RequestError(f"{what}; give longer texts with --lengths")
    low, high = 1, most + 1
    while high - low > 1:
        size = (low + high) // 2
        exam = build(size)
        if exam is None:
            high = size
        else:
            low, best = size, exam
    return best
