"""Rows of a packed cache: one key or value of one head at one token, in 8 or 4 bits, its scales beside its codes.

A row of D numbers in G groups has D * bits / 8 bytes of codes, then two bytes for each group, m and e: the scale m * 2^(e -
120), 128 <= m <= 255. A number is (code - 2^(bits - 1)) * scale, which fp32 holds exactly. 8 bits: a byte is a code. 4 bits:
byte i of a group holds code i in its lower half and code i + D / (2 G) in its upper one. A group whose numbers are all below
2^-100 has m = 0 and counts as zeros; one that holds NaN or an infinity has e = 255 and counts as NaN. Magnitudes above 3.3e38
may become infinite.

Codes and scales in one tensor keep a cache what it was to everybody else: rows along one axis, copied, cut and stored alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import ContractError

FORMATS = {"fp32": 32, "int8": 8, "int4": 4}
BIAS, NOT_FINITE = 120, 255
SMALLEST = 2.0**-100  # groups with no larger number count as zeros
_GROUP = 32  # numbers that share a scale in 4 bits, where a row is made of such groups; in 8 bits all of a row do


@dataclass(frozen=True)
class CacheRows:
    """The layout of rows of ``width`` numbers in ``bits`` bits with ``groups`` scales."""

    width: int
    bits: int
    groups: int

    @classmethod
    def of(cls, form: str, width: int) -> CacheRows:
        """The layout of a format, "int8" or "int4". Raises ContractError."""
        bits = FORMATS[form]
        if bits == 4 and width % 2:
            raise ContractError(f"heads of {width} numbers cannot be cached in 4 bits, two to a byte; use int8")
        return cls(width, bits, width // _GROUP if bits == 4 and width % _GROUP == 0 else 1)

    @classmethod
    def of_bytes(cls, num_bytes: int, width: int) -> CacheRows:
        """The layout whose rows of ``width`` numbers have ``num_bytes`` bytes. Raises ContractError."""
        for form in ("int8", "int4"):
            if (form == "int8" or width % 2 == 0) and (rows := cls.of(form, width)).num_bytes == num_bytes:
                return rows
        raise ContractError(f"a cache of {num_bytes} bytes a row does not hold {width} numbers in 8 or 4 bits; export anew")

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.bits // 8 + 2 * self.groups

    @property
    def attributes(self) -> dict[str, int]:
        """Those of the operators that read and write such rows."""
        return {"bits": self.bits, "groups": self.groups}

    def unpack(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The numbers [..., width] of rows [..., num_bytes]."""
        split = self.width * self.bits // 8
        codes = rows[..., :split].reshape(*rows.shape[:-1], self.groups, -1)
        if self.bits == 4:
            codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
        scales: NDArray[Any] = rows[..., split:].reshape(*rows.shape[:-1], self.groups, 2)
        scale = np.ldexp(scales[..., :1].astype(np.float32), scales[..., 1:].astype(np.int32) - BIAS)
        scale = np.where(scales[..., 1:] == NOT_FINITE, np.float32(np.nan), scale)
        with np.errstate(over="ignore"):
            numbers = (codes.astype(np.float32) - 2 ** (self.bits - 1)) * scale
        return np.asarray(numbers.reshape(*rows.shape[:-1], self.width), np.float32)
