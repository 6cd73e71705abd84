"""Level 1 of attention routing: the word-embedding layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ops
from bilevel.config import ModelConfig
from bilevel.operators.precision import wide
from bilevel.state import DecoderState, Trace


def unit(vectors: Tensor) -> Tensor:
    """Vectors divided by their length, in fp32 (fp64 for fp64 vectors)."""
    return F.normalize(wide(vectors), dim=-1)


class WordRouter(nn.Module):
    """Level 1, the word-embedding layer: candidates for every word, once per call, shared by all layers and heads.

    With ê the (projected) word embedding over its length: a word's query is the normalised mean of ê over the last
    ``window`` words, a block's key the normalised mean of ê over its words, and their dot product the score.

    weighted_words: both means are weighted, by a weight of each vocabulary entry and, in the query, one of each place of the
    window (the newest word first); the query's words have a projection of their own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.hidden_size, config.route_dim, bias=False) if config.routing.route_dim else nn.Identity()
        if config.routing.weighted_words:
            self.query_proj = nn.Linear(config.hidden_size, config.route_dim, bias=False)
            self.word_weight = nn.Parameter(torch.ones(config.vocab_size))
            self.window_weight = nn.Parameter(torch.ones(config.routing.window))

    def words(self, ids: Tensor, embed: nn.Embedding, projection: nn.Module) -> Tensor:
        """ê, times the word's weight where words have one: fp32 or fp64 [..., Dr] for ids [...]."""
        words = unit(projection(embed(ids)))
        if not self.config.routing.weighted_words:
            return words
        return words * wide(F.embedding(ids, self.word_weight[:, None]))

    def query(self, token_ids: Tensor, past_len: Tensor, length: int, embed: nn.Embedding) -> Tensor:
        """[B, 1, L, Dr]: normalised mean over the last ``window`` words up to each position; token_ids [B, M]."""
        offset = torch.arange(self.config.routing.window, device=token_ids.device)
        position = past_len[:, None].long() + torch.arange(length, device=token_ids.device)
        index = position[..., None] - offset
        ids = token_ids.gather(1, index.clamp(min=0, max=token_ids.shape[1] - 1).flatten(1)).unflatten(1, (length, -1))
        weighted = self.config.routing.weighted_words
        words = self.words(ids, embed, self.query_proj if weighted else self.proj)
        if weighted:
            words = words * wide(self.window_weight)[:, None]
        words = torch.where((index >= 0)[..., None], words, 0.0)
        return unit(words.sum(2))[:, None].to(embed.weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        past_len: Tensor,
        new_len: Tensor,
        embed: nn.Embedding,
        state: DecoderState | None,
        trace: Trace | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (candidates int32 [B, 1, L, K1], token_ids [B, M], word_block_key [B, 1, N, Dr])."""
        length, size = input_ids.shape[1], self.config.routing.block_size
        if state is None or state.token_ids is None or state.word_block_key is None:
            token_ids, block_key = F.pad(input_ids, (0, -length % size)), None
        else:
            token_ids, block_key = ops.write_cache(state.token_ids, input_ids, past_len), state.word_block_key
        first = torch.div(past_len, size, rounding_mode="floor")
        num_touched = (length + size - 1) // size
        touched = ops.gather_blocks(token_ids[:, None, :, None], first, num_touched, size)[:, 0, :, :, 0]
        pooled = unit(self.words(touched, embed, self.proj).mean(2))[:, None].to(embed.weight.dtype)
        block_key = pooled if block_key is None else ops.write_cache(block_key, pooled, first)
        query = self.query(token_ids, past_len, length, embed)
        candidates = trace.given("candidates") if trace is not None else None
        if candidates is None:
            candidates = ops.coarse_route(query, block_key, past_len, new_len, **self.config.route_attributes(1))
        if trace is not None:
            trace.word_query, trace.word_block_key, trace.candidates = query, block_key, candidates
        return candidates, token_ids, block_key
