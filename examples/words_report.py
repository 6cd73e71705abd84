"""How often words alone find the block that an answer stands in: ``python examples/words_report.py CHECKPOINT``.

Rows of held-out text with facts, lists and copied passages in it (``bilevel.export.route.rows``). For every answer's token the
blocks that may be chosen are ranked by what level 1 compares, and the answer's block counts as found where it is among the best
quarter, or half, of them. Prints one JSON object: kind of comparison -> share found in a quarter and in a half of the blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bilevel.checkpoint import load_model
from bilevel.config import ModelConfig, Routing
from bilevel.errors import BilevelError
from bilevel.export.route import texts
from bilevel.export.route.rows import Row, training_row
from bilevel.export.route.words import WINDOW, WordLevel, fit_words, inverse_document_frequency, with_words
from bilevel.state import Trace

BLOCK_SIZE, LOCAL, SHARES, LEAST = 64, 2, (0.25, 0.5), 4
Scores = Callable[[Row], Tensor]


def exact_match(weight: Tensor) -> Scores:
    """The summed weight [V] of the last words that a block holds."""

    def scores(row: Row) -> Tensor:
        ids, blocks = torch.from_numpy(row.ids), len(row.ids) // BLOCK_SIZE
        held = torch.zeros(blocks, len(weight))
        held[torch.arange(blocks * BLOCK_SIZE) // BLOCK_SIZE, ids[: blocks * BLOCK_SIZE]] = 1
        place = torch.from_numpy(row.answers)[:, None] - torch.arange(WINDOW)
        words = ids[place.clamp(min=0)]
        return torch.einsum("nsw,sw->sn", held[:, words], weight[words])

    return scores


def by_vectors(level: WordLevel) -> Scores:
    """What level 1 compares."""

    def scores(row: Row) -> Tensor:
        ids, seen, past = torch.from_numpy(row.ids)[None], Trace(), torch.zeros(1, dtype=torch.int32)
        level.router(ids, past, torch.full_like(past, ids.shape[1]), level.embed, None, seen)
        assert seen.word_query is not None and seen.word_block_key is not None
        return seen.word_query[0, 0, row.answers] @ seen.word_block_key[0, 0, : ids.shape[1] // BLOCK_SIZE].mT

    return scores


def found(scores: Tensor, row: Row) -> list[list[bool]]:
    """Of each answer that has at least LEAST blocks to choose among: whether its block is among the best share of them."""
    block, own = torch.arange(scores.shape[1]), torch.from_numpy(row.answers)[:, None] // BLOCK_SIZE
    free = (block <= own - LOCAL) & (block >= 1)
    rank = scores.masked_fill(~free, -torch.inf).argsort(-1, descending=True).argsort(-1)
    source = torch.from_numpy(row.sources)[:, None] // BLOCK_SIZE
    asked = (free.sum(-1) >= LEAST) & free.gather(-1, source.clamp(max=scores.shape[1] - 1))[:, 0]
    kept = [rank.gather(-1, source)[:, 0] < (free.sum(-1) * share).ceil() for share in SHARES]
    return torch.stack(kept, -1)[asked].tolist()


def measure(checkpoint: Path, rows: int, length: int) -> dict[str, list[float]]:
    """The report."""
    model, tokenizer = load_model(checkpoint), texts.read_tokenizer(checkpoint)
    training, heldout = texts.split(texts.read_documents(()))
    counted = [tokenizer.encode(text, add_special_tokens=False).ids for text in training[:400]]
    table, config = model.model.embed_tokens.weight.detach(), model.config
    fitted = dataclasses.replace(
        config, routing=with_words(Routing(preset="moba_gqa", local_blocks=LOCAL), config, 0.5, length)
    )
    plain: ModelConfig = dataclasses.replace(config, routing=Routing(window=WINDOW, local_blocks=LOCAL))
    rarity = inverse_document_frequency(counted, config.vocab_size, BLOCK_SIZE)
    kinds: dict[str, Scores] = {
        "chance": lambda row: torch.from_numpy(
            np.random.default_rng(len(row.ids)).random((len(row.answers), length // BLOCK_SIZE))
        ),
        "exact match of words, by rarity": exact_match(rarity),
        "plain word vectors": by_vectors(WordLevel.of(plain, {}, table)),
        "bilevel route --words": by_vectors(WordLevel.of(fitted, fit_words(table, counted, fitted), table)),
    }
    drawn = [training_row(heldout, tokenizer, length, 1, index) for index in range(rows)]
    return {
        name: [round(share, 3) for share in np.mean([x for row in drawn for x in found(scores(row), row)], axis=0).tolist()]
        for name, scores in kinds.items()
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="How often words alone find the block that an answer stands in.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--rows", type=int, default=16, help="rows of text (default 16)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row (default 4096)")
    options = parser.parse_args(arguments)
    try:
        with torch.no_grad():
            report = measure(options.checkpoint, options.rows, options.length - options.length % BLOCK_SIZE)
    except (BilevelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
