"""Several ONNX files of one folder with their weights in one data file, every content once.

The routed graph and its dense twin have the same weights, which would double the bundle. What is equal by content is stored
once; tensors are copied piece by piece, so memory holds none of them whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx

from bilevel.errors import ExportError

DATA_FILE = "model.data"
# ONNX Runtime maps a weight into memory instead of reading it where the weight starts on a page.
ALIGNMENT = 4096
_PIECE = 1 << 20


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    length: int

    def pieces(self) -> Iterator[bytes]:
        """The bytes, at most _PIECE at a time."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            left = self.length
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise ExportError(f"{self.file} ends before the weights that its graph names; export again")
                left -= len(piece)
                yield piece


def share_weights(folder: Path, graphs: Sequence[str]) -> int:
    """Rewrite the external weights of the ONNX files ``graphs`` in ``folder`` into one ``model.data``; returns its bytes.

    The old data files are removed, weights that a graph holds inline stay where they are. Raises ExportError.
    """
    folder = Path(folder)
    models = {name: onnx.load(folder / name, load_external_data=False) for name in graphs}
    partial = folder / f".{DATA_FILE}.partial"
    stored: dict[tuple[bytes, int], int] = {}
    sources: set[Path] = set()
    with partial.open("wb") as data:
        for model in models.values():
            for tensor in model.graph.initializer:
                if tensor.data_location != onnx.TensorProto.EXTERNAL:
                    continue
                place = _place(folder, tensor)
                sources.add(place.file)
                _point_to(tensor, _store(place, data, stored), place.length)
        size = data.tell()
    for source in sources:
        source.unlink()
    os.replace(partial, folder / DATA_FILE)
    for name, model in models.items():
        onnx.save(model, folder / name)
    return size


def _place(folder: Path, tensor: onnx.TensorProto) -> _Place:
    """Where an external tensor lies; ONNX lets a whole file go without offset and length."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / entries["location"]
    offset = int(entries.get("offset", 0))
    return _Place(file, offset, int(entries.get("length", file.stat().st_size - offset)))


def _store(place: _Place, data: BinaryIO, stored: dict[tuple[bytes, int], int]) -> int:
    """The offset of the tensor's content in ``data``, where it is written unless it is there already."""
    digest = hashlib.sha256()
    for piece in place.pieces():
        digest.update(piece)
    key = digest.digest(), place.length
    if key not in stored:
        data.write(bytes(-data.tell() % ALIGNMENT))
        stored[key] = data.tell()
        for piece in place.pieces():
            data.write(piece)
    return stored[key]


def _point_to(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", DATA_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
