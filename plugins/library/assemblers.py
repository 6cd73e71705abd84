"""NVIDIA's assembler ``ptxas``, in the version that suits a GPU and its driver (standard library only).

A driver loads machine code of its own major version of CUDA and of earlier ones, so the oldest assembler that knows an
architecture serves most drivers. JetPack 6 has CUDA 12.6; Thor (sm_110) came with CUDA 13.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bilevel.errors import KernelError, MissingDependency

# The first CUDA whose assembler makes code for an architecture (CUDA release notes); 8.x and 9.0 are older than CUDA 12.
FIRST_CUDA = {80: (12, 0), 86: (12, 0), 87: (12, 0), 89: (12, 0), 90: (12, 0), 100: (12, 8)}
FIRST_CUDA |= {103: (12, 9), 110: (13, 0), 120: (12, 8), 121: (12, 9)}
CHOICES = ("auto", "12", "13")


@dataclass(frozen=True, order=True)
class Assembler:
    """A ptxas and its version of CUDA."""

    version: tuple[int, int]
    path: Path

    @property
    def number(self) -> int:
        """The version as the driver counts: 12060."""
        return 1000 * self.version[0] + 10 * self.version[1]

    @property
    def ptx_version(self) -> int:
        """The newest PTX that it reads, as in 85 for CUDA 12.6 (NVIDIA's PTX manual, release notes)."""
        major, minor = self.version
        return (80 + minor if minor < 6 else 79 + minor) if major == 12 else 90 + minor


def _candidates() -> Iterator[Path]:
    """Where assemblers lie: NVIDIA's wheels, Triton's own, CUDA's folders, the search path."""
    for package, name in (("nvidia", "*/bin/ptxas"), ("triton", "backends/nvidia/bin/ptxas*")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from sorted(Path(folder).glob(name))
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            yield Path(home) / "bin" / "ptxas"
    if on_path := shutil.which("ptxas"):
        yield Path(on_path)


def _version(path: Path) -> tuple[int, int] | None:
    """The version that a ptxas prints; None for what does not run."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", text)
    return (int(release[1]), int(release[2])) if release else None


def installed() -> list[Assembler]:
    """Every assembler of this machine, the oldest first."""
    versions = {path: _version(path) for path in dict.fromkeys(path.resolve() for path in _candidates()) if path.is_file()}
    return sorted(Assembler(version, path) for path, version in versions.items() if version)


def choose(arch: int, cuda: str, assemblers: list[Assembler]) -> Assembler:
    """The oldest of ``assemblers`` that makes code for ``arch`` (as in 87) and drivers of CUDA ``cuda``.

    cuda: "12" or "13", or "auto": 12 for architectures that CUDA 12 had from the start, 13 for newer ones. Raises KernelError
    for an architecture that this CUDA does not know, MissingDependency where no assembler suits.
    """
    first = FIRST_CUDA[arch]
    major = int(cuda) if cuda != "auto" else 12 if first <= (12, 0) else 13
    if major < first[0]:
        raise KernelError(f"CUDA {major} knows no sm_{arch}; build it with --cuda 13, for drivers of CUDA 13")
    for assembler in sorted(assemblers):
        if assembler.version >= first and assembler.version[0] == major:
            return assembler
    versions = ", ".join("{}.{}".format(*assembler.version) for assembler in assemblers) or "none"
    wanted = max(first, (major, 0))
    raise MissingDependency(
        f"sm_{arch} for CUDA {major} takes a ptxas of CUDA {wanted[0]}.{wanted[1]} or later ({major}.x), "
        f"this machine has {versions}: pip install 'bilevel[kernels]', or 'nvidia-cuda-nvcc-cu12'"
    )
