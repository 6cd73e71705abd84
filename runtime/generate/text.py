"""Text in and out: bytes to text, text to tokens, and tokens to text as they arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bilevel.errors import BundleError, RequestError, require
from bilevel.folders import check_regular
from bilevel.runtime.generate.literal import MARK, LiteralEncoder, encode_apart
from bilevel.runtime.generate.pieces import Pieces, contained, read_pieces
from bilevel.runtime.generate.stops import StopFilter
from bilevel.runtime.generate.streams import Stream, WindowStream, open_stream


def decode_utf8(data: bytes, source: str) -> str:
    """``data`` as text. Raises RequestError naming ``source`` and the offending byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert it, for example with iconv"
        ) from None


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts around it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; bytes that form no character become U+FFFD."""


class BundleTokenizer:
    """A ``tokenizer.json`` read by Hugging Face ``tokenizers``. Raises BundleError when it cannot be read."""

    def __init__(self, path: Path) -> None:
        tokenizers = require("tokenizers")
        try:
            check_regular(path)
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}); make the bundle anew with bilevel export") from None
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path} cannot be read ({error}); make the bundle anew with bilevel export") from error
        # A prompt is never cut or padded, whatever the tokenizer was trained with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.pieces: Pieces | None = read_pieces(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_names = tuple(each.content for each in added.values())
        self.special: dict[int, str] = {token: each.content for token, each in added.items() if each.special}
        self._literal: LiteralEncoder | None = None
        self._lock = threading.Lock()

    @property
    def longest_token(self) -> int:
        """Characters of the longest token, at least 1: a text of n tokens has at most n times as many."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See ``Tokenizer.encode``. add_special_tokens: False for a text that already holds them, as a rendered chat does."""
        with contained():
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_rendered(self, text: str, seam: str) -> list[int]:
        """Token ids of a rendered chat, no special tokens added.

        seam: a character that breaks the names of tokens which are to be text, and is no part of it; not MARK.
        """
        if seam not in text:
            return self.encode(text, add_special_tokens=False)
        ids = None if MARK in text else self._twin().encode(text, seam)
        return encode_apart(self.encode, text.split(seam)) if ids is None else ids

    def _twin(self) -> LiteralEncoder:
        """Made when it is first needed, once: it takes as long as reading the tokenizer."""
        with self._lock:
            if self._literal is None:
                self._literal = LiteralEncoder(require("tokenizers"), self._tokenizer.to_str(), MARK)
            return self._literal

    def bytes_of(self, token: int) -> bytes:
        """A token's own bytes, which need not be whole characters: a special token's name, none where the id is unknown."""
        if token in self.special:
            return self.special[token].encode()
        return self.decode([token]).encode() if self.pieces is None else self.pieces.bytes_of(token)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        with contained():
            return str(self._tokenizer.decode(list(ids)))


class RenderedEncoder:
    """Encodes what a chat template wrote, to which no special tokens are added."""

    def __init__(self, tokenizer: BundleTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of the text as it stands."""
        return self._tokenizer.encode(text, add_special_tokens=False)


class NoTokenizer:
    """Stands in where only token ids go in and out."""

    def encode(self, text: str) -> list[int]:
        """Raises RequestError."""
        raise RequestError("a prompt of text needs a tokenizer; give token ids, or a tokenizer to Generator")

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""


class Detokenizer:
    """Token ids to text, piece by piece; the pieces joined are ``decode`` of all ids.

    A character may be spread over several tokens, so text is held back until it is certain. prompt: the ids that the text
    stands behind: prompt and pieces joined are ``decode`` of all of them, and the first piece keeps its space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        pieces: Pieces | None = getattr(tokenizer, "pieces", None)
        stream: Stream = WindowStream(tokenizer.decode, prompt) if pieces is None else open_stream(pieces, prompt)
        self.push: Callable[[int], str] = stream.push
        """The text that a token completes."""
        self.flush: Callable[[], str] = stream.flush
        """What was held back, as it is."""


class TextAssembler:
    """One row's text, put together from its tokens, and why it ended: the only place where stop texts and ends of tokens meet.

    text: what is certain so far. finish_reason: None while the text goes on; then "eos", "stop" (a stop text), "length" or
    whatever ``end`` was given. prompt: the ids that the text stands behind.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._special: Mapping[int, str] = getattr(tokenizer, "special", {}) if stops else {}
        self._filter = StopFilter(stops, self._special.values())

    def push(self, token: int, finish_reason: str | None = None) -> str:
        """The text that ``token`` makes certain. finish_reason: why it is the row's last token, None where it is not.

        An end-of-text token has no text; a stop text that the last token completes is the reason in place of the one given.
        """
        if finish_reason == "eos":
            return self.end(finish_reason)
        piece = self._filter.push(self._detokenizer.push(token))
        if token in self._special:
            piece += self._filter.push(self._special[token], is_hidden=True)
        self.text += piece
        if self._filter.is_stopped:
            self.finish_reason = "stop"
        elif finish_reason is not None:
            piece += self.end(finish_reason)
        return piece

    def end(self, reason: str) -> str:
        """What was held back, as no more tokens follow."""
        piece = self._filter.push(self._detokenizer.flush()) + self._filter.flush()
        self.text += piece
        self.finish_reason = reason
        return piece
