"""Sink + window of the same budget, by the routed graph itself: what a choice of blocks has to beat.

A route's score is a dot product with a block's key, NaN counts as -inf, and -inf is never selected (``bilevel/contract.py``).
So the keys of all blocks outside of sink and window are NaN while the graph runs, on both levels; what is left fits the budget
and is read by every head. Nothing else of the model is touched, and the same kernels run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle
from bilevel.bundle.tensors import encode
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.quality.reader import Reader


def window_problem(bundle: Bundle) -> str:
    """Why there is no sink + window of this bundle's budget; "" where there is."""
    if bundle.graph.routes is None:
        return "the bundle has no routes to put a window in the place of"
    routing: Any = bundle.config["routing"]
    if int(routing["topk"]) < sinks(bundle) + 1:
        return f"a budget of {routing['topk']} blocks has no room for a sink and a window"
    return ""


def sinks(bundle: Bundle) -> int:
    """Blocks at the text's start that the window's baseline keeps: what routing always keeps, at least one."""
    return max(int(bundle.config["routing"]["init_blocks"]), 1)


class WindowReader(Reader):
    """Reads sink + window in the routed layers: the first blocks and the most recent ones, ``topk`` in all.

    Runs in ONNX Runtime on the CPU, whose caches lie in the host's memory. A call stays within one block, so that all of its
    tokens have the same window.
    """

    def __init__(self, session: OnnxSession, capacity: int) -> None:
        super().__init__(session, capacity)
        bundle = self.bundle
        self._sinks = sinks(bundle)
        self._recent = int(bundle.config["routing"]["topk"]) - self._sinks
        specs = [spec for spec, _ in bundle.graph.state if "num_blocks" in spec.shape]
        state = session_state(self)
        # Views [num_blocks, ...] of row 0, whichever axis the blocks lie along.
        self._keys = [(np.moveaxis(state[spec.name][0], spec.shape.index("num_blocks") - 1, 0), spec.dtype) for spec in specs]
        self._hidden: dict[int, list[NDArray[Any]]] = {}

    def _room(self) -> int:
        size = self.bundle.block_size
        return min(super()._room(), size - self.past % size)

    def rewind(self, past: int) -> None:
        """See ``Reader.rewind``."""
        # The graph pools these blocks anew when they are read again.
        for block in [block for block in self._hidden if block >= past // self.bundle.block_size]:
            del self._hidden[block]
        super().rewind(past)

    def _call(self, ids: Any) -> NDArray[np.float32]:
        own = self.past // self.bundle.block_size
        for block in range(self._sinks, own):
            is_seen = block > own - self._recent
            if is_seen and block in self._hidden:
                for (keys, _), original in zip(self._keys, self._hidden.pop(block), strict=True):
                    keys[block] = original
            elif not is_seen and block not in self._hidden:
                self._hidden[block] = [keys[block].copy() for keys, _ in self._keys]
                for keys, dtype in self._keys:
                    keys[block] = encode(np.full(keys[block].shape, np.nan, np.float32), dtype)
        return super()._call(ids)


def session_state(reader: Reader) -> dict[str, NDArray[Any]]:
    """The caches' arrays by the names of the graph's inputs."""
    state: dict[str, NDArray[Any]] = reader.caches.state  # type: ignore[attr-defined]
    return state
