"""The questions: every answer stands in its text exactly once, texts fit their length, a seed gives the same ones again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import RequestError
from bilevel.runtime.quality.exams import COPY, NEEDLES, PAIRS, Exam, Prompt, Wording, fit, load_wording, make_exam
from bilevel.runtime.quality.filler import LEAST, LONGEST_PIECE, Filler, cut, load_filler
from bilevel.runtime.quality.phrases import OWNERS, draw_facts
from bilevel.runtime.quality.tasks import PER_TEXT, Source, draw_exams, draw_loss_text

FILLER = load_filler()
PLAIN = Wording(None, "plain")


class Characters:
    """A tokenizer of characters, behind a token that begins every text; a blank joins the character behind it."""

    def encode(self, text: str) -> list[int]:
        ids, place = [0], 0
        while place < len(text):
            width = 2 if text[place] == " " and place + 1 < len(text) else 1
            ids.append(sum(ord(char) << 21 * index for index, char in enumerate(text[place : place + width])) + 1)
            place += width
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(x & 0x1FFFFF) + (chr(x >> 21) if x >> 21 else "") for x in (i - 1 for i in ids if i))


TOKENIZER = Characters()
TURNS = Wording(lambda messages: "<user>" + "".join(each["content"] for each in messages) + "<assistant>", "turns")


def source(seed: int = 0, wording: Wording = PLAIN, filler: Filler = FILLER) -> Source:
    return Source(TOKENIZER, wording, filler, seed)


@pytest.mark.parametrize("task", [NEEDLES, PAIRS, COPY])
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), length=st.integers(1200, 2500), wording=st.sampled_from([PLAIN, TURNS]))
def test_answers_stand_once_and_texts_fit(task: str, seed: int, length: int, wording: Wording) -> None:
    exams = draw_exams(source(seed, wording), task, length, 5)
    assert sum(len(exam.questions) for exam in exams) == 5
    for exam in exams:
        text = TOKENIZER.decode(exam.context)
        numbers = [TOKENIZER.decode(question.answer).strip() for question in exam.questions]
        assert len(set(numbers)) == len(numbers)
        for question, answer in zip(exam.questions, numbers, strict=True):
            whole = len(exam.context) + len(question.suffix) + len(question.answer)
            assert whole <= length and len(question.suffix) >= 1
            assert text.count(answer) == 1
            first, last = question.evidence
            assert answer in TOKENIZER.decode(exam.context[first:last]), "the evidence is where the answer stands"
            assert answer not in TOKENIZER.decode(exam.context[:first] + exam.context[last:])
            assert question.depth == pytest.approx(first / len(exam.context))
        longest = max(len(exam.context) + len(q.suffix) + len(q.answer) for q in exam.questions)
        assert longest > length - LONGEST_PIECE - 1, "a text is as long as it may be"


@settings(max_examples=3)
@given(seed=st.integers(0, 10**6))
def test_a_seed_gives_the_same_questions(seed: int) -> None:
    for task in (NEEDLES, PAIRS, COPY):
        first, again, other = (draw_exams(source(each), task, 900, 2) for each in (seed, seed, seed + 1))
        assert first == again and first != other
    assert draw_loss_text(source(seed), 800, 1, 4) == draw_loss_text(source(seed), 800, 1, 4)


def test_depths_are_spread() -> None:
    exams = draw_exams(source(), NEEDLES, 4000, 2 * PER_TEXT)
    assert len(exams) == 2
    for exam in exams:
        depths = sorted(question.depth for question in exam.questions)
        assert depths[0] < 0.15 and depths[-1] > 0.85
        assert all(after - before > 0.05 for before, after in itertools.pairwise(depths))


def test_fewer_questions_share_a_short_text() -> None:
    exams = draw_exams(source(), NEEDLES, 300, 4)
    assert len(exams) > 1 and sum(len(exam.questions) for exam in exams) == 4


@pytest.mark.parametrize("task", [NEEDLES, PAIRS, COPY])
def test_a_length_that_is_too_short(task: str) -> None:
    with pytest.raises(RequestError, match=r"40 tokens are too few .*--lengths"):
        draw_exams(source(), task, 40, 2)


@given(length=st.integers(64, 900), stretches=st.integers(1, 16))
def test_loss_text_is_read_from_end_to_end(length: int, stretches: int) -> None:
    exam = draw_loss_text(source(), length, 0, stretches)
    tokens: list[int] = []
    for question in exam.questions:
        assert not tokens or question.suffix[0] == tokens.pop(), "what was scored last is read first"
        assert len(question.suffix) >= 1 and len(question.answer) >= 1
        tokens += [*question.suffix, *question.answer]
    assert len(tokens) == length and exam.context == ()


def test_facts_differ() -> None:
    for seed in range(50):
        facts = draw_facts(random.Random(seed), len(OWNERS))
        assert len({fact.number for fact in facts}) == len({fact.lead for fact in facts}) == len(facts)
        for fact in facts:
            assert fact.statement.count(fact.number) == 1 and fact.number not in fact.question + fact.lead


def test_a_token_that_joins_prompt_and_answer_is_scored() -> None:
    exam = make_exam(
        TOKENIZER, NEEDLES, 100, [Prompt("It is 7. It is ", "7", (6, 7)), Prompt("It is 7. So it is ", "7", (6, 7))]
    )
    assert exam is not None
    assert [TOKENIZER.decode(question.answer) for question in exam.questions] == [" 7", " 7"]
    assert make_exam(TOKENIZER, NEEDLES, 5, [Prompt("It is 7. It is", " 7", (6, 7))]) is None


@given(most=st.integers(1, 200), limit=st.integers(1, 200))
def test_fit_finds_the_largest(most: int, limit: int) -> None:
    asked = []

    def build(size: int) -> Exam | None:
        asked.append(size)
        return Exam(NEEDLES, size, (), ()) if size <= limit else None

    assert fit(build, most, "").length == min(most, limit) and max(asked) <= most
    with pytest.raises(RequestError, match="nothing fits; give longer texts"):
        fit(lambda size: None, most, "nothing fits")


@given(st.text(alphabet="ab .:\n", max_size=2000))
def test_cut_loses_nothing(text: str) -> None:
    pieces = cut(text)
    assert "".join(pieces).strip() == text.strip() and all(0 < len(piece) <= LONGEST_PIECE for piece in pieces)


def test_text_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("too short", encoding="utf-8")
    with pytest.raises(RequestError, match=rf"holds 9 characters, .* at least {LEAST}"):
        load_filler(path)
    path.write_bytes(b"\xff" * LEAST)
    with pytest.raises(RequestError, match="is not UTF-8"):
        load_filler(path)
    path.write_text("One sentence. " * LEAST, encoding="utf-8")
    own = load_filler(path)
    assert own.source == str(path) and own.sha256 != FILLER.sha256
    exam = draw_exams(source(filler=own), COPY, 1500, 2)[0]
    assert "One sentence. One sentence. " in TOKENIZER.decode(exam.context)


def test_wording(tmp_path: Path) -> None:
    plain = load_wording(tmp_path)
    assert plain("Text.", "Which?", "It is") == "Text.\n\nQuestion: Which?\nAnswer: It is" and "no chat template" in plain.form
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat = load_wording(tmp_path)
    assert chat("Text.", "Which?", "It is") == "[user]Text.\n\nWhich?[assistant]It is"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8")
    assert load_wording(tmp_path).form.startswith("plain text") and "refuses" in load_wording(tmp_path).form
