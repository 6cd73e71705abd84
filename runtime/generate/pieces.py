"""A tokenizer's vocabulary as bytes: what each token adds to a text, so that text can be put together token by token.

The decoder of a ``tokenizer.json`` joins tokens in one of three ways, told apart by what it consists of:

    bytes      byte-level BPE: tokens are bytes in GPT-2's alphabet; all of them together are read as UTF-8
    fallback   tokens are texts, but a run of byte tokens <0x00> to <0xFF> is read as UTF-8: every byte of a run that is not
               UTF-8 becomes U+FFFD, so none of it is certain before the run has ended
    texts      tokens are texts, the first one may differ (WordPiece, Metaspace, no decoder at all)

Others (those that look at the following token, or change the joined text) have no ``Pieces``. Joining is the decoders' of
``tokenizers``: decoders/*.rs of its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bilevel.errors import BundleError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "a"  # a token before another one, which that one then does not begin the text


@contextmanager
def contained() -> Iterator[None]:
    """What the library's Rust panics about, which is no ``Exception`` in Python, as a BundleError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"the tokenizer fails on this text ({error}); make the bundle anew with bilevel export") from None


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (Radford et al. 2019, ``bytes_to_unicode`` of GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def byte_level(token: str) -> bytes:
    """The bytes of a token of byte-level BPE; one that is not written in its alphabet (an added token) is text."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


class Pieces:
    """What each token of a ``tokenizers.Tokenizer`` adds to a text.

    kind: "bytes", "fallback" or "texts". names: id -> text of the special tokens, which decoding leaves out. strip: (character,
    how many of them the start of a whole text loses).
    """

    def __init__(self, tokenizer: Any, kind: str, strip: tuple[str, int]) -> None:
        self.kind, self.strip = kind, strip
        added = tokenizer.get_added_tokens_decoder()
        self.names: dict[int, str] = {token: each.content for token, each in added.items() if each.special}
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        self._raw: dict[int, bytes | int | None] = {}
        self._texts: dict[tuple[int, bool], str] = {}

    def raw(self, token: int) -> bytes | int | None:
        """Kinds "bytes" and "fallback": its bytes, or the byte of a byte token; None where it adds nothing."""
        try:
            return self._raw[token]
        except KeyError:
            return self._raw.setdefault(token, self._read(token))

    def text(self, token: int, is_first: bool = False) -> str:
        """Kind "texts": its text. is_first: whether it begins a whole text."""
        key = (token, is_first)
        if key not in self._texts:
            name = self._tokenizer.id_to_token(token)
            self._texts[key] = "" if name is None else self._decode(name, is_first)
        return self._texts[key]

    def is_silent(self, token: int) -> bool:
        """Whether decoding leaves it out: a special token, or an id that the tokenizer does not know."""
        return token in self.names or self._tokenizer.id_to_token(token) is None

    def bytes_of(self, token: int) -> bytes:
        """Its own bytes, which need not be whole characters; those of a special token are its name's."""
        if token in self.names:
            return self.names[token].encode()
        if self.kind == "texts":
            return self.text(token).encode()
        raw = self.raw(token)
        return b"" if raw is None else bytes([raw]) if isinstance(raw, int) else raw

    def _read(self, token: int) -> bytes | int | None:
        name = None if token in self.names else self._tokenizer.id_to_token(token)
        if name is None:
            return None
        if self.kind == "bytes":
            return byte_level(name)
        match = _BYTE_TOKEN.fullmatch(name)
        return int(match[1], 16) if match else self._decode(name, False).encode()

    def _decode(self, name: str, is_first: bool) -> str:
        if self._decoder is None:
            return name if is_first else f" {name}"
        with contained():
            if is_first:
                return str(self._decoder.decode([name]))
            return str(self._decoder.decode([_ANCHOR, name])).removeprefix(_ANCHOR)


def read_pieces(tokenizer: Any) -> Pieces | None:
    """The pieces of a ``tokenizers.Tokenizer``, None where its decoder joins tokens in another way."""
    how = _joining(_parts(tokenizer.decoder))
    return None if how is None else Pieces(tokenizer, *how)


def _parts(decoder: Any) -> list[dict[str, Any]]:
    """A decoder's parts, sequences laid open."""
    settings = None if decoder is None else json.loads(decoder.__getstate__())
    flat: list[dict[str, Any]] = []
    open_parts = [] if settings is None else [settings]
    while open_parts:
        part = open_parts.pop(0)
        if part["type"] == "Sequence":
            open_parts = [*part["decoders"], *open_parts]
        else:
            flat.append(part)
    return flat


def _joining(parts: Sequence[dict[str, Any]]) -> tuple[str, tuple[str, int]] | None:
    """(kind, strip), None where no kind describes these parts."""
    types = [part["type"] for part in parts]
    if types[:1] == ["ByteLevel"] and set(types[1:]) <= {"Fuse"}:
        return "bytes", ("", 0)
    whole = parts[types.index("Fuse") + 1 :] if "Fuse" in types else []  # what works on the joined text
    single = types[: types.index("Fuse")] if "Fuse" in types else types
    if any(part["type"] != "Strip" or part["stop"] for part in whole) or len(whole) > 1:
        return None
    strip = (whole[0]["content"], whole[0]["start"]) if whole else ("", 0)
    if strip[0] == _ANCHOR:
        return None
    if "ByteFallback" in single:
        return ("fallback", strip) if single[-1] == "ByteFallback" and set(single[:-1]) <= {"Replace"} else None
    return ("texts", strip) if set(single) <= {"Replace", "Strip", "Metaspace", "WordPiece"} else None
