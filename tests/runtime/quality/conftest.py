"""A tiny routed model that holds texts of some length."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.bundle import edit_manifest
from tests.support.tiny_models import BLOCK_SIZE, edit_config

POSITIONS, BLOCK, TOPK, COARSE = 1280, BLOCK_SIZE, 3, 6


@pytest.fixture(scope="session")
def long_bundle(exported: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, bundle): two levels, 3 blocks of 4 tokens read, of 6 candidates. Shared: never written to.

    Nothing in the graph depends on how many positions there are, so the bundle that all tests share gets more of them.
    """
    folder = tmp_path_factory.mktemp("long")
    names = ("checkpoint", "bundle")
    checkpoint, bundle = (shutil.copytree(path, folder / name) for path, name in zip(exported("two_level"), names, strict=True))
    edit_config(checkpoint, max_position_embeddings=POSITIONS)

    def lengthen(manifest: dict[str, Any]) -> None:
        manifest["limits"]["max_positions"] = POSITIONS

    edit_manifest(bundle, lengthen)
    return checkpoint, bundle
