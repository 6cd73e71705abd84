"""Texts of random tokens, and greedy decoding through PyTorch's caches."""

from __future__ import annotations

import torch

from bilevel.model import CausalLM
from bilevel.state import DecoderState

VOCAB_SIZE = 101


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy(model: CausalLM, prompt: torch.Tensor, count: int) -> list[list[int]]:
    """``count`` tokens per row, one call for the prompt and one for each further token."""
    block_size = model.config.routing.block_size
    capacity = -(-(prompt.shape[1] + count) // block_size) * block_size
    state = DecoderState.empty(model.config, prompt.shape[0], capacity)
    past_len = torch.zeros(prompt.shape[0], dtype=torch.int32)
    tokens, new = [], prompt
    for _ in range(count):
        new_len = torch.full_like(past_len, new.shape[1])
        logits, state = model.step(new, past_len, new_len, state)
        past_len = past_len + new_len
        new = logits.argmax(-1, keepdim=True)
        tokens.append(new)
    return torch.cat(tokens, dim=1).tolist()
