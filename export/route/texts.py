"""Text to calibrate and train on: the user's files, or what every machine has, the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bilevel.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What is installed, tables of numbers, and the text that ``bilevel quality`` hides its facts in.
_SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
_LARGEST = 1 << 20  # bytes of one file that are read
_LEAST = 400  # characters: shorter files say too little


def library_folder() -> Path:
    """Where this Python keeps the sources of its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_tokenizer(checkpoint: Path) -> Tokenizer:
    """The checkpoint's tokenizer. Raises CheckpointError."""
    from tokenizers import Tokenizer

    path = Path(checkpoint) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} holds no tokenizer.json, which text is read by; write it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return Tokenizer.from_file(str(path))


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts in front of a text: most often one token or none."""
    text = "a"
    whole, plain = (list(tokenizer.encode(text, add_special_tokens=special).ids) for special in (True, False))
    return next((whole[:first] for first in range(len(whole)) if whole[first : first + len(plain)] == plain), [])


def read_documents(sources: Sequence[Path]) -> list[str]:
    """The texts of files and of all files below folders, sorted by the hash of their contents, each once.

    No source: Python's standard library, ``*.py`` alone. Files that are not UTF-8 are passed over. Raises ConfigError.
    """
    texts = {text for path in _files(sources) if (text := _text(path)) is not None and (len(text) >= _LEAST or path in sources)}
    if not texts:
        names = ", ".join(map(str, sources)) or str(library_folder())
        raise ConfigError(f"{names} holds no UTF-8 text of at least {_LEAST} characters; name other files by --text")
    return sorted(texts, key=_digest)


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    if not sources:
        root = library_folder()
        yield from (path for path in sorted(root.rglob("*.py")) if not _SKIPPED & set(path.relative_to(root).parts))
    for source in sources:
        if source.is_dir():
            yield from (path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith("."))
        elif source.is_file():
            yield source
        else:
            raise ConfigError(f"--text {source} is no file and no folder; name text files, or folders of them")


def _text(path: Path) -> str | None:
    with path.open("rb") as file:
        raw = file.read(_LARGEST)
    if b"\0" in raw[:4096]:
        return None
    try:
        return raw.decode("utf-8", errors="strict" if len(raw) < _LARGEST else "ignore")
    except UnicodeDecodeError:
        return None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """Documents for training and, one in eight by the hash of its text, for calibration and evaluation."""
    training: list[str] = []
    heldout: list[str] = []
    for text in documents:
        (heldout if _digest(text)[0] % 8 == 0 else training).append(text)
    if not training or not heldout:  # a single file: its last eighth
        whole = "\n".join([*training, *heldout])
        cut = len(whole) * 7 // 8
        return [whole[:cut]], [whole[cut:]]
    return training, heldout


class Filler:
    """Documents as one endless stream of tokens, each beginning at a random place in a shuffled order."""

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        self._documents, self._tokenizer, self._rng = documents, tokenizer, rng
        self._rest: list[int] = []

    def take(self, count: int) -> list[int]:
        """The next ``count`` tokens."""
        while len(self._rest) < count:
            text = self._documents[int(self._rng.integers(len(self._documents)))]
            first = int(self._rng.integers(max(1, len(text) - 4000))) if len(text) > 8000 else 0
            piece = text[first : first + 4 * max(count, 1000)]
            self._rest += self._tokenizer.encode(piece, add_special_tokens=False).ids or [0]
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken
