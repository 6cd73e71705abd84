"""Tokens to text: no character split, nothing lost, stop texts found across pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.errors import RequestError
from bilevel.runtime.generate.text import BundleTokenizer, Detokenizer, StopFilter, TextAssembler, decode_utf8
from tests.doubles.bundle import VOCAB_SIZE, make_tokenizer

MIXED = ["def add(a, b):", "naïve café", "漢字かな交じり文", "🦊👩‍🚀🇩🇪", "é\u0301 \ufffd x", "a"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BundleTokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    make_tokenizer().save(str(path))
    return BundleTokenizer(path)


def test_tokenizer_never_cuts_or_pads_a_prompt(tmp_path: Path) -> None:
    trained = make_tokenizer()
    trained.enable_truncation(2)
    trained.enable_padding(length=9)
    trained.save(str(tmp_path / "tokenizer.json"))
    assert BundleTokenizer(tmp_path / "tokenizer.json").encode("wxyz") == make_tokenizer().encode("wxyz").ids


def pieces_of(tokenizer: BundleTokenizer, ids: Sequence[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", MIXED)
def test_detokenizer_never_splits_a_character(tokenizer: BundleTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_characters_of_several_tokens_arrive_whole(tokenizer: BundleTokenizer) -> None:
    """The test bites only if the fox is spread over tokens: the first of them give no text, the last all of it."""
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    assert pieces_of(tokenizer, ids) == [""] * (len(ids) - 1) + ["😀", ""]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_pieces_joined_are_the_full_decode(tokenizer: BundleTokenizer, ids: list[int]) -> None:
    """Any ids, invalid bytes and special tokens included."""
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text(max_size=30))
def test_pieces_of_any_text_hold_whole_characters(tokenizer: BundleTokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_ascii_is_never_held_back(tokenizer: BundleTokenizer) -> None:
    ids = tokenizer.encode("the lazy fox jumps")
    assert all(pieces_of(tokenizer, ids)[: len(ids)])


def test_detokenizer_keeps_the_space_that_a_decoder_strips_at_the_start() -> None:
    """SentencePiece-style decoders drop a leading space; only the first piece may lose it."""

    class Stripping:
        def encode(self, text: str) -> list[int]:
            raise NotImplementedError

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(f" w{token}" for token in ids).removeprefix(" ")

    stream = Detokenizer(Stripping())
    assert [stream.push(token) for token in (1, 2, 3)] == ["w1", " w2", " w3"]


def test_flush_gives_an_unfinished_character_as_it_is(tokenizer: BundleTokenizer) -> None:
    ids = tokenizer.encode("ok 😀")[:-1]
    assert pieces_of(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == "ok \ufffd"


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]


def run_filter(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    stop_filter = StopFilter(stops)
    text = "".join(stop_filter.push(piece) for piece in pieces)
    return text + stop_filter.flush(), stop_filter.is_stopped


@pytest.mark.parametrize(
    "stops, text, expected",
    [
        (["END"], "one END two", ("one ", True)),
        (["END"], "one EN", ("one EN", False)),
        (["END"], "ENEND", ("EN", True)),
        (["aab"], "aaab", ("a", True)),
        (["\n\n"], "a\nb\n\nc", ("a\nb", True)),
        (["abcd", "bc"], "abcd", ("a", True)),
        (["abc", "c"], "abc", ("", True)),
        ([], "END", ("END", False)),
        (["漢字"], "x漢字y", ("x", True)),
    ],
)
def test_stop_filter(stops: list[str], text: str, expected: tuple[str, bool]) -> None:
    assert run_filter(stops, [text]) == expected
    assert run_filter(stops, list(text)) == expected


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.text("ab", max_size=20), st.lists(st.integers(0, 20)))
def test_stop_filter_does_not_depend_on_the_pieces(stops: list[str], text: str, places: list[int]) -> None:
    found, is_stopped = run_filter(stops, cut(text, places))
    assert (found, is_stopped) == run_filter(stops, [text])
    assert not any(stop in found for stop in stops)
    assert is_stopped == any(stop in text for stop in stops)


def test_stop_filter_holds_back_only_what_may_begin_a_stop() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.push(piece) for piece in ("x", "E", "N", "x", "E")] == ["x", "", "", "ENx", ""]
    assert stop_filter.flush() == "E"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["<x>"], "ab"),  # a special token's name
        (["b<x>c"], "a"),  # which may stand in the middle
        (["b<x>d", "bc"], "a"),  # other stop texts are looked for in what is shown
        (["cd"], "ab"),
        (["<x>c", "d"], "ab"),
        (["<y>"], "abcd"),
        (["<x"], "abcd"),  # no whole name, and the text does not show it
    ],
)
def test_stop_texts_that_name_special_tokens(stops: list[str], expected: str) -> None:
    def run(pieces: list[tuple[str, bool]]) -> str:
        stop_filter = StopFilter(stops, ["<x>", "<y>"])
        return "".join(stop_filter.push(text, hidden) for text, hidden in pieces) + stop_filter.flush()

    assert run([("ab", False), ("<x>", True), ("cd", False)]) == expected
    assert run([("a", False), ("b", False), ("<x>", True), ("c", False), ("d", False)]) == expected


def test_a_special_tokens_name_ends_the_text(tokenizer: BundleTokenizer) -> None:
    ids = [*tokenizer.encode("ab"), *tokenizer.encode("<pad>"), *tokenizer.encode("cd")]
    for stops, text in ((["<pad>"], "ab"), (["b<pad>c"], "a"), ([], "abcd")):
        assembler = TextAssembler(tokenizer, stops)
        for token in ids:
            if assembler.finish_reason is None:
                assembler.push(token)
        assembler.finish_reason or assembler.end("length")
        assert (assembler.text, assembler.finish_reason) == (text, "stop" if stops else "length")


def test_a_stop_text_inside_split_characters_ends_the_text(tokenizer: BundleTokenizer) -> None:
    assembler, pieces = TextAssembler(tokenizer, ["字"]), []
    for token in tokenizer.encode("漢字かな"):
        pieces.append(assembler.push(token))
        if assembler.finish_reason is not None:
            break
    assert ("".join(pieces), assembler.text, assembler.finish_reason) == ("漢", "漢", "stop")


@pytest.mark.parametrize(
    ("text", "stops", "reason", "expected"),
    [
        ("aEN", ["END"], None, ("a", None)),  # what may begin a stop text is held back
        ("aEN", ["END"], "length", ("aEN", "length")),
        ("aEND", ["END"], "length", ("a", "stop")),  # the last token completes it
        ("aEN", ["END"], "eos", ("aE", "eos")),  # the token that ends the text, here N's, has no text of its own
        ("a", [], "length", ("a", "length")),
    ],
)
def test_how_a_text_ends(
    tokenizer: BundleTokenizer, text: str, stops: list[str], reason: str | None, expected: tuple[str, str | None]
) -> None:
    assembler = TextAssembler(tokenizer, stops)
    ids = [token for letter in text for token in tokenizer.encode(letter)]
    pieces = [assembler.push(token, reason if place == len(ids) - 1 else None) for place, token in enumerate(ids)]
    assert (assembler.text, assembler.finish_reason) == expected
    assert "".join(pieces) == assembler.text


def test_what_is_held_back_is_the_end_of_a_cancelled_text(tokenizer: BundleTokenizer) -> None:
    assembler = TextAssembler(tokenizer, ["END"])
    assert [assembler.push(token) for letter in "aE" for token in tokenizer.encode(letter)] == ["a", ""]
    assert (assembler.end("cancelled"), assembler.text, assembler.finish_reason) == ("E", "aE", "cancelled")


def test_decode_utf8() -> None:
    assert decode_utf8("für".encode(), "a.txt") == "für"
    with pytest.raises(RequestError, match="a.txt is not UTF-8: byte 1 is 0xfc"):
        decode_utf8("für".encode("latin-1"), "a.txt")
