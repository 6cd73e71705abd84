"""Which plugins an engine is built with: a kernel library's, the Python ones, or none."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilevel.errors import EngineError
from bilevel.export.engine.worker import NO_PLUGINS, PYTHON_PLUGINS
from bilevel.folders import file_sha256
from bilevel.plugins.library.gpu import distrust_problem, read_info, serves

LIBRARY = "libbilevel_kernels.so"


@dataclass(frozen=True)
class Plugins:
    """A choice. source: a library's file, "python" or "none"; sha256: of the library; why: a remark on a choice by default."""

    source: str
    sha256: str | None = None
    why: str = ""


def library_problem(library: Path, archs: Sequence[int]) -> str:
    """Why an engine for ``archs`` cannot be built with a kernel library; "" where it can. Raises KernelError."""
    info = read_info(library)
    wanted = ",".join(f"sm_{arch}" for arch in archs) or "sm_NN"
    remedy = f"bilevel kernels build --geometry BUNDLE --arch {wanted}"
    if info["target"] != platform.machine():
        return f"{library} is for {info['target']}, this machine is {platform.machine()}; build one for it: {remedy}"
    if info.get("tensorrt") is None:
        return f"{library} has no TensorRT plugins; install NVIDIA's headers and build it anew: {remedy} --tensorrt required"
    missing = [arch for arch in archs if not serves(info, arch)]
    if missing:
        return f"{library} has no kernels for {', '.join(f'sm_{arch}' for arch in missing)}; build it anew: {remedy}"
    return ""


def choose_plugins(bundle: Path, asked: str | None, archs: Sequence[int]) -> Plugins:
    """The plugins for an engine. asked: a file, "python", "none", or None: the bundle's kernel library if it serves and this
    user built or trusts it, else Python.

    Raises EngineError and KernelError for a library that was asked for and does not serve.
    """
    if asked in (PYTHON_PLUGINS, NO_PLUGINS):
        return Plugins(asked)
    library = Path(asked) if asked else bundle / "kernels" / platform.machine() / LIBRARY
    if not library.is_file():
        if asked:
            raise EngineError(f"{library} is no file; give a kernel library, python or none to --plugins")
        return Plugins(PYTHON_PLUGINS, why=f"there is no {library}")
    problem = ("" if asked else distrust_problem(library)) or library_problem(library, archs)
    if problem and asked:
        raise EngineError(problem)
    if problem:
        return Plugins(PYTHON_PLUGINS, why=problem)
    return Plugins(str(library.absolute()), file_sha256(library))
