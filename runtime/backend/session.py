"""What generation knows of a backend: one call turns new tokens and the caches into logits.

``Session`` and ``Caches`` say all of it. ``onnx`` implements them in ONNX Runtime on the CPU, ``onnx_cuda`` on a GPU,
``engine`` in TensorRT; ``select`` opens the one that fits. Whoever holds a session asks it, and never which of them it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle


class Routes(Protocol):
    """What the routers of one call chose; -1 fills what was not used."""

    @property
    def candidates(self) -> NDArray[np.int32] | None:
        """Level 1's blocks, int32 [B, 1, L, K1]; None where there is no level 1."""

    @property
    def blocks(self) -> NDArray[np.int32]:
        """What each layer's selection heads read, int32 [layers, B, Hs, L, K2]."""

    @property
    def experts(self) -> Mapping[int, NDArray[np.int32]]:
        """{layer: int32 [B, L, k]}."""


@dataclass(frozen=True)
class RouteArrays:
    """``Routes`` in the host's memory."""

    candidates: NDArray[np.int32] | None
    blocks: NDArray[np.int32]
    experts: Mapping[int, NDArray[np.int32]]


class Logits(Protocol):
    """fp32 [B, vocab]: an array, or what stays on a device until it is read and can be made an array (numpy.asarray)."""

    def __getitem__(self, row: int, /) -> Any:
        """One row's, ``RowLogits`` as a sampler takes them."""

    def __array__(self) -> NDArray[np.float32]:
        """All of them."""


class Caches(Protocol):
    """The state of one batch of rows, and the means to extend it."""

    batch: int
    capacity: int
    gives_scores: bool  # whether ``score`` may be called

    @property
    def routes(self) -> Routes | None:
        """Of the last call, overwritten by the next; None where what runs does not give them.

        On a GPU a field costs a copy when it is first read, so statistics sample few of the calls.
        """

    def run(self, input_ids: NDArray[np.int64], past_len: NDArray[np.int32], new_len: NDArray[np.int32]) -> Logits:
        """One call: write the tokens into the caches and return logits [B, vocab] of each row's last valid token.

        input_ids: [B, L], right-padded. past_len, new_len: [B]; past_len + L <= capacity in every row.
        What is returned is overwritten by the next call.
        """

    def score(self, lines: Sequence[int], columns: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, vocab] of n tokens of the last call, each by its row of these caches and its column of input_ids."""

    def rows(self, first: int, count: int) -> Caches:
        """Rows first to first + count - 1 as caches of their own, which share this memory: a call leaves the others alone."""

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Give row ``target`` the first ``tokens`` tokens of row ``source``; what it held there is lost."""

    def read_prefix(self, row: int, tokens: int) -> list[NDArray[Any]]:
        """Copies [1, ...] of what a row's caches hold of its first ``tokens`` tokens, in the order of the graph's state."""

    def write_prefix(self, row: int, parts: Sequence[NDArray[Any]], tokens: int) -> None:
        """Give a row the first ``tokens`` tokens of what ``read_prefix`` returned for as many or more."""

    def reserve(self) -> None:
        """Take the memory of new caches now, where it would otherwise be taken as it is written."""


@dataclass(frozen=True)
class SessionLimits:
    """What a session takes, as it was built and as its device stands.

    fewest_rows, most_rows: of a batch. capacity: most tokens of a row's caches. longest_call: most new tokens of a row in one
    call, such that every shorter call is taken too; 0 where not even a single token is. cache_bytes: memory that caches may
    take now. None: no limit, or none that is known.
    builder, remedy: whose limits these are, and how to have others; "" where only the model and the memory limit anything.
    """

    longest_call: int
    fewest_rows: int = 1
    most_rows: int | None = None
    capacity: int | None = None
    cache_bytes: int | None = None
    builder: str = ""
    remedy: str = ""


class Session(Protocol):
    """An opened bundle. It holds no state between calls, so one session may serve several batches."""

    bundle: Bundle

    @property
    def backend(self) -> str:
        """What runs it, by the name that ``--backend`` has for it: "onnx", "onnx-cuda", "tensorrt" or "tensorrt-rtx"."""

    @property
    def device(self) -> str:
        """Where it runs: "cpu", or "cuda:" and the GPU's number."""

    @property
    def limits(self) -> SessionLimits:
        """What it takes; the memory is looked at anew each time."""

    def allocate(self, batch: int, capacity: int) -> Caches:
        """Zeroed caches for ``batch`` rows of ``capacity`` tokens (a multiple of the bundle's block_size)."""
