"""Where NVIDIA's C++ headers lie, which the TensorRT plugins of a kernel library are compiled against (standard library only).

bilevel ships none of them: they come with TensorRT's SDK or packages (on a Jetson, JetPack's ``libnvinfer-headers-dev``), and
``include/`` of github.com/NVIDIA/TensorRT at a release's tag has them too. No TensorRT library is linked.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "TENSORRT_ROOT"
OLDEST = (10, 0)
_TENSORRT, _VERSION, _CUDA = "NvInferRuntime.h", "NvInferVersion.h", "cuda_runtime_api.h"
_PLACES = ("/usr/include", "/usr/local/tensorrt/include", "/usr/local/TensorRT/include", "/opt/tensorrt/include")
_CUDA_PLACES = ("/usr/local/cuda/include", "/usr/include")
_CUDA_WHEELS = ("cu13/include", "cuda_runtime/include")  # of nvidia-cuda-runtime and nvidia-cuda-runtime-cu12


@dataclass(frozen=True)
class Headers:
    """Folders to give to the compiler, in order, and TensorRT's version, as in "10.3.0"."""

    include_dirs: tuple[Path, ...]
    version: str


def find_headers() -> Headers | str:
    """The headers, or one sentence that says what is missing and what brings it.

    TensorRT's are looked for in $TENSORRT_ROOT/include (nowhere else where it is set), then in the usual system folders; the
    CUDA runtime's beside them, in $CUDA_HOME/include, in the usual system folders and in NVIDIA's wheels.
    """
    root = os.environ.get(VARIABLE, "")
    folder = _first(_TENSORRT, [Path(root) / "include", Path(root)] if root else _system_folders())
    if folder is None:
        where = f"{VARIABLE}={root} holds no include/{_TENSORRT}" if root else f"{_TENSORRT} is in none of the usual folders"
        return (
            f"{where}; install TensorRT's headers (libnvinfer-headers-dev), "
            f"or let {VARIABLE} name the folder above their include/"
        )
    version = _version(folder / _VERSION)
    if version is None:
        return f"{folder / _VERSION} names no version; let {VARIABLE} name a whole TensorRT {OLDEST[0]} or newer"
    if version[:2] < OLDEST:
        installed = ".".join(map(str, version))
        return f"{folder} holds TensorRT {installed}, the plugins need {OLDEST[0]}.{OLDEST[1]} or newer; install a newer one"
    cuda = _first(_CUDA, [folder, *_cuda_folders()])
    if cuda is None:
        return (
            f"{_CUDA}, which TensorRT's headers include, is in none of the usual folders; install the CUDA toolkit, "
            "let CUDA_HOME name it, or pip install nvidia-cuda-runtime"
        )
    return Headers(tuple(dict.fromkeys((folder, cuda))), ".".join(map(str, version)))


def _first(name: str, folders: Iterable[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / name).is_file()), None)


def _system_folders() -> Iterator[Path]:
    yield Path(f"/usr/include/{platform.machine()}-linux-gnu")
    yield from map(Path, _PLACES)


def _cuda_folders() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    yield from map(Path, _CUDA_PLACES)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from (Path(folder) / wheel for wheel in _CUDA_WHEELS)


def _version(path: Path) -> tuple[int, int, int] | None:
    """Major, minor and patch; from 10.13 on their names are defined by way of others."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        number = re.search(rf"#define\s+(?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)?\s+(\d+)", text)
        if number is None:
            return None
        numbers.append(int(number[1]))
    return numbers[0], numbers[1], numbers[2]
