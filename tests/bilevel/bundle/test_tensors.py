"""How caches hold numbers: bfloat16 as its bits, which numpy has no type for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bilevel.bundle.tensors import PRECISIONS, decode, encode


def test_bfloat16_bits_are_those_of_ml_dtypes() -> None:
    """Every exponent, both signs, ties to even on both sides, values that round up to a power of two, and to infinity."""
    random = np.random.default_rng(0)
    values = random.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    ties = ((np.arange(2048, dtype=np.uint32) << 16) + 0x3F808000).view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], ties, -ties, [0.0, -0.0, 1.99999, 3.4e38, 1e-40]]).astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    stored = encode(values, "bfloat16")
    assert stored.dtype == np.uint16 and np.array_equal(stored, expected.view(np.uint16))
    assert np.array_equal(decode(stored, "bfloat16"), expected.astype(np.float32))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_encode_takes_any_layout(precision: str) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    assert np.array_equal(decode(encode(values, precision), precision), values)
