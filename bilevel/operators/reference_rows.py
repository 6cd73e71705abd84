"""Rows of packed caches in loops: what ``reference.py`` means by packing and unpacking one."""

from __future__ import annotations

import math

import torch

from bilevel.bundle.cache_rows import BIAS, NOT_FINITE, SMALLEST


def pack_row(numbers: list[float], bits: int, groups: int) -> list[int]:
    """The bytes of one row of a packed cache, whose layout ``bilevel/bundle/cache_rows.py`` describes.

    A group's scale is the least m * 2^k, 128 <= m <= 255, that reaches its largest magnitude (in fp32) with the largest code.
    """
    size, half = len(numbers) // groups, 2 ** (bits - 1)
    codes, scales = [], []
    for first in range(0, len(numbers), size):
        group = numbers[first : first + size]
        finite = all(math.isfinite(x) for x in group)
        peak = max(map(abs, group)) if finite else 0.0
        m, k = 0, 0
        if peak >= SMALLEST:
            least = float(torch.tensor(peak) / (half - 1))
            k = math.frexp(least)[1] - 8
            m = math.ceil(math.ldexp(least, -k))
            m, k = (128, k + 1) if m > 255 else (m, k)
        steps = [round(float(torch.tensor(x) / math.ldexp(m, k))) if m else 0 for x in group]
        whole = [half + step for step in steps]
        codes += whole if bits == 8 else [whole[i] | whole[i + size // 2] << 4 for i in range(size // 2)]
        scales += [m, k + BIAS if m else 0 if finite else NOT_FINITE]
    return codes + scales


def unpack_row(row: list[int], width: int, bits: int, groups: int) -> list[float]:
    """The numbers that one row of a packed cache stands for."""
    size, packed = width // groups, row[: width * bits // 8]
    numbers = []
    for group in range(groups):
        m, e = row[len(packed) + 2 * group : len(packed) + 2 * group + 2]
        scale = math.nan if e == NOT_FINITE else math.ldexp(m, e - BIAS)
        part = packed[group * size * bits // 8 : (group + 1) * size * bits // 8]
        codes = part if bits == 8 else [byte & 15 for byte in part] + [byte >> 4 for byte in part]
        numbers += [(code - 2 ** (bits - 1)) * scale for code in codes]
    return numbers
