"""The machines that ``bilevel deploy`` writes for, and what is known of each."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass

from bilevel.errors import DeployError

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# llguidance's wheels ask for it, the newest of all that are pinned.
_LEAST_GLIBC = "2.31"


@dataclass(frozen=True)
class Board:
    """What a GPU target brings. arch: compute capability, as in 87. cuda: the driver's, and the newest machine code it loads.

    bindings: the versions of cuda-bindings and cuda-pathfinder for that driver. image: NVIDIA's container with this TensorRT.
    """

    arch: int
    cuda: tuple[int, int]
    tensorrt: str
    bindings: Mapping[str, str]
    image: str


@dataclass(frozen=True)
class Target:
    """python: as in "3.10". glibc, libstdcxx: the versions that the machine has at least (for symbols, as in "3.4.30").

    board: None where the CPU alone is meant.
    """

    name: str
    title: str
    machine: str
    python: str
    glibc: str
    libstdcxx: str
    board: Board | None = None

    @property
    def backend(self) -> str:
        """What ``bilevel serve`` is told there."""
        return "auto" if self.board else "onnx"


# JetPack 6.2 is Ubuntu 22.04, JetPack 7 is 24.04 (NVIDIA's release notes); glibc and libstdc++ are those of Ubuntu's packages.
_ORIN = Board(
    87, (12, 6), "10.3", {"cuda-bindings": "12.9.10", "cuda-pathfinder": "1.8.3"}, "nvcr.io/nvidia/l4t-jetpack:r36.4.0"
)
_THOR = Board(
    110, (13, 0), "10.13", {"cuda-bindings": "13.5.0", "cuda-pathfinder": "1.9.1"}, "nvcr.io/nvidia/tensorrt:25.08-py3"
)
_TARGETS = (
    Target("orin-jp62", "Jetson Orin with JetPack 6.2", "aarch64", "3.10", "2.35", "3.4.30", _ORIN),
    Target("thor-jp7", "Jetson Thor with JetPack 7", "aarch64", "3.12", "2.39", "3.4.33", _THOR),
    Target("linux-aarch64", "Linux on a 64-bit ARM CPU", "aarch64", "", _LEAST_GLIBC, "3.4.28"),
    Target("linux-x86_64", "Linux on an x86-64 CPU", "x86_64", "", _LEAST_GLIBC, "3.4.28"),
)
NAMES = tuple(target.name for target in _TARGETS)


def find_target(name: str, python: str | None = None) -> Target:
    """The target of a name; ``python``: the device's, where the target leaves it open (None: this machine's).

    Raises DeployError.
    """
    target = next((target for target in _TARGETS if target.name == name), None)
    if target is None:
        raise DeployError(f"--target {name!r} is not known; take one of {', '.join(NAMES)}")
    if target.python:
        if python not in (None, target.python):
            raise DeployError(f"--python {python} is not what {target.title} has; leave it out: it is {target.python}")
        return target
    chosen = python or ".".join(platform.python_version_tuple()[:2])
    if chosen not in PYTHONS:
        raise DeployError(f"--python {chosen} is not supported; give the device's, one of {', '.join(PYTHONS)}")
    return Target(target.name, target.title, target.machine, chosen, target.glibc, target.libstdcxx)


def is_newer(version: str, other: str) -> bool:
    """Whether "2.35" > "2.4"."""
    return [int(part) for part in version.split(".")] > [int(part) for part in other.split(".")]
