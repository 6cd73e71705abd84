"""Which ptxas makes the machine code."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilevel.errors import KernelError, MissingDependency
from bilevel.plugins.launch.tiles import ARCHITECTURES
from bilevel.plugins.library import assemblers
from bilevel.plugins.library.assemblers import Assembler

TOOLS = [Assembler(version, Path("/ptxas")) for version in ((13, 1), (12, 6), (12, 8), (13, 0))]


@pytest.mark.parametrize(
    "arch, cuda, expected",
    [
        (87, "auto", (12, 6)),
        (87, "12", (12, 6)),
        (87, "13", (13, 0)),
        (120, "auto", (13, 0)),
        (120, "12", (12, 8)),
        (110, "auto", (13, 0)),
    ],
)
def test_the_oldest_that_serves(arch: int, cuda: str, expected: tuple[int, int]) -> None:
    assert assemblers.choose(arch, cuda, TOOLS).version == expected


def test_every_architecture_has_a_first_cuda() -> None:
    assert set(assemblers.FIRST_CUDA) == set(ARCHITECTURES)


def test_what_no_assembler_makes_is_refused() -> None:
    with pytest.raises(KernelError, match="CUDA 12 knows no sm_110; build it with --cuda 13"):
        assemblers.choose(110, "12", TOOLS)
    with pytest.raises(
        MissingDependency, match="sm_100 for CUDA 12 takes a ptxas of CUDA 12.8 or later .12.x., .* has 12.6: pip"
    ):
        assemblers.choose(100, "12", TOOLS[1:2])
    with pytest.raises(MissingDependency, match="this machine has none"):
        assemblers.choose(80, "auto", [])


def test_numbers_of_versions() -> None:
    """As the CUDA driver counts, and the PTX that Triton writes for it (PTX manual: 8.5 for CUDA 12.6, 9.1 for CUDA 13.1)."""
    assert [tool.number for tool in TOOLS] == [13010, 12060, 12080, 13000]
    assert [tool.ptx_version for tool in TOOLS] == [91, 85, 87, 90]
    assert Assembler((12, 4), Path("/ptxas")).ptx_version == 84


def test_those_of_this_environment_run() -> None:
    found = assemblers.installed()
    assert found == sorted(found) and {version[0] for version in (tool.version for tool in found)} >= {12, 13}
    assert found[0].version <= (12, 6)  # NVIDIA's wheel, for JetPack 6


def test_what_is_no_assembler_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "ptxas"
    broken.write_text("#!/bin/sh\necho hello\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert broken not in [tool.path for tool in assemblers.installed()]
