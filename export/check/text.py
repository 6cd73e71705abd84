"""What is checked, and on which text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.config import ModelConfig
from bilevel.errors import RequestError
from bilevel.export.check.judge import Array
from bilevel.export.check.layered import Text

HELD_OUT = "heldout.txt"
LONGEST_ROW, LEAST_TOKENS = 2560, 4096  # of the default text: tokens of its longest row, tokens in all rows
BACKENDS = ("all", "portable", "kernels")
DECODED = 4  # tokens at the end of the text that are read one by one


@dataclass(frozen=True)
class Request:
    """What is checked against what, and on which text.

    tokens: of the first row; a second one is shorter (None: rows of up to LONGEST_ROW tokens, LEAST_TOKENS in all). cuts: sizes
    of the first calls (None: calls that end inside, at and across block borders). row_order: of the rows. backend: which
    executions of the routed nodes are judged: their portable bodies, the CPU kernels, or all that are installed. shrink: where
    something fails, look for the smallest input that shows it.
    """

    bundle: Path
    checkpoint: Path
    data: Path | None = None
    tokens: int | None = None
    cuts: Sequence[int] | None = None
    row_order: Sequence[int] | None = None
    backend: str = "all"
    shrink: bool = True

    def lengths(self, config: ModelConfig) -> list[int]:
        """Tokens of each row."""
        first = self.tokens or min(LONGEST_ROW, config.max_position_embeddings)
        _check_count(first, config)
        rows = [first, first * 3 // 5]
        while self.tokens is None and sum(rows) < LEAST_TOKENS:
            rows.append(first)
        return rows


def token_ids(request: Request, config: ModelConfig) -> tuple[Array, str]:
    """Token ids for all rows, and where they come from: the text that was asked for, the checkpoint's held-out text, or seeded
    noise. A shorter text than the default asks for is taken as it is."""
    most, least = sum(request.lengths(config)), request.lengths(config)[0]
    held_out = request.checkpoint / HELD_OUT
    path = request.data or (held_out if held_out.is_file() else None)
    if path is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, most), "random token ids (seed 0)"
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}); give a text file with --data") from None
    # Enough text for the tokens asked for, without encoding a whole book.
    ids = open_tokenizer(request.bundle).encode(text[: most * 16]).ids[:most]
    if request.tokens is not None and len(ids) < least:
        raise RequestError(
            f"{path} holds only {len(ids)} tokens, but {least} are to be checked; give a longer text or fewer --tokens"
        )
    _check_count(min(len(ids), least), config)
    return np.array(ids, np.int64), str(path)


def open_tokenizer(bundle: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(bundle / "tokenizer.json"))


def _check_count(tokens: int, config: ModelConfig) -> None:
    least = 3 * config.routing.block_size + 8
    if not least <= tokens <= config.max_position_embeddings:
        raise RequestError(
            f"tokens={tokens} must lie between {least} (a few blocks) and {config.max_position_embeddings} "
            "(max_position_embeddings); change --tokens or give a longer text with --data"
        )


def _rows(ids: Array, lengths: list[int]) -> list[Array]:
    """Pieces of the text one after the other; where it ends, rows go over it again, backwards."""
    rows: list[Array] = []
    first = 0
    for length in lengths:
        piece = ids[first : first + length]
        rows.append(piece if len(piece) == length or not rows else ids[::-1][:length])
        first += length
    return rows


def make_text(request: Request, ids: Array, config: ModelConfig, longest: int) -> Text:
    """Rows of different lengths, read in calls that end inside, at and across block borders, in chunks, then one by one."""
    size = config.routing.block_size
    pieces = _rows(ids, request.lengths(config))
    pieces = [pieces[index] for index in request.row_order] if request.row_order is not None else pieces
    lengths = np.array([len(piece) for piece in pieces])
    rows = np.zeros((len(pieces), int(lengths.max())), np.int64)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    sizes = list(request.cuts) if request.cuts is not None else [size + 1, 1, 1, size - 3, 2 * size, 5]
    left = rows.shape[1] - sum(sizes)
    decoded = min(DECODED, max(left - size, 0))
    full, rest = divmod(max(left - decoded, 0), longest)
    sizes += [longest] * full + [rest] + [1] * decoded
    return Text.cut(rows, lengths, [n for n in sizes if n > 0], size, longest, late=True)
