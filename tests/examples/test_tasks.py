"""examples/translate.py and understand.py: what is asked and how it is scored, on models made for tests."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import ROOT
from tests.runtime.serve.test_openai import write_chat_bundle


@pytest.fixture
def translate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import translate

    return translate


@pytest.fixture
def understand(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import understand

    return understand


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    return write_chat_bundle(tmp_path / "bundle")


# Translation


def test_whole_messages_of_a_catalogue_become_pairs(translate: ModuleType, tmp_path: Path) -> None:
    import polib

    folder = tmp_path / "app" / "locale" / "fr" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    catalogue = polib.MOFile()
    for source, target in (
        ("The link has one hole: %(name)s, so not.", "Non."),
        ("The door is open now.", "La porte est\xa0ouverte."),
        ("Too short.", "Non."),
        ("It is late today. You may go home.", "Il est tard. Rentrez."),
        ("Nobody has translated this one.", ""),
    ):
        catalogue.append(polib.MOEntry(msgid=source, msgstr=target))
    catalogue.save(str(folder / "django.mo"))
    pairs = translate.catalogue_pairs(tmp_path, "fr")
    assert {(pair.source, pair.target, pair.is_paragraph) for pair in pairs} == {
        ("The door is open now.", "La porte est ouverte.", False),
        ("It is late today. You may go home.", "Il est tard. Rentrez.", True),
    }
    with pytest.raises(translate.RequestError, match="has no messages in 'tlh'; name a language as Django does"):
        translate.catalogue_pairs(tmp_path, "tlh")


def test_examples_are_never_asked(translate: ModuleType) -> None:
    pairs = [translate.Pair(f"Sentence number {i} is here.", f"{i}") for i in range(9)]
    pairs.append(translate.Pair("One sentence. And another.", "x"))
    shown, asked = translate.split(pairs, 4, 50, 0)
    assert len(shown) == 4 and sorted(map(hash, [*shown, *asked])) == sorted(map(hash, pairs))
    assert not any(pair.is_paragraph for pair in shown) and (shown, asked) == translate.split(pairs, 4, 50, 0)
    text = translate.prompt(shown, asked[0].source, "French")
    assert text.endswith(f"English: {asked[0].source}\nFrench:") and asked[0].target not in text.rpartition("English: ")[2]
    with pytest.raises(translate.RequestError, match="10 pairs do not give 10 examples"):
        translate.split(pairs, 10, 50, 0)


@pytest.mark.parametrize("line", ["no tab", "\tonly a target", "only a source\t "])
def test_a_line_that_is_no_pair_is_named(translate: ModuleType, tmp_path: Path, line: str) -> None:
    (tmp_path / "pairs.tsv").write_text(f"a\tb\n\n{line}\n")
    with pytest.raises(translate.RequestError, match="line 3 of .*pairs.tsv is no pair"):
        translate.read_pairs(tmp_path / "pairs.tsv")


def test_translations_are_asked_of_a_server_and_scored(
    translate: ModuleType, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.tsv").write_text("".join(f"s{i}\tt{i}\n" for i in range(3)) + "One. Two.\tx\n")
    arguments = ["--pairs", str(tmp_path / "pairs.tsv"), "--shots", "1", "--max-tokens", "2", "--threads", "1"]
    arguments += ["--language-name", "F"]  # the model is a small one
    assert translate.main([str(bundle), "--against", str(bundle), *arguments, "--json", str(tmp_path / "t.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert "2 sentences" in printed and "1 paragraphs" in printed and "chrF" in printed
    assert len(found["texts"]) == 3 and all(len(texts) == 3 for texts in found["sides"].values())
    assert translate.main([str(bundle), "--pairs", str(tmp_path / "none.tsv")]) == 2


def test_scores_are_those_of_chrf(translate: ModuleType) -> None:
    good, bad = ["la porte est ouverte", "il est tard"], ["xyz", "il"]
    (one,) = translate.scores({"a": good}, good)
    assert one["chrf"] == pytest.approx(100) and "p_value" not in one
    first, second = translate.scores({"good": good, "bad": bad}, good)
    assert first["chrf"] > 50 > second["chrf"] and first["p_value"] is None and 0 < second["p_value"] <= 1


# Understanding


def events(answer: str, blocks: list[str], read: list[list[list[int]]]) -> list[dict[str, Any]]:
    """A stream: the prompt's blocks, then a word each, for which layers read blocks."""
    words = answer.split(" ")
    choices = [
        {"delta": {"content": word if i == 0 else f" {word}"}, "routes": {"blocks": read[i]} if i < len(read) else None}
        for i, word in enumerate(words)
    ]
    return [{"choices": [], "prompt_blocks": [blocks]}, *({"choices": [choice]} for choice in choices)]


def test_blocks_are_ranked_by_what_this_answer_read_beyond_the_others(understand: ModuleType) -> None:
    blocks = ["start ", "the sky is ", "blue. Jonas ", "Reed was here. ", f"{understand.INSTRUCTION} Who", " was here?"]
    assert list(understand.document_blocks(blocks)) == [1, 2, 3]
    questions = [understand.Question("Who was here?", ("Jonas Reed",)), understand.Question("What is blue?", ("The sky",))]
    read = [[[0, 1, 4, 5], [0, 2, 5]], [[0, 1, 5], [1, 2, 9]], [[1], [1]], [[1], [1]]]
    first = understand.judge(questions[0], events("It was Jonas Reed.", blocks, read))
    assert (first.is_right, first.is_exact) == (True, False) and first.layers == [0.75, 1.75, 0.5, 0, 0.25, 0.75]
    second = understand.judge(questions[1], events("the sky", blocks, [[[1, 3], [1]], [[1], [1]]]))
    assert second.is_exact and second.layers == [0, 2, 0, 0.5, 0, 0]
    sources = understand.sources(questions, [first, second])
    assert [(source.rank, source.text) for source in sources] == [(1, "blue. Jonas"), (2, "Reed was here.")]
    assert sources[0].chance == pytest.approx(1 - (2 / 3) ** 5)
    dense = understand.judge(questions[0], events("Jonas Reeder", blocks, [])[1:])
    assert (dense.is_right, dense.blocks) == (False, ())


def test_answers_are_compared_without_articles_case_and_punctuation(understand: ModuleType) -> None:
    assert understand.has("At the Needle-Rocks!", "the needle rocks") and not understand.has("1423 steps", "142")


def test_every_question_of_the_repository_can_be_answered_from_its_document(understand: ModuleType) -> None:
    document = (understand.HERE / "document.txt").read_text()
    questions = understand.read_questions(understand.HERE / "questions.tsv", document)
    assert len(questions) == len({question.text for question in questions}) == 40


@pytest.mark.parametrize(
    "line, message",
    [("Who?", "is no question"), ("Who?\t|", "is no question"), ("Who?\tNobody", "'Nobody' is not in the document")],
)
def test_a_line_that_is_no_question_is_named(understand: ModuleType, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.tsv").write_text(f"Where?\there\n{line}\n")
    with pytest.raises(understand.RequestError, match=f"line 2 of .*{message}"):
        understand.read_questions(tmp_path / "q.tsv", "it is here")


def test_questions_are_asked_of_a_server(
    understand: ModuleType, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "doc.txt").write_text("here")
    (tmp_path / "q.tsv").write_text("Where?\there\nWhere now?\tHere|there\n")
    arguments = ["--documents", str(tmp_path / "doc.txt"), "--questions", str(tmp_path / "q.tsv"), "--threads", "1", "--show"]
    assert understand.main([str(bundle), "--against", str(bundle), *arguments, "--json", str(tmp_path / "u.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "u.json").read_text())
    assert "2 questions" in printed and all(len(side) == 2 for side in found["answers"].values())
    assert understand.main([str(bundle), "--documents", str(tmp_path / "none.txt")]) == 2
