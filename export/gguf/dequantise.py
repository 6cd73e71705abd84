"""Weights of a GGUF file as fp32, a few rows at a time; the dequantisation itself is the ``gguf`` package's, which is
llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from bilevel.errors import CheckpointError
from bilevel.export.gguf.header import GgufTensor

_CHUNK = 1 << 21  # weights at a time: 8 MB in fp32, a few times that in between


def read_rows(tensor: GgufTensor, start: int, stop: int, heads: int = 0) -> np.ndarray:
    """Rows ``start`` to ``stop`` as fp32 [rows, last axis]; ``heads``: put rows back that are interleaved by that many
    heads."""
    with tensor.path.open("rb") as handle:
        handle.seek(tensor.offset + start * tensor.row_bytes)
        stored = np.fromfile(handle, np.uint8, (stop - start) * tensor.row_bytes).reshape(stop - start, tensor.row_bytes)
    if heads:
        # llama.cpp turns channels 2i and 2i+1 of a head together, Hugging Face i and i + D/2. Quantised blocks lie within rows.
        order = np.arange(stop - start).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        stored = stored[order]
    weights: np.ndarray = dequantize(stored, GGMLQuantizationType[tensor.kind])
    return weights


def read_chunks(tensor: GgufTensor, heads: int = 0, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Rows ``start`` to ``stop`` (None: all) in order, as fp32, some at a time. Raises CheckpointError for NaN and infinite
    weights.

    heads: by how many heads those rows are interleaved.
    """
    stop = tensor.num_rows if stop is None else stop
    if heads and len(tensor.shape) == 1:
        values = read_rows(tensor, 0, 1).reshape(heads, -1, 2)
        chunks: Iterator[np.ndarray] = iter([values.swapaxes(1, 2).reshape(-1)])
    else:
        rows = max(1, _CHUNK // tensor.shape[-1])
        per_head = (stop - start) // heads if heads else 1
        rows = max(1, rows // per_head) * per_head  # whole heads
        chunks = (
            read_rows(tensor, first, last, (last - first) // per_head if heads else 0)
            for first in range(start, stop, rows)
            for last in (min(first + rows, stop),)
        )
    for weights in chunks:
        if not np.isfinite(weights).all():
            raise CheckpointError(f"{tensor.path} holds NaN or infinite weights in {tensor.name}; the model is not usable")
        yield weights
