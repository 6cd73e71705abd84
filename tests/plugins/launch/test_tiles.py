"""Tile sizes: a pure function that keeps every architecture's limit; nothing here needs Triton or PyTorch."""

from __future__ import annotations

from itertools import product

import pytest

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.machine import SHARED_LIMIT
from bilevel.plugins.launch import tiles

WIDTHS, GROUPS, BLOCKS = [16, 32, 80, 96, 128, 256], [1, 3, 4, 16, 64], [5, 16, 48, 64, 80, 128]


def test_limits_are_nvidias() -> None:
    assert {arch: limit // 1024 for arch, limit in SHARED_LIMIT.items()} == {
        **dict.fromkeys((80, 87), 163),
        **dict.fromkeys((86, 89, 120, 121), 99),
        **dict.fromkeys((90, 100, 103, 110), 227),
    }


@pytest.mark.parametrize("dtype", contract.FLOAT_TYPES)
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_attention_tiles_fit_and_cover(arch: int, dtype: str) -> None:
    for width, group, block_size in product(WIDTHS, GROUPS, BLOCKS):
        if dtype == "float32" and width == 256 and group == 64:
            continue  # refused where it does not fit: tested below
        for make in (tiles.attention_tile, tiles.decode_tile):
            tile = make(width, group, block_size, dtype, arch)
            assert tile == make(width, group, block_size, dtype, arch)
            assert tile.shared <= tiles.shared_limit(arch)
            assert tile.rows >= max(16, group) and tile.depth >= max(16, width) and tile.cols >= 16
            assert all(n & (n - 1) == 0 for n in (tile.rows, tile.cols, tile.depth, tile.warps))


@pytest.mark.parametrize("dtype", contract.FLOAT_TYPES)
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_other_tiles_fit(arch: int, dtype: str) -> None:
    limit = tiles.shared_limit(arch)
    for width, topk in product([*WIDTHS, 4096], [1, 24, 128]):
        assert tiles.route_tile(width, topk, dtype, arch).shared <= limit
        assert tiles.row_tile(width).shared <= limit and tiles.vector_tile(width).shared <= limit
        for matrices, rows in product((1, 2), (16, 64)):
            assert tiles.grouped_tile(width, matrices, rows, dtype, arch).shared <= limit


def test_more_shared_memory_is_used() -> None:
    """The same geometry gets more stages, or more keys a step, where there is room for them."""
    small, large = (tiles.attention_tile(256, 4, 64, "float16", arch) for arch in (86, 90))
    assert small.shared < large.shared and small.cols * small.stages < large.cols * large.stages


def test_steps_leave_little_padding() -> None:
    """Small blocks share a step; a block of 80 tokens takes three steps of 32 rather than two of 64."""
    assert [tiles.attention_tile(64, 1, block, "float16", 80).cols for block in (5, 16, 48, 64, 80, 128)] == [64] * 4 + [32, 64]


def test_depth_of_leaves_little_padding() -> None:
    assert [tiles.depth_of(width, 64) for width in (1, 16, 80, 96, 128, 200)] == [16, 16, 32, 32, 64, 64]
    assert tiles.depth_of(1000, 16) == 16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ContractError, match=r"head_dim=256 in float32 needs 104448 bytes of shared memory; sm_86 has 101376"):
        tiles.attention_tile(256, 64, 64, "float32", 86)
    assert tiles.attention_tile(256, 64, 64, "float32", 80).shared <= tiles.shared_limit(80)


@pytest.mark.parametrize("arch", [75, 88, 122, 0])
def test_unknown_architecture_is_refused(arch: int) -> None:
    with pytest.raises(ContractError, match=rf"no architecture sm_{arch}; take one of sm_80, sm_86, .*, sm_120"):
        tiles.attention_tile(64, 1, 64, "float16", arch)


def test_nearest_architecture_is_not_newer() -> None:
    capabilities = {80: 80, 86: 86, 88: 87, 89: 89, 90: 90, 103: 103, 110: 110, 120: 120, 121: 121, 130: 121}
    assert {found: tiles.nearest_architecture(found) for found in capabilities} == capabilities
    with pytest.raises(ContractError, match=r"need compute capability 8\.0 or newer, not 7\.5"):
        tiles.nearest_architecture(75)
