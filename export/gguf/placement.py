"""Every stored tensor -> its place in the checkpoint, by the architecture's tables. Nothing may be left over or missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bilevel.errors import CheckpointError
from bilevel.export.gguf.architectures import Architecture
from bilevel.export.gguf.header import CONVERT, GgufFile, GgufTensor
from bilevel.export.gguf.rope import FOLDER, TABLES
from bilevel.export.gguf.tensors import EMBEDDING, HEAD, Stored, sizes


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a stored tensor; heads: how many heads they are interleaved by, 0 where they lie as they
    should."""

    source: GgufTensor
    start: int
    stop: int
    heads: int = 0


@dataclass(frozen=True)
class Placed:
    """A tensor of the checkpoint, and the stored rows that it is made of, in order."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]


def place(
    file: GgufFile, architecture: Architecture, config: Mapping[str, Any], experts: Mapping[str, int]
) -> Iterator[Placed]:
    """Both sides of the ledger must agree: every tensor of the model is stored, with its shape, and nothing else is.

    experts: the sizes e, x and s of :mod:`bilevel.export.gguf.tensors`; further, lead: how many layers have no experts, and
    unused: how many layers behind the last one predict further tokens, through which no text passes.
    """
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor {EMBEDDING}; {CONVERT}")
    layers, size = config["num_hidden_layers"], sizes(config, experts, file.tensors[EMBEDDING].shape[0])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    skipped = tuple(f"blk.{layers + index}." for index in range(experts["unused"]))
    left = {name for name in file.tensors if name not in TABLES and not name.startswith(skipped)}
    for group in _groups(architecture, config, experts):
        sources = []
        for name, stored in group:
            shape = tuple(size[letter] for letter in stored.shape)
            sources.append(_source(file, name, shape, left))
        stored = group[0][1]
        permuted = heads[stored.heads] if stored.heads and architecture.permuted else 0
        yield from _placed(stored.name, sources, permuted)
    if left:
        raise CheckpointError(
            f"{file.path} stores {min(left)} ({len(left)} such tensors), for which the architecture has no place; {FOLDER}"
        )


def _groups(
    architecture: Architecture, config: Mapping[str, Any], experts: Mapping[str, int]
) -> Iterator[list[tuple[str, Stored]]]:
    """Every tensor that the model has: its name in the file and what it is, those together that are one in the checkpoint."""
    for key, stored in architecture.outer.items():
        if key != HEAD or not config["tie_word_embeddings"]:
            yield [(key, stored)]
    for index in range(config["num_hidden_layers"]):
        mlp = architecture.dense if index < experts["lead"] else architecture.experts
        groups: dict[str, list[tuple[str, Stored]]] = {}
        for key, stored in {**architecture.attention, **mlp}.items():
            if not stored.when or config[stored.when]:
                name = f"model.layers.{index}.{stored.name}"
                groups.setdefault(name, []).append((f"blk.{index}.{key}", Stored(name, stored.shape, stored.heads)))
        yield from groups.values()


def _source(file: GgufFile, name: str, shape: tuple[int, ...], left: set[str]) -> GgufTensor:
    """The stored tensor, struck off ``left``."""
    if name not in left:
        raise CheckpointError(f"{file.path} lacks the tensor {name}, which its metadata calls for; {CONVERT}")
    left.remove(name)
    tensor = file.tensors[name]
    if tensor.shape != shape:
        raise CheckpointError(
            f"{file.path} stores {name} as {list(tensor.shape)}, and its metadata call for {list(shape)}; {CONVERT}"
        )
    return tensor


def _placed(name: str, sources: list[GgufTensor], heads: int) -> Iterator[Placed]:
    """What stored tensors of one name become: one tensor an expert, one of all experts, or the tensor as it is."""
    first = sources[0]
    if "{}" not in name and len(sources) == 1:
        yield Placed(name, first.shape, (Rows(first, 0, first.num_rows, heads),))
        return
    experts = [
        tuple(Rows(source, expert * source.shape[1], (expert + 1) * source.shape[1]) for source in sources)
        for expert in range(first.shape[0])
    ]
    if "{}" in name:
        for expert, rows in enumerate(experts):
            yield Placed(name.format(expert), first.shape[1:], rows)
        return
    height = sum(source.shape[1] for source in sources)
    yield Placed(name, (first.shape[0], height, first.shape[2]), tuple(rows for each in experts for rows in each))
