"""The text that facts are hidden in: documentation that every Python carries, or a file of the user's.

Python's own ``help()`` topics are about 460,000 characters of English prose and code. They differ from one Python to the next,
so a report names the Python and the text's SHA-256; ``--text`` takes the same file to every machine.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bilevel.errors import RequestError
from bilevel.runtime.generate.text import decode_utf8

LONGEST_PIECE = 300  # characters: facts stand between pieces, so this is how near to its depth a fact can be put
LEAST = 20_000  # characters: texts of one report shall not be the same all over again
_ENDS = re.compile(r"[.:;!?]\s+|\n\n+")  # what a piece may end with


@dataclass(frozen=True)
class Filler:
    """source: where it is from, in words. sections: parts that stand alone, each as pieces in their order."""

    source: str
    sha256: str
    sections: tuple[tuple[str, ...], ...]

    def pieces(self, rng: random.Random) -> Iterator[str]:
        """Pieces without end: sections in an order that ``rng`` draws, each whole."""
        while True:
            for section in rng.sample(self.sections, len(self.sections)):
                yield from section


def load_filler(path: Path | None = None) -> Filler:
    """The file at ``path``, or Python's help topics. Raises RequestError where there is too little text."""
    if path is None:
        source, sections = f"help topics of Python {platform.python_version()}", _help_topics()
    else:
        source, sections = str(path), decode_utf8(path.read_bytes(), str(path)).split("\n\n\n")
    text = "\n\n\n".join(sections)
    if len(text) < LEAST:
        raise RequestError(f"{source} holds {len(text)} characters, too few to hide facts in; give a text of at least {LEAST}")
    pieces = (tuple(cut(section)) for section in sections)
    return Filler(source, hashlib.sha256(text.encode()).hexdigest(), tuple(piece for piece in pieces if piece))


def _help_topics() -> list[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise RequestError("this Python came without its help topics (pydoc_data); give one: --text FILE") from None
    return [topics[name] for name in sorted(topics)]


def cut(section: str) -> list[str]:
    """A text as pieces of at most about LONGEST_PIECE characters, cut behind sentences; joined, they are the text."""
    section = section.strip() + "\n\n"
    ends = [match.end() for match in _ENDS.finditer(section)]
    pieces, start = [], 0
    for end in [*ends, len(section)]:
        while end - start > 0:
            pieces.append(section[start : min(end, start + LONGEST_PIECE)])
            start += len(pieces[-1])
    return pieces
