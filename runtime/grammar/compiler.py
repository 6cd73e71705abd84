"""Grammars compiled for one model's tokens, and the constraint that a row follows.

Whoever asks for a grammar first waits until it was compiled in the worker and here; all others share what was compiled.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import DeadEnd, RequestError
from bilevel.runtime.generate.text import BundleTokenizer
from bilevel.runtime.grammar.library import Vocabulary, open_matcher, open_tokenizer
from bilevel.runtime.grammar.sources import one_line
from bilevel.runtime.grammar.worker import Worker

MOST_CHARACTERS = 256 << 10  # of a grammar, those of all tools together
_MOST_KEPT = 32  # grammars


class Follower:
    """One row's way through a grammar (a ``generate.sampling.Constraint``)."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = np.zeros(-(-vocab_size // 32), np.uint32)
        self._address, self._vocab_size = self._words.ctypes.data, vocab_size

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next, [vocab]. Raises DeadEnd where there is none."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._words.nbytes)
        if self._matcher.is_error() or not self._words.any():
            raise DeadEnd(f"the grammar allows no token here: {one_line(self._matcher.get_error())}")
        return np.unpackbits(self._words.view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """``token``, one of those allowed, has come."""
        self._matcher.consume_token(token)


class Compiled:
    """A grammar that rows may follow, each by a ``Follower`` of its own."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def follow(self) -> Follower:
        """A way through the grammar, at its start."""
        return Follower(self._matcher.deep_copy(), self._vocab_size)


class Compiler:
    """Compiles grammars for one bundle. eos: its end tokens, which a grammar allows where a text is whole.

    May be used from several threads; one grammar is compiled at a time, for the machine has other work.
    """

    def __init__(self, tokenizer: BundleTokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos)
        self._worker = Worker({token: name for token, name in tokenizer.special.items() if token < vocab_size})
        self._library_tokenizer: Any = None
        self._kept: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str, name: str) -> Compiled:
        """``grammar``, of ``sources``, for this model. name: what asks for it, for errors.

        Raises RequestError for a grammar that is wrong, too long, too costly or allows no text, or where the tokens have no
        bytes of their own; MissingDependency where llguidance is not installed.
        """
        if len(grammar) > MOST_CHARACTERS:
            raise RequestError(f"{name} makes a grammar of {len(grammar)} characters, this server takes {MOST_CHARACTERS}")
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = self._compile(grammar, name)
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return self._kept[grammar]

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._worker.close()

    def _compile(self, grammar: str, name: str) -> Compiled:
        if self._library_tokenizer is None:
            self._library_tokenizer = self._open()
        self._worker.check(grammar, name)
        matcher = open_matcher(self._library_tokenizer, grammar)
        compiled = Compiled(matcher, self._vocab_size)
        if matcher.is_error():
            raise RequestError(f"{name} cannot be followed: {one_line(matcher.get_error())}")
        try:
            compiled.follow().allowed()  # also makes what all rows share, here and not in the loop that generates
        except DeadEnd:
            raise RequestError(f"{name} allows no text that this model can write; loosen it") from None
        return compiled

    def _open(self) -> Any:
        tokenizer, special = self._tokenizer, self._tokenizer.special
        if tokenizer.pieces is None or not self._eos:
            why = "has no end token" if not self._eos else "joins tokens in a way of its own"
            raise RequestError(f"this model's tokenizer {why}, so its text cannot be made to follow a grammar")
        tokens = [tokenizer.bytes_of(token) for token in range(self._vocab_size)]
        encode = _ExactEncoder(tokenizer, tokens)
        return open_tokenizer(Vocabulary(tokens, special, self._eos[0], encode), self._eos)


class _ExactEncoder:
    """Text to tokens whose bytes are the text's. Some tokenizers begin a text with a space: Llama 2's, Mistral's."""

    def __init__(self, tokenizer: BundleTokenizer, tokens: Sequence[bytes]) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens
        self._anchor = tokenizer.encode("\n", add_special_tokens=False)
        self._ids = {raw: token for token, raw in enumerate(tokens) if token not in tokenizer.special}
        self._longest = max(map(len, tokens))

    def __call__(self, text: str) -> list[int]:
        wanted = text.encode()
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if self._bytes(ids) == wanted:
            return ids
        ids = self._tokenizer.encode(f"\n{text}", add_special_tokens=False)[len(self._anchor) :]
        return ids if self._bytes(ids) == wanted else self._longest_first(wanted)

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._tokens[token] for token in ids)

    def _longest_first(self, data: bytes) -> list[int]:
        ids: list[int] = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            size = next((size for size in sizes if data[:size] in self._ids), 0)
            if not size:
                return ids  # this vocabulary cannot write it
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids
