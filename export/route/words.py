"""Level 1 without training: a word's candidates are the blocks that share its recent words, the rarer the more.

Word vectors are whitened, so that two different words have little in common and a projection of an eighth of the channels
still tells them apart; a word weighs the square root of its inverse document frequency, in query and block, so that a shared
word counts its inverse document frequency. On SmolLM2-135M this finds blocks that hold an answer as well as matching words
exactly does, and better than vectors that were trained to follow the attention (``export/README.md``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.config import ModelConfig, Routing
from bilevel.state import Trace
from bilevel.word_router import WordRouter

WINDOW, WIDTH = 8, 128
_DECAY = 0.9  # of a window's place against the one behind it


def inverse_document_frequency(texts: Iterable[Sequence[int]], vocab_size: int, block_size: int) -> Tensor:
    """fp32 [V]: log(blocks / blocks that hold the word), counted over texts in tokens; a word that is in none counts half."""
    held, blocks = torch.zeros(vocab_size), 0
    for text in texts:
        for block in torch.tensor(text, dtype=torch.int64).split(block_size):
            held[block.unique()] += 1
            blocks += 1
    return (blocks / held.clamp(min=0.5)).log().clamp(min=0)


def whitening(table: Tensor, width: int) -> Tensor:
    """[width, d]: the projection of word vectors [V, d] to their strongest directions, each of them with variance 1."""
    wide = table.double()
    variance, directions = torch.linalg.eigh(wide.mT @ wide / len(wide))
    variance, directions = variance[-width:], directions[:, -width:]
    return (directions / variance.clamp(min=1e-12 * float(variance[-1])).sqrt()).mT.float()


def with_words(routing: Routing, config: ModelConfig, share: float, context: int) -> Routing:
    """``routing`` behind a level 1 that proposes at most ``share`` of the blocks of a context of that many tokens."""
    return dataclasses.replace(
        routing,
        preset="two_level",
        coarse_topk=max(routing.topk, int(share * context / routing.block_size)),
        coarse_local_blocks=routing.local_blocks,
        window=WINDOW,
        route_dim=min(WIDTH, config.hidden_size),
        weighted_words=True,
    )


def fit_words(table: Tensor, texts: Iterable[Sequence[int]], config: ModelConfig) -> dict[str, Tensor]:
    """The parameters of ``WordRouter`` with weighted words. table: word vectors [V, d]; texts: tokens to count words in."""
    routing = config.routing
    projection = whitening(table.float(), routing.route_dim)
    weight = inverse_document_frequency(texts, config.vocab_size, routing.block_size).sqrt()
    return {
        "proj.weight": projection / projection.norm(),
        "query_proj.weight": projection / projection.norm(),
        "word_weight": weight / weight.max().clamp(min=1e-6),
        "window_weight": _DECAY ** torch.arange(routing.window, dtype=torch.float32),
    }


@dataclass(frozen=True)
class WordLevel:
    """Level 1 of a model that is not built: its router and the table of word vectors that it reads."""

    config: ModelConfig
    router: WordRouter
    embed: nn.Embedding

    @classmethod
    def of(cls, config: ModelConfig, words: dict[str, Tensor], table: Tensor) -> WordLevel:
        """config: with preset two_level. words: of ``fit_words``. table: [V, d]."""
        router = WordRouter(config)
        router.load_state_dict(words)
        return cls(config, router.requires_grad_(False), nn.Embedding.from_pretrained(table))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(candidates int32 [1, 1, M, K1] of every word, keys [1, 1, N, Dr] of every block) of a context int64 [M]."""
        seen, past = Trace(), torch.zeros(1, dtype=torch.int32)
        self.router(context[None], past, torch.full_like(past, len(context)), self.embed, None, seen)
        assert seen.candidates is not None and seen.word_block_key is not None
        return seen.candidates, seen.word_block_key

    def queries(self, texts: Tensor, first: int) -> Tensor:
        """[B, 1, L - first, Dr] of the words of texts int64 [B, L] from place ``first`` on."""
        past = torch.full((len(texts),), first, dtype=torch.int32)
        return self.router.query(texts, past, texts.shape[1] - first, self.embed)

    def candidates(self, query: Tensor, unit_key: Tensor, past_len: Tensor) -> Tensor:
        """int32 [B, 1, L, K1] for queries [B, 1, L, Dr] behind ``past_len`` [B] tokens."""
        new_len = torch.full_like(past_len, query.shape[2])
        return ops.coarse_route(query, unit_key, past_len, new_len, **self.config.route_attributes(1))
