"""Matrices in 8 or 4 bits: every 32 weights along the contraction share a scale and a zero point, as ONNX Runtime's
MatMulNBits has it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.errors import ExportError

BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # weights that share a scale
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Quantised:
    """One matrix in MatMulNBits' layout: codes uint8 [N, blocks, bytes], scales fp32 [N, blocks], zeros uint8 [N, packed].

    Two 4-bit codes share a byte, the first in the lower half. depth: K, the length of the contraction; the last block is
    padded.
    """

    codes: Array
    scales: Array
    zeros: Array
    bits: int
    depth: int

    def dequantise(self) -> Array:
        """The matrix that the numbers stand for: fp32 [K, N]."""
        count, blocks = self.scales.shape
        codes = unpack(self.codes.reshape(count, -1), self.bits).reshape(count, blocks, BLOCK)
        zeros = unpack(self.zeros, self.bits)[:, :blocks, None]
        weight = (codes.astype(np.float32) - zeros) * self.scales[..., None]
        return np.ascontiguousarray(weight.reshape(count, -1)[:, : self.depth].T)


def unpack(packed: Array, bits: int) -> Array:
    """Bytes [N, n] as codes [N, n * 8 / bits], as MatMulNBits packs them."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Importing ONNX Runtime's quantiser sets up the process's root logger; that is undone."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def quantise_matrix(weight: Array, bits: int) -> Quantised:
    """Round fp32 [K, N] to ``bits`` bits in blocks along K. Deterministic: equal weights give equal bytes."""
    with _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    if not np.isfinite(weight).all():
        raise ExportError(
            f"a weight of shape {list(weight.shape)} holds values that are not finite, which have no {bits}-bit form; "
            "export with --weights fp32 or mend the checkpoint"
        )
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
    codes, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight, np.float32))
    return Quantised(codes, scales, zeros, bits, len(weight))
