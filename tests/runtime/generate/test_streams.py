"""Streamed text is exactly what the tokenizer decodes: every kind of tokenizer, any tokens, cut anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bilevel.runtime.generate.streams import WindowStream
from bilevel.runtime.generate.text import BundleTokenizer, Detokenizer
from tests.support.tokenizers_of_kinds import KINDS, byte_fallback_bpe, byte_level_bpe, end_of_word_bpe, saved

Pair = tuple[Tokenizer, BundleTokenizer]
TEXTS = [
    "😀😀",
    "😀é",
    "你好",
    "日本語",
    "👨‍👩‍👧‍👦",
    "e\u0301\u0327 x",
    " lead",
    "the fox  the",
    "a\ufffdb",
    "🇩🇪🏳️‍🌈",
    "\x00\n\t",
    "",
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return read(request.param, tmp_path_factory.mktemp("tokenizer"))


def read(make: Callable[[], Tokenizer], folder: Path) -> Pair:
    """The library's tokenizer, which is right by definition, and the runtime's."""
    return saved(make(), folder), BundleTokenizer(folder / "tokenizer.json")


def streamed(tokenizer: BundleTokenizer, ids: list[int], prompt: list[int] | None = None) -> str:
    stream = Detokenizer(tokenizer, prompt or [])
    return "".join([*(stream.push(token) for token in ids), stream.flush()])


ANY_IDS = st.lists(st.integers(0, 330), max_size=40)


@given(ANY_IDS)
def test_any_tokens(pair: Pair, ids: list[int]) -> None:
    """Invalid bytes, special tokens and ids that the tokenizer does not know included."""
    assert streamed(pair[1], ids) == pair[0].decode(ids)


@given(st.text(max_size=20))
def test_any_text_cut_anywhere(pair: Pair, text: str) -> None:
    ids = pair[0].encode(text).ids
    for end in range(len(ids) + 1):
        assert streamed(pair[1], ids[:end]) == pair[0].decode(ids[:end])


@pytest.mark.parametrize("text", TEXTS)
def test_known_troubles(pair: Pair, text: str) -> None:
    ids = pair[0].encode(text).ids
    assert streamed(pair[1], ids) == pair[0].decode(ids)


@given(ANY_IDS, ANY_IDS)
def test_behind_a_prompt(pair: Pair, prompt: list[int], ids: list[int]) -> None:
    """Prompt and text are what both decode to, wherever the prompt's last character is whole."""
    start = pair[0].decode(prompt)
    if not start.endswith("\ufffd"):
        whole = pair[0].decode([*prompt, *ids])
        if whole.startswith(start):  # a run of bytes that the text spoils changes the prompt
            assert start + streamed(pair[1], ids, prompt) == whole


def test_the_first_word_keeps_its_space_behind_a_prompt(tmp_path: Path) -> None:
    library, tokenizer = read(byte_fallback_bpe, tmp_path)
    assert streamed(tokenizer, [library.token_to_id("▁the")], library.encode("once").ids) == " the"
    assert streamed(tokenizer, [library.token_to_id("▁the")], [library.token_to_id("<s>")]) == "the"


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
def test_a_character_that_the_prompt_began_is_whole(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    library, tokenizer = read(make, tmp_path)
    ids = library.encode("x日語").ids
    for end in range(len(ids) - 5, len(ids)):
        text = streamed(tokenizer, ids[end:], ids[:end])
        assert text and "x日語".endswith(text)
        assert streamed(tokenizer, [], ids[:end]) == ""


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, end_of_word_bpe])
def test_broken_bytes_take_linear_time(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    library, tokenizer = read(make, tmp_path)
    token = next((t for name in ("Ģ", "<0x80>") if (t := library.token_to_id(name)) is not None), 5)
    seconds = []
    for count in (2_000, 8_000):
        start = time.process_time()
        text = streamed(tokenizer, [token] * count)
        seconds.append(time.process_time() - start)
        if make is not end_of_word_bpe:
            assert text == "\ufffd" * count
    assert seconds[1] < 12 * seconds[0] + 0.05  # 4 times as many; 16 times would be quadratic


@settings(deadline=None)
@given(ANY_IDS)
def test_a_tokens_own_bytes_joined_are_the_text(pair: Pair, ids: list[int]) -> None:
    pieces = pair[1].pieces
    if pieces is None:
        return
    spoken = [token for token in ids if not pieces.is_silent(token)]
    joined = b"".join(pieces.bytes_of(token) for token in spoken).decode("utf-8", "replace")
    text = pair[0].decode(ids)
    if "\ufffd" not in text and not text.startswith("##"):  # a text that begins inside a word shows it
        assert joined.endswith(text) and len(joined) - len(text) <= 1  # the start of a whole text may lose a space


@pytest.mark.parametrize("text", ["a" + "\n" * 60 + "b", " " * 40 + "x", "a\n" * 40 + " " * 70, "a" + " " * 33])
def test_long_runs_of_spaces_by_any_decoder(text: str) -> None:
    """A decoder of no known kind: what is held back may be longer than the window."""

    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(map(chr, ids))

    tokenizer = Letters()
    stream = Detokenizer(tokenizer, [])  # type: ignore[arg-type]
    assert "".join([*(stream.push(token) for token in tokenizer.encode(text)), stream.flush()]) == text


def test_a_long_run_of_spaces_is_decoded_once() -> None:
    """By any decoder: not all of it again for each of its tokens."""
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return "".join(map(chr, ids))

    stream = WindowStream(decode, [])
    text = "a" + " " * 4_000 + "b"
    assert "".join([*(stream.push(ord(letter)) for letter in text), stream.flush()]) == text
    assert decoded < 10 * len(text)
