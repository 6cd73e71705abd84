"""Tile sizes of the Triton kernels: a function of kernel, geometry, data type and GPU architecture (standard library only).

A candidate is taken when its estimated shared memory fits the architecture. The estimates are upper bounds of what Triton
allocates, which ``plugins/library/compile.py`` reads from every compiled variant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bilevel.contract import DTYPE_BYTES
from bilevel.errors import ContractError
from bilevel.machine import SHARED_LIMIT

ARCHITECTURES = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a program's tile, warps that work on it, stages of its loads, shared memory in bytes."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    shared: int


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def shared_limit(arch: int) -> int:
    """Bytes of shared memory for ``arch``, a compute capability as in 87. Raises ContractError."""
    if arch not in SHARED_LIMIT:
        known = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise ContractError(f"the kernels know no architecture sm_{arch}; take one of {known}")
    return SHARED_LIMIT[arch]


def nearest_architecture(capability: int) -> int:
    """The newest known architecture that is not newer than a GPU's compute capability. Raises ContractError."""
    older = [arch for arch in ARCHITECTURES if arch <= capability]
    if not older:
        raise ContractError(f"the kernels need compute capability 8.0 or newer, not {capability // 10}.{capability % 10}")
    return max(older)


def _first_that_fits(candidates: Iterator[Tile], what: str, arch: int) -> Tile:
    limit = shared_limit(arch)
    smallest = None
    for tile in candidates:
        if tile.shared <= limit:
            return tile
        smallest = tile
    needed = smallest.shared if smallest else 0
    raise ContractError(f"{what} needs {needed} bytes of shared memory; sm_{arch} has {limit}: choose smaller sizes")


def depth_of(width: int, most: int) -> int:
    """A power of two from 16 to ``most`` to cut ``width`` into; as little padding as possible."""
    depths = [d for d in (256, 128, 64, 32, 16) if d <= most]
    return min(depths, key=lambda d: (-(-width // d) * (d + 16), -d))


def _cols(block_size: int, depth: int, size: int) -> list[int]:
    """Keys of a step, best first: several small blocks, or the part of a large one that leaves little padding."""
    # fp32 products run without tensor cores, unrolled: larger tiles spill registers.
    most = 64 if size == 2 else 32 if depth <= 128 else 16
    cols = [c for c in (64, 32, 16) if c <= most]
    return cols if block_size <= most else sorted(cols, key=lambda c: (-(-block_size // c) * (c + 16), -c))


def _attention_shared(rows: int, cols: int, depth: int, stages: int, size: int) -> int:
    """Queries, the keys and values that are on their way or in use, one tile of scores, the lists of blocks."""
    return size * depth * (rows + 2 * max(1, stages - 1) * cols) + 4 * rows * cols + 2048


def attention_tile(head_dim: int, group: int, block_size: int, dtype: str, arch: int) -> Tile:
    """``attention_tiles``: rows are positions times the group's heads, cols the keys of a step, depth the padded head dim."""
    size, depth = DTYPE_BYTES[dtype], max(16, power_of_two(head_dim))
    least = max(16, power_of_two(group))

    def candidates() -> Iterator[Tile]:
        for rows in (max(least, 64 if size == 2 else 32), max(least, 16)):
            warps = 8 if rows * depth * size > 64 * 128 * 2 else 4
            for cols in _cols(block_size, depth, size):
                for stages in (3, 2, 1) if size == 2 else (2, 1):
                    yield Tile(rows, cols, depth, warps, stages, _attention_shared(rows, cols, depth, stages, size))

    return _first_that_fits(candidates(), f"attention with head_dim={head_dim} in {dtype}", arch)


def decode_tile(head_dim: int, group: int, block_size: int, dtype: str, arch: int) -> Tile:
    """``attention_split``: rows are the group's heads, padded to what a matrix product takes."""
    size, depth = DTYPE_BYTES[dtype], max(16, power_of_two(head_dim))
    rows = max(16, power_of_two(group))

    def candidates() -> Iterator[Tile]:
        for cols in _cols(block_size, depth, size):
            for stages in (2, 1):
                yield Tile(
                    rows,
                    cols,
                    depth,
                    8 if depth * size > 512 else 4,
                    stages,
                    _attention_shared(rows, cols, depth, stages, size),
                )

    return _first_that_fits(candidates(), f"attention with head_dim={head_dim} in {dtype}", arch)


def route_tile(width: int, topk: int, dtype: str, arch: int) -> Tile:
    """``coarse_route_tiles``: rows are positions, cols blocks, depth a slice of the route dim."""
    size, slots = DTYPE_BYTES[dtype], power_of_two(topk)
    rows = 32 if slots <= 64 else 16

    def candidates() -> Iterator[Tile]:
        for stages in (3, 2, 1):
            depth = depth_of(width, 64 if size == 2 else 32)
            shared = stages * size * depth * (rows + 64) + 8 * rows * max(64, slots)
            yield Tile(rows, 64, depth, 4, stages, shared)

    return _first_that_fits(candidates(), f"routing with topk={topk} in {dtype}", arch)


def select_tile(topk: int) -> Tile:
    """``select_blocks_tiles``: rows are positions, cols scores that are read at a time."""
    slots = power_of_two(topk)
    rows = 16 if slots <= 64 else 8
    return Tile(rows, 64, 1, 4, 2, 8 * 1024 + 8 * rows * max(64, slots))


def row_tile(width: int) -> Tile:
    """``coarse_route_split`` and ``fine_route_rows``: one position, no matrix product, next to no shared memory."""
    return Tile(1, 32, depth_of(width, 64), 1, 2, 8 * 1024)


def grouped_tile(width: int, matrices: int, rows: int, dtype: str, arch: int) -> Tile:
    """``tile_hidden`` (2 matrices), ``tile_output`` (1): rows are pairs of one expert, cols outputs, depth a slice of width."""
    size = DTYPE_BYTES[dtype]

    def candidates() -> Iterator[Tile]:
        for stages in (3, 2, 1):
            depth = depth_of(width, 64 if size == 2 else 32)
            shared = stages * size * depth * (rows + matrices * 64) + 4 * rows * 64
            yield Tile(rows, 64, depth, 4, stages, shared)

    return _first_that_fits(candidates(), f"experts in {dtype}", arch)


def vector_tile(width: int) -> Tile:
    """``pair_hidden`` and ``pair_output``: 16 outputs of one token or pair."""
    return Tile(1, 16, depth_of(width, 128), 4, 2, 8 * 1024)


def small_tile(warps: int) -> Tile:
    """Kernels without a matrix product: shared memory only for sums across warps."""
    return Tile(1, 1, 1, warps, 1, 8 * 1024)
