"""How a bundle names the tensors of its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SYMBOLS = ("batch", "new_tokens", "capacity", "num_blocks")
PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ElementType:
    """A dtype as numpy stores it, ONNX Runtime's name for it, and its number in ONNX's TensorProto."""

    numpy: np.dtype[Any]
    ort_name: str
    onnx_type: int


# numpy has no bfloat16: its bits travel as uint16.
DTYPES = {
    "float32": ElementType(np.dtype(np.float32), "tensor(float)", 1),
    "float16": ElementType(np.dtype(np.float16), "tensor(float16)", 10),
    "bfloat16": ElementType(np.dtype(np.uint16), "tensor(bfloat16)", 16),
    "uint8": ElementType(np.dtype(np.uint8), "tensor(uint8)", 2),
    "int8": ElementType(np.dtype(np.int8), "tensor(int8)", 3),
    "int32": ElementType(np.dtype(np.int32), "tensor(int32)", 6),
    "int64": ElementType(np.dtype(np.int64), "tensor(int64)", 7),
}
ONNX_DTYPES = {kind.onnx_type: name for name, kind in DTYPES.items()}


def encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Finite fp32 values as an array of ``dtype`` (one of PRECISIONS) holds them; rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype(DTYPES[dtype].numpy)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The fp32 values that an array of ``dtype`` (one of PRECISIONS) holds."""
    if dtype != "bfloat16":
        return stored.astype(np.float32, copy=False)
    return (stored.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the graph: its name, dtype (a key of DTYPES) and shape of numbers and SYMBOLS."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.dtype].numpy.itemsize

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with its symbols replaced by ``sizes``."""
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.shape)

    def num_bytes(self, sizes: Mapping[str, int]) -> int:
        """Memory of the tensor of these sizes."""
        return math.prod(self.resolve(sizes)) * self.itemsize
