"""What this machine is and has, as far as running a bundle goes: asked of the system and of the CUDA driver, with nothing installed."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER_VARIABLE = "BILEVEL_CUDA_DRIVER"
# Python module -> the distributions that may bring it.
PACKAGES = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tokenizers": ("tokenizers",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13"),
    "cuda.bindings": ("cuda-bindings",),
}
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_TEGRA, _DPKG = Path("/etc/nv_tegra_release"), Path("/var/lib/dpkg/status")


@dataclass(frozen=True)
class Gpu:
    """capability: as in 87. is_integrated: its memory is the host's, and counts once."""

    name: str
    capability: int
    memory_bytes: int
    is_integrated: bool


@dataclass(frozen=True)
class Machine:
    """driver_cuda: the newest CUDA of the driver, as in "12.6"; None where there is none, and driver_problem says why.

    packages: module -> version, None where it is not installed, or a sentence in brackets where it does not load.
    jetpack: its version or the board's Linux release, None elsewhere.
    """

    system: str
    machine: str
    python: str
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    driver_cuda: str | None
    driver_problem: str
    jetpack: str | None
    packages: Mapping[str, str | None]

    @property
    def architectures(self) -> set[int]:
        """Compute capabilities of the GPUs."""
        return {gpu.capability for gpu in self.gpus}


def look() -> Machine:
    """This machine."""
    driver_cuda, gpus, problem = _ask_driver()
    return Machine(
        system=platform.system(),
        machine=platform.machine(),
        python=platform.python_version(),
        memory_bytes=_memory_bytes(),
        gpus=gpus,
        driver_cuda=driver_cuda,
        driver_problem=problem,
        jetpack=find_jetpack(),
        packages={name: find_package(name) for name in PACKAGES},
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def find_package(module: str) -> str | None:
    """The version of a module that loads, None where it is not installed; in brackets why one does not load."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or "?"):
            return None
        return f"(installed, but does not load: {error})"
    except Exception as error:  # noqa: BLE001 (TensorRT's wheels raise what they like where a library is missing)
        return f"(installed, but does not load: {str(error).splitlines()[0] if str(error) else type(error).__name__})"
    for distribution in PACKAGES[module]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(loaded, "__version__", "unknown version"))


def find_jetpack(tegra: Path = _TEGRA, dpkg: Path = _DPKG) -> str | None:
    """JetPack's version as its package states it, else the release of the board's Linux, else None."""
    if not tegra.is_file():
        return None
    status = dpkg.read_text(errors="replace") if dpkg.is_file() else ""
    if found := re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", status, re.MULTILINE):
        return f"JetPack {found[1]}"
    release = re.search(r"R(\d+).*REVISION: ([\d.]+)", tegra.read_text(errors="replace"))
    return f"Jetson Linux {release[1]}.{release[2]}" if release else "Jetson Linux"


def _ask_driver() -> tuple[str | None, tuple[Gpu, ...], str]:
    """(CUDA of the driver, its GPUs, why there is none)."""
    name = os.environ.get(DRIVER_VARIABLE) or "libcuda.so.1"
    try:
        cuda: Any = ctypes.CDLL(name)
    except OSError:
        return None, (), f"the CUDA driver {name} cannot be opened; install NVIDIA's driver to use a GPU"
    number = ctypes.c_int()
    if (status := cuda.cuInit(0)) != 0 or cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None, (), f"the CUDA driver does not start (CUDA error {status}); check that the GPU is visible: nvidia-smi"
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    cuda.cuDeviceGetCount(ctypes.byref(number))
    gpus = tuple(_ask_gpu(cuda, index) for index in range(number.value))
    return version, gpus, "" if gpus else "the CUDA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"


def _ask_gpu(cuda: Any, index: int) -> Gpu:
    device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    values = {}
    for attribute in (_MAJOR, _MINOR, _INTEGRATED):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        values[attribute] = value.value
    capability = 10 * values[_MAJOR] + values[_MINOR]
    return Gpu(name.value.decode(errors="replace"), capability, size.value, bool(values[_INTEGRATED]))
