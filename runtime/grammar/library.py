"""llguidance as this package uses it: a vocabulary for it, and the limits of what one grammar may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bilevel.errors import require


class Vocabulary:
    """A vocabulary in the form that ``llguidance.TokenizerWrapper`` reads.

    tokens: the bytes that each token adds to a text. special: {id: name} of the tokens that add nothing to it, which a grammar
    names by id. encode: text to ids; llguidance uses it to look for a token's usual place.
    """

    bos_token_id: int | None = None

    def __init__(
        self, tokens: Sequence[bytes], special: Mapping[int, str], eos: int, encode: Callable[[str], Sequence[int]]
    ) -> None:
        self.tokens = [special[token].encode() if token in special else raw for token, raw in enumerate(tokens)]
        self.special_token_ids = [token for token in special if token < len(tokens)]
        self.eos_token_id, self._encode = eos, encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text, not bytes")  # llguidance tries which of them is taken
        return list(self._encode(text))


def open_tokenizer(vocabulary: Vocabulary, eos: Sequence[int]) -> Any:
    """An ``llguidance.LLTokenizer``. eos: the tokens that end a text, at least one."""
    library = require("llguidance")
    return library.LLTokenizer(library.TokenizerWrapper(vocabulary), n_vocab=len(vocabulary.tokens), eos_token=list(eos))


def open_matcher(tokenizer: Any, grammar: str) -> Any:
    """An ``llguidance.LLMatcher``; what is wrong with the grammar is its ``get_error()``."""
    library = require("llguidance")
    # About 8 ms for a step at worst, and some tens of MB for a grammar. "fuel" is llguidance's own count of work.
    limits = library.LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )
    return library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
