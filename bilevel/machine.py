"""What this machine has that a bundle may run on: asked of the system and of the CUDA driver, with nothing installed."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import io
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
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
# What shows whether a module loads, where that is not the module itself.
_PARTS = {"cuda.bindings": "cuda.bindings.driver"}
# Shared memory that one program may use, by compute capability (CUDA programming guide, "Technical specifications").
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    110: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_ROOT = Path("/")
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
    cuda_provider_problem: why ONNX Runtime's CUDA provider does not load, "" where it does or nobody looked. jetpack: its
    version or the board's Linux release, None elsewhere.
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
    cuda_provider_problem: str = ""

    @property
    def architectures(self) -> set[int]:
        """Compute capabilities of the GPUs."""
        return {gpu.capability for gpu in self.gpus}


def runs_on(code: int, capability: int) -> bool:
    """Whether machine code for a compute capability (as in 86) runs on a GPU of another one.

    Among 80, 86 and 89 code runs on later ones; every other GPU, those of Jetsons (87, 88) among them, runs its own only.
    ``plugins/csrc/gpu/kernel_library.cpp`` has the same rule.
    """
    if code == capability:
        return True
    return {code, capability} <= {80, 86, 89} and code < capability


def look() -> Machine:
    """This machine."""
    driver_cuda, gpus, problem = _ask_driver()
    packages = {name: find_package(name) for name in PACKAGES}
    return Machine(
        system=platform.system(),
        machine=platform.machine(),
        python=platform.python_version(),
        memory_bytes=_memory_bytes() or 0,
        gpus=gpus,
        driver_cuda=driver_cuda,
        driver_problem=problem,
        jetpack=find_jetpack(),
        packages=packages,
        cuda_provider_problem=find_provider_problem() if is_loaded(packages["onnxruntime"]) and not problem else "",
    )


def is_loaded(version: str | None) -> bool:
    """Whether a module of ``Machine.packages`` is there and loads."""
    return version is not None and not version.startswith("(")


def find_gpu() -> Gpu | None:
    """The first GPU, None where there is none."""
    return next(iter(_ask_driver()[1]), None)


def _memory_bytes() -> int | None:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes that this process can have: the machine's free ones, or what is left of a limit (a container's); None where nothing
    says.

    root: where /proc and /sys lie.
    """
    meminfo = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    sizes = [int(meminfo[1]) * 1024 if meminfo else _memory_bytes(), *_room_in_groups(root)]
    return min((size for size in sizes if size is not None), default=None)


def _room_in_groups(root: Path) -> Iterator[int]:
    """What every control group that this process is in, and every one around it, leaves to it (Linux's cgroups, v1 and v2)."""
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        # A container may see its own group's files at the top, and its name as it is outside, which leads nowhere.
        for group in (top, *(top / part for part in _and_parents(path))):
            limit, used = (_read(group / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():  # v2 says "max" where there is no limit
                # Pages of files are given back when somebody needs them.
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                yield max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))


def _and_parents(path: str) -> Iterator[str]:
    """ "/a/b" -> "a/b", "a"."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    yield from ("/".join(parts[:count]) for count in range(len(parts), 0, -1))


def _read(path: Path) -> str:
    """A file of the system's, "" where it has none."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def find_package(module: str) -> str | None:
    """The version of a module that loads, None where it is not installed; in brackets why one does not load."""
    try:
        importlib.import_module(_PARTS.get(module, module))
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or "?"):
            return None
        return f"(installed, but does not load: {error})"
    except Exception as error:  # noqa: BLE001 (TensorRT's wheels raise what they like where a library is missing)
        return f"(installed, but does not load: {str(error).splitlines()[0] if str(error) else type(error).__name__})"
    own = getattr(loaded, "__version__", None)
    if isinstance(own, str):  # a distribution's may have another form, or be another's: JetPack's TensorRT has none
        return own
    for distribution in PACKAGES[module]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def find_provider_problem() -> str:
    """Why ONNX Runtime's CUDA provider does not load, with the remedy; "" where it does."""
    ort = importlib.import_module("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return (
            f"onnxruntime {ort.__version__} is built without its CUDA provider; "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu (on a Jetson: NVIDIA's wheel for its JetPack)"
        )
    # ONNX Runtime keeps the reason to its log. It loads the provider with the first memory that is asked of it.
    ort.set_default_logger_severity(4)
    preload_cuda(ort)
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], 1, "cuda", 0)
        return ""
    except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors have no base class of their own)
        return (
            f"ONNX Runtime's CUDA provider does not load ({_reason(ort, error)}); "
            "install what it needs: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    finally:
        ort.set_default_logger_severity(3)


def preload_cuda(ort: Any) -> None:
    """Load the CUDA libraries that pip installed, where ONNX Runtime would not look; missing ones are reported later."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _reason(ort: Any, error: Exception) -> str:
    """What stands in the provider's way: the library that its own lacks, else ONNX Runtime's words.

    Its own is opened here only after ONNX Runtime has tried: it must be the first to load it.
    """
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as missing:
        return str(missing)
    return str(error).strip().splitlines()[0]


def find_jetpack(tegra: Path = _TEGRA, dpkg: Path = _DPKG) -> str | None:
    """JetPack's version as its package states it, else the release of the board's Linux, else None."""
    if not tegra.is_file():
        return None
    status = dpkg.read_text(errors="replace") if dpkg.is_file() else ""
    if package := re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", status, re.MULTILINE):
        return f"JetPack {package[1]}"
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
