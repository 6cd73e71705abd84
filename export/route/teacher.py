"""What the frozen model teaches the gates, one row of tokens at a time, as files: rows are read once and learned from often.

A row costs about 45 MB for 30 layers of 9 heads of 64 channels (4,096 tokens in blocks of 16, 440 words, fp16).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.export.route.rows import Row
from bilevel.export.route.walk import read
from bilevel.model import CausalLM

_WORDS = 64  # whose weights are computed at a time
_FREE = 4  # blocks that a word must at least be able to choose among, beyond those that are forced


def pick_rows(row: Row, config: ModelConfig, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 [S] of the words that teach, and the position that each one's answer stands at (-1: no answer).

    At most half are answers; the others are drawn from all positions that have a choice.
    """
    routing = config.routing
    first = routing.block_size * (routing.init_blocks + routing.local_blocks + _FREE)
    place = {int(a): int(s) for a, s in zip(row.answers, row.sources, strict=True) if a >= first}
    answers = rng.permutation(sorted(place))[: count // 2].astype(int)
    others = np.setdiff1d(np.arange(min(first, len(row.ids) - 1), len(row.ids)), answers)
    drawn = rng.permutation(others)[: count - len(answers)].astype(int)
    rows = np.sort(np.concatenate([answers, drawn]))
    return rows, np.array([place.get(int(position), -1) for position in rows])


def block_peaks(q: Tensor, k: Tensor, rows: Tensor, config: ModelConfig) -> Tensor:
    """[Hkv, S, N]: each block's greatest attention weight, over its tokens and the query heads of the key/value head.

    q: [1, Hq, L, D] and k: [1, Hkv, L, D], rotated; rows: int64 [S], the words whose weights are asked for.
    """
    heads, size = config.num_key_value_heads, config.routing.block_size
    peaks = q.new_zeros(heads, len(rows), k.shape[2] // size, dtype=torch.float32)
    for first in range(0, len(rows), _WORDS):
        part = rows[first : first + _WORDS]
        blocks = int(part.max()) // size + 1  # later ones are the future
        query = q[0, :, part].float().unflatten(0, (heads, -1))
        scores = query @ k[0, :, None, : blocks * size].float().mT * config.attention_scale
        visible = torch.arange(blocks * size, device=rows.device) <= part[:, None]
        weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
        peaks[:, first : first + _WORDS, :blocks] = weights.unflatten(-1, (-1, size)).amax((1, 4))
    return peaks


def pool(plain_k: Tensor, size: int) -> Tensor:
    """[Hkv, N, 3 D]: greatest, least and mean key of each block of keys [1, Hkv, L, D] before rotation."""
    blocks = plain_k[0].float().unflatten(1, (-1, size))
    return torch.cat([blocks.amax(2), blocks.amin(2), blocks.mean(2)], -1)


def lesson(model: CausalLM, config: ModelConfig, row: Row, count: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """What a row teaches: rows, sources int64 [S]; per layer query [Y, Hq, S, D], pooled [Y, Hkv, N, 3 D], peak [Y, Hkv, S, N].

    config: the model's, with the routing section that the gates are trained for.
    """
    picked, sources = pick_rows(row, config, count, rng)
    rows = torch.from_numpy(picked)
    taught: dict[str, list[Tensor]] = {"query": [], "pooled": [], "peak": []}

    def observe(index: int, plain_q: Tensor, plain_k: Tensor, q: Tensor, k: Tensor) -> None:
        taught["query"].append(plain_q[0, :, rows].half())
        taught["pooled"].append(pool(plain_k, config.routing.block_size).half())
        taught["peak"].append(block_peaks(q, k, rows, config).half())

    read(model, torch.from_numpy(row.ids), {}, observe)
    stacked = {name: torch.stack(tensors) for name, tensors in taught.items()}
    return {"rows": rows, "sources": torch.from_numpy(sources), **stacked}


def write_lesson(path: Path, content: dict[str, Tensor]) -> None:
    """Write a file in one step."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, partial)
    partial.replace(path)


def read_lesson(path: Path) -> dict[str, Tensor]:
    """What ``write_lesson`` wrote."""
    return load_file(path)
