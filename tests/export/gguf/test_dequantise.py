"""Every tensor type that is read, against a loop over one block written from ggml's definition of it (``ggml-common.h``,
``ggml-quants.c``)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from bilevel.errors import CheckpointError
from bilevel.export.gguf.dequantise import _CHUNK, read_chunks, read_rows
from bilevel.export.gguf.header import READABLE, GgufTensor

F = np.float32
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(block: bytes, at: int) -> np.float32:
    return F(struct.unpack_from("<e", block, at)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def f32(block: bytes) -> list[np.float32]:
    return [F(struct.unpack("<f", block)[0])]


def f16(block: bytes) -> list[np.float32]:
    return [half(block, 0)]


def bf16(block: bytes) -> list[np.float32]:
    return [F(struct.unpack("<f", b"\0\0" + block)[0])]


def q4_0(block: bytes) -> list[np.float32]:
    d, qs = half(block, 0), block[2:]
    return [d * F((q & 15) - 8) for q in qs] + [d * F((q >> 4) - 8) for q in qs]


def q4_1(block: bytes) -> list[np.float32]:
    d, m, qs = half(block, 0), half(block, 2), block[4:]
    return [d * F(q & 15) + m for q in qs] + [d * F(q >> 4) + m for q in qs]


def fifth_bits(block: bytes, at: int) -> list[int]:
    (bits,) = struct.unpack_from("<I", block, at)
    return [bits >> j & 1 for j in range(32)]


def q5_0(block: bytes) -> list[np.float32]:
    d, high, qs = half(block, 0), fifth_bits(block, 2), block[6:]
    low = [q & 15 for q in qs] + [q >> 4 for q in qs]
    return [d * F((low[j] | high[j] << 4) - 16) for j in range(32)]


def q5_1(block: bytes) -> list[np.float32]:
    d, m, high, qs = half(block, 0), half(block, 2), fifth_bits(block, 4), block[8:]
    low = [q & 15 for q in qs] + [q >> 4 for q in qs]
    return [d * F(low[j] | high[j] << 4) + m for j in range(32)]


def q8_0(block: bytes) -> list[np.float32]:
    d = half(block, 0)
    return [d * F(signed(q)) for q in block[2:]]


def q2_k(block: bytes) -> list[np.float32]:
    scales, qs, d, dmin = block[:16], block[16:80], half(block, 80), half(block, 82)
    values = []
    for index in range(256):
        part, rest = divmod(index, 128)
        shift, column = divmod(rest, 32)
        scale = scales[index // 16]
        quant = qs[part * 32 + column] >> 2 * shift & 3
        values.append(d * F(scale & 15) * F(quant) - dmin * F(scale >> 4))
    return values


def q3_k(block: bytes) -> list[np.float32]:
    mask, qs, packed, d = block[:32], block[32:96], block[96:108], half(block, 108)
    values = []
    for index in range(256):
        part, rest = divmod(index, 128)
        shift, column = divmod(rest, 32)
        group = index // 16
        low = packed[group % 8] >> 4 * (group // 8) & 15
        scale = (low | (packed[8 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32
        quant = (qs[part * 32 + column] >> 2 * shift & 3) - (0 if mask[column] >> (4 * part + shift) & 1 else 4)
        values.append(d * F(scale) * F(quant))
    return values


def scale_and_minimum(packed: bytes, group: int) -> tuple[int, int]:
    """``get_scale_min_k4``: eight 6-bit scales and minima in twelve bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    return (
        packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
        packed[group + 4] >> 4 | packed[group] >> 6 << 4,
    )


def q4_k(block: bytes) -> list[np.float32]:
    d, dmin, packed, qs = half(block, 0), half(block, 2), block[4:16], block[16:]
    values = []
    for index in range(256):
        pair, rest = divmod(index, 64)
        scale, minimum = scale_and_minimum(packed, index // 32)
        quant = qs[pair * 32 + rest % 32] >> 4 * (rest // 32) & 15
        values.append(d * F(scale) * F(quant) - dmin * F(minimum))
    return values


def q5_k(block: bytes) -> list[np.float32]:
    d, dmin, packed, high, qs = half(block, 0), half(block, 2), block[4:16], block[16:48], block[48:]
    values = []
    for index in range(256):
        pair, rest = divmod(index, 64)
        scale, minimum = scale_and_minimum(packed, index // 32)
        low = qs[pair * 32 + rest % 32] >> 4 * (rest // 32) & 15
        quant = low | (high[index % 32] >> index // 32 & 1) << 4
        values.append(d * F(scale) * F(quant) - dmin * F(minimum))
    return values


def q6_k(block: bytes) -> list[np.float32]:
    low, high, scales, d = block[:128], block[128:192], block[192:208], half(block, 208)
    values = []
    for index in range(256):
        part, rest = divmod(index, 128)
        row, column = divmod(rest, 32)
        four = low[part * 64 + column + 32 * (row % 2)] >> 4 * (row // 2) & 15
        two = high[part * 32 + column] >> 2 * row & 3
        values.append(d * F(signed(scales[index // 16])) * F((four | two << 4) - 32))
    return values


def iq4_nl(block: bytes) -> list[np.float32]:
    d, qs = half(block, 0), block[2:]
    return [d * F(_IQ4[q & 15]) for q in qs] + [d * F(_IQ4[q >> 4]) for q in qs]


def iq4_xs(block: bytes) -> list[np.float32]:
    d, (high,), low, qs = half(block, 0), struct.unpack_from("<H", block, 2), block[4:8], block[8:]
    values = []
    for group in range(8):
        scale = (low[group // 2] >> 4 * (group % 2) & 15 | (high >> 2 * group & 3) << 4) - 32
        part = qs[16 * group : 16 * group + 16]
        values += [d * F(scale) * F(_IQ4[q & 15]) for q in part] + [d * F(scale) * F(_IQ4[q >> 4]) for q in part]
    return values


# Type -> (the loop over one block, bytes at which the block holds fp16 numbers).
DEFINITIONS: dict[str, tuple[Callable[[bytes], list[np.float32]], tuple[int, ...]]] = {
    "F32": (f32, ()),
    "F16": (f16, (0,)),
    "BF16": (bf16, ()),
    "Q4_0": (q4_0, (0,)),
    "Q4_1": (q4_1, (0, 2)),
    "Q5_0": (q5_0, (0,)),
    "Q5_1": (q5_1, (0, 2)),
    "Q8_0": (q8_0, (0,)),
    "Q2_K": (q2_k, (80, 82)),
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
    "IQ4_NL": (iq4_nl, (0,)),
    "IQ4_XS": (iq4_xs, (0,)),
}


def stored_tensor(path: Path, kind: str, shape: tuple[int, ...], seed: int = 0) -> tuple[GgufTensor, bytes]:
    """Random blocks in a file, their fp16 numbers finite."""
    draw = np.random.default_rng(seed)
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = int(np.prod(shape)) // size
    if kind in ("F32", "BF16"):
        numbers = draw.standard_normal(count).astype(F).view(np.uint32)
        blocks = (numbers if kind == "F32" else (numbers >> 16).astype(np.uint16)).view(np.uint8).reshape(count, width)
    else:
        blocks = draw.integers(0, 256, (count, width), dtype=np.uint8)
    for at in DEFINITIONS[kind][1]:
        blocks[:, at : at + 2] = draw.standard_normal((count, 1)).astype(np.float16).view(np.uint8)
    path.write_bytes(b"head" + blocks.tobytes())
    tensor = GgufTensor(path, "t", kind, shape, 4, shape[-1] // size * width)
    return tensor, blocks.tobytes()


def test_every_readable_type_has_a_definition() -> None:
    assert set(READABLE) == set(DEFINITIONS)


@pytest.mark.parametrize("kind", READABLE)
def test_equals_the_definition(kind: str, tmp_path: Path) -> None:
    tensor, stored = stored_tensor(tmp_path / "t", kind, (3, 512))
    definition, _ = DEFINITIONS[kind]
    _, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = [stored[begin : begin + width] for begin in range(0, len(stored), width)]
    expected = np.array([value for block in blocks for value in definition(block)], F).reshape(3, 512)
    assert np.array_equal(read_rows(tensor, 0, 3), expected)
    assert np.array_equal(read_rows(tensor, 1, 2), expected[1:2])


@pytest.mark.parametrize("heads, rows", [(1, 8), (2, 4), (4, 6)])
def test_interleaved_rows_are_put_back(heads: int, rows: int, tmp_path: Path) -> None:
    """Rows 2i and 2i+1 of a head in the file are its rows i and i + D/2."""
    tensor, _ = stored_tensor(tmp_path / "t", "Q8_0", (heads * rows, 32))
    stored = read_rows(tensor, 0, heads * rows)
    expected = np.empty_like(stored)
    for head in range(heads):
        for i in range(rows // 2):
            expected[head * rows + i] = stored[head * rows + 2 * i]
            expected[head * rows + i + rows // 2] = stored[head * rows + 2 * i + 1]
    assert np.array_equal(np.concatenate(list(read_chunks(tensor, heads))), expected)


@pytest.mark.parametrize("heads", [0, 3])
def test_a_tensor_of_several_chunks(heads: int, tmp_path: Path) -> None:
    rows = 3 * (_CHUNK // 4096 // 2)
    tensor, _ = stored_tensor(tmp_path / "t", "Q4_0", (rows, 4096))
    chunks = list(read_chunks(tensor, heads))
    assert len(chunks) > 1
    assert np.array_equal(np.concatenate(chunks), read_rows(tensor, 0, rows, heads))


def test_infinite_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"head" + struct.pack("<4f", 1, 2, float("inf"), 4))
    tensor = GgufTensor(tmp_path / "t", "blk.0.attn_q.weight", "F32", (1, 4), 4, 16)
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in blk\.0\.attn_q\.weight; the model is not usable"):
        list(read_chunks(tensor))
