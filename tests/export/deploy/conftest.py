"""Deployment folders of a small bundle, one for every target, without compilers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.export.deploy import folder, libraries
from bilevel.export.deploy.folder import Deployment, deploy
from bilevel.export.deploy.targets import find_target
from bilevel.export.deploy.wheel import wheel_tag
from tests.doubles.bundle import write_bundle
from tests.support.cpu_library import required_library

Deploy = Callable[..., Deployment]


def fake_gpu_library(path: Path, **changes: Any) -> Path:
    """A file that describes itself as a library of GPU kernels for a Jetson Orin."""
    info = {"library": "bilevel kernels", "abi": 1, "target": "aarch64", "architectures": {"87": "12.6"}, "tensorrt": "10.3.0"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF\0GLIBC_2.34\0GLIBCXX_3.4.29\0" + json.dumps({**info, **changes}).encode() + b"\0")
    return path


@pytest.fixture
def without_compilers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cross compiler that copies this machine's library, no Triton, a wheel of no content; what was compiled."""
    compiled: list[str] = []

    def build(target: str, out: Path) -> Path:
        compiled.append(target)
        return Path(shutil.copy(required_library(), out))

    def write(out: Path, machine: str, library: Path | None, glibc: str | None) -> Path:
        path = out / f"bilevel-0.1.0-{wheel_tag(machine, glibc if library else None)}.whl"
        path.write_bytes(b"wheel")
        return path

    monkeypatch.setattr(folder, "write_wheel", write)
    monkeypatch.setattr(libraries, "build_cpu_library", build)
    monkeypatch.setattr(libraries, "build_gpu_library", lambda *_: False)
    return compiled


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    path.mkdir()
    return write_bundle(path)


@pytest.fixture
def deployed(bundle: Path, tmp_path: Path, without_compilers: list[str]) -> Deploy:
    """(target, name of OUT="board", ...) -> what was written beside the bundle."""

    def write(target: str, out: str = "board", python: str | None = None, **options: Any) -> Deployment:
        return deploy(bundle, tmp_path / out, find_target(target, python), **options)

    return write
