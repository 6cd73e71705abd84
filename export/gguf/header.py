"""The head of a GGUF file: its metadata, and where each tensor lies. Little-endian files of versions 2 and 3.

The layout is that of ggml's ``docs/gguf.md``. The names, block sizes and dequantisation of tensor types are the ``gguf``
package's; its own reader is not used here, because it makes one array per string (nine seconds for a vocabulary of 49,152
tokens) and takes the bytes behind a truncated file for what the file lacks.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from bilevel.errors import CheckpointError, short

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # unless general.alignment says otherwise
_MAX_AXES = 4
# GGUF's value types: id -> struct format.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# The tensor types whose weights this package reads. tests/export/gguf holds each against a loop written from its definition.
READABLE = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One stored tensor. shape: as PyTorch orders axes (ggml's reversed). offset: of its first byte in the file ``path``;
    row_bytes: of a row."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of the last axis; quantised blocks never cross them."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself; of a model in parts, all parts' tensors.

    metadata: arrays are lists; 32-bit floats are Python floats of the same value.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def value(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The metadata of ``key``; CheckpointError where it is missing and there is no default, or of another type."""
        if key not in self.metadata:
            if default is None:
                raise CheckpointError(f"{self.path} lacks the metadata {key}; {CONVERT}")
            return default
        value = self.metadata[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            wanted = " or ".join(each.__name__ for each in kinds)
            raise CheckpointError(f"{self.path} gives {key} as {short(value, 60)}, which is no {wanted}; {CONVERT}")
        return value


CONVERT = "convert the model again with llama.cpp's convert_hf_to_gguf.py"


def read_gguf(path: Path) -> GgufFile:
    """Read the head of one GGUF file, be it a model or a part of one.

    Raises CheckpointError for what is truncated, damaged, or stored in an unreadable type.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path} is no GGUF file (it does not begin with {MAGIC.decode()}); give a .gguf file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            reader = _Reader(path, contents)
            metadata, tensors = reader.head()
    return GgufFile(path, metadata, tensors)


class _Reader:
    """A cursor over the mapped file that never reads past its end."""

    def __init__(self, path: Path, contents: mmap.mmap) -> None:
        self.path = path
        self.contents = contents
        self.position = len(MAGIC)

    def head(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self.scalar("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self.path} is GGUF version {version}, and {_VERSIONS} are read (little-endian); {CONVERT}")
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise CheckpointError(f"{self.path} gives {key} twice; {CONVERT}")
            metadata[key] = self.item(self.scalar("I"), key)
        described = [self.description() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path} gives general.alignment={alignment!r}, which is no positive integer; {CONVERT}")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in described:
            if name in tensors:
                raise CheckpointError(f"{self.path} stores the tensor {name} twice; {CONVERT}")
            tensors[name] = self.located(name, shape, kind, start + offset)
        return metadata, tensors

    def take(self, size: int) -> int:
        """Step over ``size`` bytes; returns where they begin."""
        begin = self.position
        if size > len(self.contents) - begin:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: at byte {begin} its head announces {size} more, "
                f"and the file ends at {len(self.contents)}; download it again"
            )
        self.position = begin + size
        return begin

    def scalar(self, form: str) -> Any:
        size = struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{form}", self.contents, self.take(size))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        begin = self.take(size)
        try:
            return self.contents[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path} holds at byte {begin} a string that is not UTF-8; download it again") from None

    def item(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                form = f"<{count}{_SCALARS[inner]}"
                begin = self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
                return list(struct.unpack_from(form, self.contents, begin))
            if inner == _STRING:
                return [self.string() for _ in range(count)]
            kind = inner
        raise CheckpointError(f"{self.path} gives {key} in the value type {kind}, which GGUF does not know; download it again")

    def description(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        axes = self.scalar("I")
        if not 1 <= axes <= _MAX_AXES:
            raise CheckpointError(
                f"{self.path} gives the tensor {name} {axes} axes, and GGUF has 1 to {_MAX_AXES}; download it again"
            )
        shape = tuple(self.scalar("Q") for _ in range(axes))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def located(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        known = {member.value: member for member in GGMLQuantizationType}
        if kind not in known or known[kind].name not in READABLE:
            label = f"{kind} ({known[kind].name})" if kind in known else str(kind)
            raise CheckpointError(
                f"{self.path} stores {name} in the quantisation type {label}, which is not read; "
                f"give a file in {', '.join(READABLE)} (llama.cpp's llama-quantize writes them)"
            )
        block, block_bytes = GGML_QUANT_SIZES[known[kind]]
        if shape[-1] % block:
            raise CheckpointError(
                f"{self.path} stores {name} in rows of {shape[-1]}, no multiple of {block}; download it again"
            )
        tensor = GgufTensor(self.path, name, known[kind].name, shape, offset, shape[-1] // block * block_bytes)
        end = offset + tensor.num_rows * tensor.row_bytes
        if end > len(self.contents):
            raise CheckpointError(
                f"{self.path} is truncated: the tensor {name} ends at byte {end}, the file at {len(self.contents)}; "
                "download it again"
            )
        return tensor


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does, or is named so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or os.read(file.fileno(), len(MAGIC)) == MAGIC
