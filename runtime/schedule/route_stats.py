"""Whether routers still choose: how much they read, how many blocks and experts they hit, how evenly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle
from bilevel.runtime.backend.session import Routes

EVERY = 32  # decode steps between two samples: they cost less than a hundredth of a fast model's time then
_KEPT = 0.98  # of what was counted, at each sample: about the last 50 samples matter


class RouteStats:
    """Running statistics over sampled decode steps.

    A block that has to be read (first, own) is no choice and is not counted as one. Where nothing has been seen yet, or no word
    had a choice, the answer is NaN.
    """

    def __init__(self, bundle: Bundle, capacity: int) -> None:
        assert bundle.graph.routes is not None
        routing, self._size = bundle.config.get("routing", {}), bundle.block_size
        self._init, self._local = int(routing.get("init_blocks", 1)), int(routing.get("local_blocks", 1))
        self.layers, self.expert_layers = bundle.graph.routes.layers, sorted(bundle.graph.routes.experts)
        num_layers, num_blocks = len(self.layers), -(-capacity // self._size)
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        num_experts = int(bundle.config.get("experts", {}).get("num_experts", 0))
        self._read, self._visible = np.zeros(num_layers), 0.0
        self._chosen = np.zeros((num_layers, num_blocks))
        self._open = np.zeros(num_blocks)
        self._experts = {layer: np.zeros(num_experts) for layer in self.expert_layers}
        self._steps = -1

    def sample(self, rows: Sequence[tuple[int, int]], routes: Routes) -> None:
        """Count a decode step, if it is one that is counted.

        rows: (line of ``routes``, position of the word) of each active row.
        """
        self._steps += 1
        if self._steps % EVERY:
            return
        for values in (self._read, self._chosen, self._open, *self._experts.values()):
            values *= _KEPT
        self._visible *= _KEPT
        for line, position in rows:
            self._count(routes.blocks[:, line, :, 0], position)
            for layer, ids in routes.experts.items():
                np.add.at(self._experts[layer], ids[line, 0], 1.0)

    def _count(self, blocks: NDArray[np.int32], position: int) -> None:
        """One word: blocks [routed layers, Hs, K]."""
        num_layers, num_heads = blocks.shape[:2]
        tokens = np.clip(position + 1 - blocks * self._size, 0, self._size)
        self._read += np.where(blocks >= 0, tokens, 0).sum((1, 2)) / num_heads
        self._visible += position + 1
        first, end = self._init, position // self._size + 1 - self._local
        if end <= first:
            return  # every block has to be read
        self._open[first:end] += 1
        layer = np.broadcast_to(np.arange(num_layers)[:, None, None], blocks.shape)
        is_choice = (blocks >= first) & (blocks < end)
        np.add.at(self._chosen, (layer[is_choice], blocks[is_choice]), 1 / num_heads)

    def attended(self, layer: int) -> float:
        """Tokens that a word reads in a routed layer, of those before and including it: 0 to 1."""
        return float(self._read[self._index[layer]] / self._visible) if self._visible else float("nan")

    def blocks_hit(self, layer: int) -> float:
        """Blocks that were chosen lately, of those that could have been: 0 to 1."""
        could = self._open > 1e-3
        return float((self._chosen[self._index[layer]][could] > 1e-6).mean()) if could.any() else float("nan")

    def entropy(self, layer: int) -> float:
        """Entropy of the chosen blocks over that of choosing evenly among those that could be chosen: 0 to about 1."""
        return _ratio(_entropy(self._chosen[self._index[layer]]), _entropy(self._open))

    def experts_hit(self, layer: int) -> float:
        """Experts that were used lately, of all: 0 to 1."""
        counts = self._experts[layer]
        return float((counts > 1e-3).mean()) if counts.any() else float("nan")

    def expert_entropy(self, layer: int) -> float:
        """Entropy of the experts used over that of using all alike: 0 to 1."""
        counts = self._experts[layer]
        return _ratio(_entropy(counts), float(np.log(counts.size))) if counts.any() else float("nan")


def _entropy(counts: NDArray[np.float64]) -> float:
    """In nats; NaN where nothing was counted."""
    total = counts.sum()
    if not total:
        return float("nan")
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())


def _ratio(value: float, most: float) -> float:
    return value / most if most > 0 else float("nan")
