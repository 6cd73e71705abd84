"""Tokens to text, piece by piece, by how a tokenizer joins its tokens (``pieces``)."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from bilevel.runtime.generate.pieces import Pieces

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not (yet) a character
_CONTEXT = 8  # tokens of a prompt that a text is decoded behind


class Stream(Protocol):
    """The text of tokens as they come."""

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain."""

    def flush(self) -> str:
        """What was held back, as it is."""


def open_stream(pieces: Pieces, prompt: Sequence[int] = ()) -> Stream:
    """The stream of a tokenizer's kind, for a text behind ``prompt``."""
    if pieces.kind == "bytes":
        return ByteStream(pieces, prompt)
    return FallbackStream(pieces, prompt) if pieces.kind == "fallback" else TextStream(pieces, prompt)


class ByteStream:
    """Kind "bytes". What waits is at most the beginning of one character; the bytes of the prompt's last one count."""

    def __init__(self, pieces: Pieces, prompt: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_begun = False  # whether a token of the text itself has come
        tail = b""
        for token in reversed(prompt):
            tail = pieces.bytes_of(token) + tail if token not in pieces.names else tail
            if len(tail) >= 3:  # the beginning of a character is no longer
                break
        self._decoder.decode(tail)

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        raw = self._pieces.raw(token)
        if not raw:
            return ""
        self._is_begun = True
        return self._decoder.decode(raw)  # type: ignore[arg-type]

    def flush(self) -> str:
        """What was held back, as it is."""
        rest = self._decoder.decode(b"", True)
        return rest if self._is_begun else ""


class _Strip:
    """Takes the first characters off a text, as the part Strip of a decoder does."""

    def __init__(self, strip: tuple[str, int]) -> None:
        self._character, self._most = strip

    @property
    def is_done(self) -> bool:
        """Whether nothing is taken off any more."""
        return not self._most

    def __call__(self, text: str) -> str:
        if self._most and text:
            length = 0
            while length < min(self._most, len(text)) and text[length] == self._character:
                length += 1
            self._most = self._most - length if length == len(text) else 0
            text = text[length:]
        return text


class FallbackStream:
    """Kind "fallback". A run of byte tokens waits until it has ended, for a byte that is not UTF-8 spoils all of it."""

    def __init__(self, pieces: Pieces, prompt: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._strip = _Strip(pieces.strip)
        self._run = bytearray()
        place = len(prompt)
        while place and not isinstance(raw := pieces.raw(prompt[place - 1]), bytes):
            place -= 1
            if raw is not None:
                self._run.insert(0, raw)
        for token in prompt[:place]:
            if self._strip.is_done:
                break
            raw = pieces.raw(token)
            self._strip((bytes([raw]) if isinstance(raw, int) else raw or b"").decode("utf-8", "replace"))
        self._num_prompt = len(self._run)  # bytes of the run that are the prompt's

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain."""
        raw = self._pieces.raw(token)
        if raw is None:
            return ""
        if isinstance(raw, int):
            self._run.append(raw)
            return ""
        return self.flush() + self._strip(raw.decode())

    def flush(self) -> str:
        """What was held back, as it is."""
        run, start = bytes(self._run), self._num_prompt
        self._run.clear()
        self._num_prompt = 0
        if not run:
            return ""
        whole = _characters(run[:start])
        self._strip(run[:whole].decode())
        if start == len(run):
            return ""
        try:
            return self._strip(run[whole:].decode())
        except UnicodeDecodeError:
            return self._strip(REPLACEMENT * (len(run) - start))


def _characters(data: bytes) -> int:
    """Bytes at the start of ``data`` that are whole characters."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


class TextStream:
    """Kind "texts". Nothing waits."""

    def __init__(self, pieces: Pieces, prompt: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._strip = _Strip(pieces.strip)
        self._is_first = True
        for token in prompt:
            self.push(token)
            if not self._is_first and self._strip.is_done:
                break

    def push(self, token: int) -> str:
        """The text of ``token``."""
        pieces = self._pieces
        if pieces.is_silent(token):
            return ""
        text = self._strip(pieces.text(token, self._is_first))
        self._is_first = False
        return text

    def flush(self) -> str:
        """Nothing."""
        return ""


class WindowStream:
    """Any decoder, by decoding a few tokens again and again: text waits while what follows may still change it.

    That is the replacement character at its end and, where a decoder looks at the last token, the space there. Only the
    tokens since the last certain end are decoded again, behind those of the piece before them, because some decoders treat
    the start of a text differently.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(prompt[-_CONTEXT:])
        self._pending: list[int] = []
        self._ends_in_space = False
        self._num_emitted = len(decode(self._context)) if prompt else 0  # characters of decode(context + pending) that are out

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        self._pending.append(token)
        if self._ends_in_space and not self._decode([token]).strip():
            return ""  # more of the space that waits already: decoding all of it for each token would take quadratic time
        text = self._decode(self._context + self._pending)
        num_space = len(text) - len(text.rstrip())
        self._ends_in_space = num_space > 0
        # A character has at most 4 bytes, so at most 3 replacements can still change.
        num_open = num_space or min(3, len(text) - len(text.rstrip(REPLACEMENT)))
        piece = self._emit(text, len(text) - num_open)
        if (piece and not num_open) or len(self._pending) >= 4 * _CONTEXT:
            context = self._pending[-2 * _CONTEXT :]
            num_emitted = len(self._decode(context)) - num_open
            if num_emitted >= 0:  # else what is held back is longer than the context: a run of spaces goes on
                self._context, self._pending, self._num_emitted = context, [], num_emitted
        return piece

    def flush(self) -> str:
        """What was held back, as it is."""
        text = self._decode(self._context + self._pending)
        return self._emit(text, len(text))

    def _emit(self, text: str, end: int) -> str:
        piece = text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        return piece
