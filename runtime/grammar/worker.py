"""A process that compiles a stranger's grammar first, to see what it costs: one that takes too long takes it down, no more.

llguidance counts its work, but not all of it: an intersection of a few short patterns compiles for hours. What the worker has
compiled in time is compiled again where it is used, which takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bilevel.bundle.confined import Confined, Limits, Overrun, WorkError
from bilevel.errors import RequestError
from bilevel.runtime.grammar.library import Vocabulary, open_matcher, open_tokenizer
from bilevel.runtime.grammar.sources import one_line

LIMITS = Limits(cpu_seconds=2)


class Worker:
    """The process, started when it is first needed.

    special: {id: name} of the tokens that grammars may name. limits: of one grammar.
    """

    def __init__(self, special: Mapping[int, str], limits: Limits = LIMITS) -> None:
        self._special, self._limits = {str(token): name for token, name in special.items()}, limits
        self._process: Confined | None = None

    def check(self, grammar: str, name: str) -> None:
        """Raises RequestError, naming ``name``, for a grammar that is wrong or takes too long."""
        if self._process is None:
            self._process = Confined(f"{__name__}:open_checker", self._special, self._limits)
        try:
            problem = self._process.ask(grammar)
        except Overrun as error:
            raise RequestError(f"{name} {error} while it was compiled; simplify it") from None
        except WorkError as error:
            problem = error.message
        if problem:
            raise RequestError(f"{name} cannot be followed: {one_line(problem)}")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()


def open_checker(special: Mapping[str, str]) -> Callable[[Any], str]:
    """What the process does: it says what is wrong with a grammar, "" for nothing."""
    names = {int(token): name for token, name in special.items()}
    eos = max((*names, 255)) + 1
    # Single bytes: what compiling costs hardly depends on the vocabulary.
    tokens = [bytes([token]) if token < 256 and token not in names else b"" for token in range(eos + 1)]
    vocabulary = Vocabulary(tokens, {**names, eos: "<eos>"}, eos, lambda text: list(text.encode()))
    tokenizer = open_tokenizer(vocabulary, [eos])

    def check(grammar: str) -> str:
        matcher = open_matcher(tokenizer, grammar)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return str(matcher.get_error())

    return check
