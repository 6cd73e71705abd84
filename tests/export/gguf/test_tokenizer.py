"""Tokenizers from GGUF: the ids of transformers' own conversion, and of a slow reading of llama.cpp's definition where that
differs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from bilevel.export.gguf.convert import import_gguf
from bilevel.export.gguf.header import GgufFile
from bilevel.export.gguf.pretokenizers import PRE_TOKENIZERS
from bilevel.export.gguf.tokenizer import make_tokenizer
from tests.support.gguf_files import Metadata, byte_level_vocabulary, random_texts, sentencepiece_vocabulary, write_model

COUNTS = [300, pytest.param(10_000, marks=pytest.mark.real)]
Encode = Callable[[str], list[int]]

# The patterns of llama.cpp's llm_tokenizer_bpe, each applied to the pieces of the one before.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_APOSTROPHES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "qwen2": [rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"],
    "glm4": [rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"],
    "bailingmoe2": [_LING],
    "llama-bpe": [rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"],
}


def own_encode(metadata: Metadata) -> Encode:
    tokenizer, _, _ = make_tokenizer(GgufFile(Path("m.gguf"), metadata, {}))
    return lambda text: list(tokenizer.encode(text).ids)


def their_encode(metadata: Metadata, architecture: str, folder: Path) -> Encode:
    """transformers' AutoTokenizer on a file with this tokenizer; ``architecture``: whose conversion is taken."""
    path = folder / "m.gguf"
    write_model(path, "llama", metadata)
    if architecture == "llama":
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        return lambda text: list(tokenizer.encode(text))
    _, vocabulary, _ = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
    return lambda text: list(backend.encode(text, add_special_tokens=False).ids)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def slow_encode(metadata: Metadata) -> Encode:
    """llama.cpp's definition of a byte-level vocabulary, read off its source as plain loops."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids, letters = {token: index for index, token in enumerate(tokens)}, byte_alphabet()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    whole = sorted((t for t, kind in zip(tokens, types, strict=True) if kind in (2, 3, 4)), key=len, reverse=True)
    pre = metadata["tokenizer.ggml.pre"]

    def split(pieces: list[str], pattern: str) -> list[str]:
        result = []
        for piece in pieces:
            begin = 0
            for match in regex.finditer(pattern, piece):
                result += [piece[begin : match.start()], match.group()]
                begin = match.end()
            result.append(piece[begin:])
        return [piece for piece in result if piece]

    def merge(word: str) -> list[int]:
        symbols = [letters[byte] for byte in word.encode()]
        if pre == "llama-bpe" and "".join(symbols) in ids:
            return [ids["".join(symbols)]]
        while True:
            pairs = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
            if not pairs:
                return [ids[symbol] for symbol in symbols]
            _, at = min(pairs)
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]

    def encode(text: str) -> list[int]:
        result: list[int] = []
        for part in regex.split("(" + "|".join(map(regex.escape, whole)) + ")", text):
            if part in whole:
                result.append(ids[part])
                continue
            pieces = [part] if part else []
            for pattern in PATTERNS[pre]:
                pieces = split(pieces, pattern)
            result += [index for piece in pieces for index in merge(piece)]
        return result

    return encode


def slow_sentencepiece(metadata: Metadata) -> Encode:
    """llama.cpp's definition of a SentencePiece vocabulary: the neighbours whose union scores best are joined, the left ones
    first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: index for index, token in enumerate(tokens)}
    begin = metadata["tokenizer.ggml.bos_token_id"]

    def encode(text: str) -> list[int]:
        result = [begin]
        after_special = True
        for part in regex.split("(<unk>|<s>|</s>)", text):
            if part in ("<unk>", "<s>", "</s>"):
                result.append(ids[part])
                after_special = True
            elif part:
                symbols = list((" " if after_special else "") + part)
                symbols = [symbol.replace(" ", "▁") for symbol in symbols]
                while pairs := [
                    (-scores[ids[left + right]], at)
                    for at, (left, right) in enumerate(itertools.pairwise(symbols))
                    if left + right in ids
                ]:
                    _, at = min(pairs)
                    symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
                for symbol in symbols:
                    result += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return result

    return encode


def differing(first: Encode, second: Encode, texts: list[str]) -> list[str]:
    return [text for text in texts if first(text) != second(text)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "tekken", "gpt-4o"])
def test_byte_level_ids_equal_those_of_transformers(pre: str, count: int, tmp_path: Path) -> None:
    metadata = byte_level_vocabulary(pre)
    texts = [*random_texts(count), "<|im_start|>user\nHi <tool_call> <|im_end|>\n"]
    assert differing(own_encode(metadata), their_encode(metadata, "llama", tmp_path), texts) == []


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("pre", PATTERNS)
def test_byte_level_ids_equal_the_definition(pre: str, count: int) -> None:
    metadata = byte_level_vocabulary(pre)
    texts = [*random_texts(count, seed=1), "<|im_start|>user\nHi <tool call> <tool_call><|im_end|>\n", "  12  345 x  6"]
    assert differing(own_encode(metadata), slow_encode(metadata), texts) == []


@pytest.mark.parametrize("count", COUNTS)
def test_transformers_does_not_cut_digits_apart_for_smollm(count: int, tmp_path: Path) -> None:
    """Its conversion takes GPT-2's rule for every rule that it does not list: it differs from the definition, at digits and
    nowhere else."""
    metadata = byte_level_vocabulary("smollm")
    texts = random_texts(count, seed=2)
    other = differing(own_encode(metadata), their_encode(metadata, "llama", tmp_path), texts)
    assert other and all(any(letter.isnumeric() for letter in text) for text in other)
    assert differing(own_encode(metadata), slow_encode(metadata), other) == []


@pytest.mark.parametrize("count", COUNTS)
def test_sentencepiece_ids_equal_those_of_transformers(count: int, tmp_path: Path) -> None:
    """Its conversion for Llama leaves out the space before a text that begins with one, which SentencePiece and llama.cpp
    add; its conversion for Phi-3, of the same vocabulary, adds it."""
    metadata = sentencepiece_vocabulary()
    own, llama = own_encode(metadata), their_encode(metadata, "llama", tmp_path)
    phi3 = their_encode(metadata, "phi3", tmp_path)
    texts = random_texts(count, seed=3)
    assert differing(own, lambda text: [1, *phi3(text)], texts) == []
    assert differing(own, llama, [text for text in texts if not text.startswith(" ")]) == []


@pytest.mark.parametrize("count", COUNTS)
def test_sentencepiece_ids_equal_the_definition(count: int) -> None:
    metadata = sentencepiece_vocabulary()
    texts = [*random_texts(count, seed=4), "a<s> b</s>  c", "<unk>x"]
    assert differing(own_encode(metadata), slow_sentencepiece(metadata), texts) == []


@pytest.mark.parametrize("metadata", [byte_level_vocabulary("qwen2"), sentencepiece_vocabulary()], ids=["gpt2", "llama"])
def test_what_was_encoded_is_decoded(metadata: Metadata) -> None:
    tokenizer, _, _ = make_tokenizer(GgufFile(Path("m.gguf"), metadata, {}))
    for text in random_texts(200, seed=5):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    "begins, ends, expected",
    [(True, True, [1, None, 2]), (True, False, [1, None]), (False, True, [None, 2]), (False, False, [None])],
)
def test_begin_and_end_are_added_as_the_file_says(begins: bool, ends: bool, expected: list[int | None]) -> None:
    added = {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    plain = own_encode(byte_level_vocabulary("qwen2"))("fox")
    ids = own_encode({**byte_level_vocabulary("qwen2"), **added})("fox")
    assert ids == [index for part in expected for index in (plain if part is None else [part])]


@pytest.mark.parametrize(
    "kind, default", [("gpt-2", False), ("qwen2", False), ("llama-bpe", True), ("tekken", True), ("sentencepiece", True)]
)
def test_begin_token_where_the_file_says_nothing(kind: str, default: bool) -> None:
    """llama.cpp's default hangs on the kind of vocabulary."""
    metadata = sentencepiece_vocabulary() if kind == "sentencepiece" else byte_level_vocabulary(kind)
    del metadata["tokenizer.ggml.add_bos_token"]
    assert (own_encode(metadata)("fox")[0] == 1) is default


def test_no_space_is_put_before_a_text_where_the_file_says_so() -> None:
    metadata = {**sentencepiece_vocabulary(), "tokenizer.ggml.add_space_prefix": False}
    tokenizer, _, _ = make_tokenizer(GgufFile(Path("m.gguf"), metadata, {}))
    assert tokenizer.encode("lazy dog", add_special_tokens=False).tokens[0][0] == "l"
    assert tokenizer.decode(tokenizer.encode(" lazy dog").ids) == " lazy dog"


def test_special_tokens_are_left_out_of_text_and_user_tokens_are_not() -> None:
    tokenizer, _, _ = make_tokenizer(GgufFile(Path("m.gguf"), byte_level_vocabulary("qwen2"), {}))
    assert tokenizer.decode(tokenizer.encode("<|im_start|>a <tool call> b<|im_end|>").ids) == "a <tool call> b"


def test_several_chat_templates(tmp_path: Path) -> None:
    metadata = {**byte_level_vocabulary("qwen2"), "tokenizer.chat_template.tool_use": "tools"}
    write_model(tmp_path / "m.gguf", "llama", metadata)
    import_gguf(tmp_path / "m.gguf", tmp_path / "checkpoint")
    settings: Any = json.loads((tmp_path / "checkpoint" / "tokenizer_config.json").read_text())
    default = metadata["tokenizer.chat_template"]
    assert settings["chat_template"] == [{"name": "default", "template": default}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize("metadata", [byte_level_vocabulary("qwen2"), sentencepiece_vocabulary()], ids=["gpt2", "llama"])
def test_the_folder_is_read_by_transformers_with_equal_ids_and_chat(metadata: Metadata, tmp_path: Path) -> None:
    metadata = {
        **metadata,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    write_model(tmp_path / "m.gguf", "llama", metadata)
    import_gguf(tmp_path / "m.gguf", tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert differing(own_encode(metadata), lambda text: list(tokenizer.encode(text)), random_texts(200, seed=6)) == []
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == f"{metadata['tokenizer.ggml.tokens'][1]}hello"


def test_every_rule_that_is_tested_is_known() -> None:
    assert PATTERNS.keys() <= PRE_TOKENIZERS.keys()
