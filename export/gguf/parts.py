"""A model in one GGUF file, or in the parts that llama.cpp's ``llama-gguf-split`` makes of it: ``name-00001-of-00003.gguf``.

The first part holds the metadata; every part says in ``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of all
parts) where it belongs.
"""

from __future__ import annotations

import re
from pathlib import Path

from bilevel.errors import CheckpointError
from bilevel.export.gguf.header import GgufFile, read_gguf

_NAME = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)
_AGAIN = "download it again, or split the model again with llama-gguf-split"


def read_parts(path: Path) -> GgufFile:
    """The head of the model whose only or first file is ``path``. Raises CheckpointError for a part that is missing or not of
    this model, and what :func:`read_gguf` raises."""
    first = read_gguf(path)
    count = first.value("split.count", int, 0)
    if count <= 1:
        return first
    paths = _paths(first, count)
    tensors = dict(first.tensors)
    for number, part_path in enumerate(paths[1:], start=1):
        if not part_path.is_file():
            raise CheckpointError(
                f"{path} is the first of {count} parts, and {part_path.name} is missing beside it; put all "
                "parts into one folder"
            )
        part = read_gguf(part_path)
        _check_place(part, number, count)
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part_path} stores the tensor {min(twice)}, as an earlier part does; {_AGAIN}")
        tensors |= part.tensors
    if (stated := first.value("split.tensors.count", int, len(tensors))) != len(tensors):
        raise CheckpointError(
            f"{path} gives split.tensors.count={stated}, and its {count} parts store {len(tensors)} tensors; {_AGAIN}"
        )
    return GgufFile(first.path, first.metadata, tensors)


def _paths(first: GgufFile, count: int) -> list[Path]:
    """The names of all parts, from the first one's."""
    number = first.value("split.no", int)
    named = _NAME.fullmatch(first.path.name)
    stem = named.group(1) if named else "model"
    paths = [first.path.with_name(f"{stem}-{part + 1:05d}-of-{count:05d}.gguf") for part in range(count)]
    if number != 0:
        raise CheckpointError(f"{first.path} is part {number + 1} of {count}; give the first one, {paths[0].name}")
    if first.path != paths[0]:
        raise CheckpointError(
            f"{first.path} is the first of {count} parts, which are found by its name; rename it to {paths[0].name}, and the "
            "others likewise"
        )
    return paths


def _check_place(part: GgufFile, number: int, count: int) -> None:
    for key, expected in (("split.no", number), ("split.count", count)):
        if (stated := part.value(key, int)) != expected:
            raise CheckpointError(f"{part.path} gives {key}={stated}, and by its name it is {expected}; {_AGAIN}")
