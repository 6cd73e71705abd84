"""Rows and cases: every answer stands where the row says, and evaluation shares no phrasing with training."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from bilevel.errors import CheckpointError, ConfigError
from bilevel.export.route import texts
from bilevel.export.route.phrases import EVALUATION, TRAINING, fact
from bilevel.export.route.rows import evaluation_case, training_row
from tests.doubles.bundle import make_tokenizer

DOCUMENTS = [f"This is document {number}. " + "It goes on and on without a fact. " * 60 for number in range(4)]


def with_beginning() -> Tokenizer:
    """A tokenizer that puts <pad> in front of every text."""
    tokenizer = make_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    return tokenizer


@pytest.mark.parametrize("seed", range(4))
def test_answers_stand_at_their_sources(seed: int) -> None:
    row = training_row(DOCUMENTS, make_tokenizer(), 3000, seed, 7)
    assert len(row.ids) == 3000 and len(row.answers) > 20
    assert (row.ids[row.answers + 1] == row.ids[row.sources]).all()
    assert (row.sources < row.answers).all()


def test_rows_depend_on_seed_and_index_alone() -> None:
    first, again, other, seeded = (
        training_row(DOCUMENTS, make_tokenizer(), 800, seed, index).ids for seed, index in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert (first == again).all() and (first != other).any() and (first != seeded).any()


def test_beginning_is_the_tokenizer_s() -> None:
    assert texts.beginning(make_tokenizer()) == [] and texts.beginning(with_beginning()) == [0]
    assert training_row(DOCUMENTS, with_beginning(), 400, 0, 0).ids[0] == 0


@pytest.mark.parametrize("length", [1500, 4000])
def test_case(length: int) -> None:
    case = evaluation_case(DOCUMENTS, make_tokenizer(), length, 0, 0, facts=8, passages=3)
    assert len(case.context) == length and len(case.questions) == 11
    facts = [question for question in case.questions if question.is_fact]
    assert len(facts) == 8
    for question in case.questions:
        assert (case.context[question.sources] == question.ids[-question.num_answer :]).all()
    places = np.array([question.sources[0] for question in facts])
    assert (np.diff(places) > length // 20).all()


def test_short_context_holds_fewer_facts() -> None:
    case = evaluation_case(DOCUMENTS, make_tokenizer(), 500, 0, 0, facts=16)
    facts = [question for question in case.questions if question.is_fact]
    assert 0 < len(facts) < 16 and all(question.sources[-1] < 500 for question in facts)


def test_phrasings_are_apart() -> None:
    assert not set(TRAINING) & set(EVALUATION)
    rng = np.random.default_rng(0)
    for templates in (TRAINING, EVALUATION):
        for index in range(len(templates)):
            new = fact(rng, templates, index)
            assert new.answer.strip() and new.answer.strip() not in new.question
            assert "{" not in (new.before + new.question).replace('{"name"', "")


def test_default_text_is_not_what_quality_hides_facts_in() -> None:
    """A gate must not be judged on the text that it was trained on."""
    source = Path(topics.__file__).read_text(encoding="utf-8")
    lines = [line for text in topics.topics.values() for line in text.splitlines() if len(line) > 60 and line in source]
    assert len(lines) > 500, "enough lines stand in the file as they are"
    told = "\n".join(texts.read_documents([]))
    assert sum(line in told for line in lines[::10]) < 0.05 * len(lines[::10])


def test_library_is_there_and_is_split() -> None:
    """The default text: any machine with Python has it; the same file falls on the same side."""
    training, heldout = texts.split(texts.read_documents([]))
    assert len(training) > len(heldout) > 20 and not set(training) & set(heldout)


def test_own_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)
    (tmp_path / "b.bin").write_bytes(b"\0\1\2" * 500)
    (tmp_path / "short.md").write_text("too short")
    assert texts.read_documents([tmp_path]) == ["words " * 100]
    training, heldout = texts.split(texts.read_documents([tmp_path / "a.txt"]))
    assert training[0] + heldout[0] == "words " * 100 and heldout[0]
    with pytest.raises(ConfigError, match="is no file and no folder; name text files"):
        texts.read_documents([tmp_path / "gone"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match="holds no UTF-8 text"):
        texts.read_documents([tmp_path])


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        texts.read_tokenizer(tmp_path)
