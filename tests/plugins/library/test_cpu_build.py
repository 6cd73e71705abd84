"""The CPU library from its sources by a compiler that was named: as `bilevel deploy` makes it for another machine."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from bilevel.errors import KernelError, MissingDependency
from bilevel.plugins.library import build, cpu_build
from bilevel.plugins.library.cpu import instruction_set
from bilevel.plugins.library.cpu_build import build_cpu_library
from bilevel.plugins.library.gpu import needed_versions
from tests.support.cpu_library import required_library


def test_a_compiler_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'kernels.h: error: no such thing' >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        KernelError, match=r"could not build the CPU kernels \(kernels.h: error: no such thing\); install GCC 9"
    ):
        build_cpu_library(platform.machine(), tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    other = {"x86_64": "aarch64", "aarch64": "x86-64"}[platform.machine()]
    with pytest.raises(MissingDependency, match=f"apt install g\\+\\+-{other}-linux-gnu"):
        build_cpu_library(other.replace("-", "_"), tmp_path / "library.so")


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "CSRC", tmp_path)
    monkeypatch.setattr(build, "CSRC", tmp_path)
    with pytest.raises(KernelError, match="holds no sources of the CPU kernels; reinstall bilevel"):
        build_cpu_library(platform.machine(), tmp_path / "library.so")


@pytest.mark.thorough
def test_it_is_the_library_that_pip_builds(tmp_path: Path) -> None:
    installed, built = required_library(), build_cpu_library(platform.machine(), tmp_path / "library.so")
    assert instruction_set(built) == instruction_set(installed)
    assert needed_versions(built) == needed_versions(installed)
