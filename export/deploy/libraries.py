"""The two native libraries that a device needs: the CPU kernels, which go into the wheel, and the GPU kernels of the bundle."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bilevel.bundle.format import Bundle
from bilevel.errors import BilevelError, KernelError, require
from bilevel.export.deploy.targets import Board, Target, is_newer
from bilevel.export.deploy.texts import Missing
from bilevel.plugins.library.cpu import installed_cpu_library
from bilevel.plugins.library.cpu_build import build_cpu_library
from bilevel.plugins.library.gpu import distrust_problem, needed_versions, read_info

GPU_NAME = "libbilevel_kernels.so"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class CpuLibrary:
    """A file, where it came from ("installed" or "compiled"), and the glibc and libstdc++ that it asks for."""

    path: Path
    origin: str
    needs: dict[str, str]


def version_problem(needs: dict[str, str], target: Target) -> str:
    """Why a library does not load on the target, "" where it does."""
    for name, has in (("GLIBC", target.glibc), ("GLIBCXX", target.libstdcxx)):
        if name in needs and is_newer(needs[name], has):
            return f"it asks for {name} {needs[name]}, {target.title} has {has}"
    return ""


def cpu_library(target: Target, scratch: Path, on_stage: Progress) -> CpuLibrary | Missing:
    """The CPU kernels for the target: this machine's own, or compiled into the folder ``scratch``."""
    path, origin = installed_cpu_library() if platform.machine() == target.machine else None, "installed"
    why, remedy = (
        "",
        f"Install the compiler and run this command again: apt install g++-{target.machine.replace('_', '-')}-linux-gnu",
    )
    if path is None:
        on_stage(f"compiling the CPU kernels for {target.machine}")
        try:
            path, origin = build_cpu_library(target.machine, scratch / "cpu.so"), "compiled"
        except BilevelError as error:
            why = str(error)
    if path is not None:
        needs = needed_versions(path)
        if not (problem := version_problem(needs, target)):
            return CpuLibrary(path, origin, needs)
        why, remedy = problem, "Run this command on an older system, or with an older compiler"
    return Missing("CPU kernels", f"{why}; the graph's portable bodies run in their place, several times slower", remedy)


def gpu_problem(library: Path, target: Target, board: Board) -> str:
    """Why a file does not serve a board as its library of GPU kernels, "" where it does."""
    try:
        info = read_info(library)
    except KernelError as error:
        return str(error)
    arch, newest = str(board.arch), board.cuda
    if info["target"] != target.machine:
        return f"{library} is for {info['target']}"
    if arch not in info["architectures"]:
        return f"{library} holds no machine code for sm_{arch}"
    code = info["architectures"][arch]
    if int(code.split(".")[0]) > newest[0]:
        return f"{library} holds machine code of CUDA {code}, and the driver loads that of CUDA {newest[0]}"
    return version_problem(needed_versions(library), target)


def gpu_library(bundle: Bundle, target: Target, board: Board, out: Path, build: bool, on_stage: Progress) -> list[Missing]:
    """Put the GPU kernels at ``out``: the bundle's own, else built now where ``build``; what is missing of them."""
    what = "library of GPU kernels"
    command = f"bilevel kernels build --geometry {bundle.folder} --arch sm_{board.arch} --target {target.machine}"
    found = bundle.folder / "kernels" / target.machine / GPU_NAME
    why = gpu_problem(found, target, board) if found.is_file() else "the bundle holds none for this board"
    if not why and distrust_problem(found):
        # run.sh lets the device load what lies here, so it must be this user's choice, not the bundle's.
        why = f"the bundle's is native code that this user neither built nor trusts (bilevel kernels trust {found})"
    if not why:
        if not out.exists():  # else it is one of the manifest's files
            out.parent.mkdir(parents=True)
            shutil.copyfile(found, out)
    elif not build:
        return [Missing(what, f"{why}, and --no-build forbids to build one", f"Build it: {command}")]
    else:
        on_stage(f"building the GPU kernels for {target.title}")
        try:
            if not build_gpu_library(bundle, target, board, out):
                return []  # a dense model
        except BilevelError as error:
            return [Missing(what, str(error), f"Install what that names and run this command again, or {command}")]
    if read_info(out)["tensorrt"] is None:
        why = "the library was built where TensorRT's headers were not found, and engines with plugins take them from it"
        remedy = f"Name a folder with TensorRT {board.tensorrt}'s include/ and build it again: TENSORRT_ROOT=FOLDER {command}"
        return [Missing("TensorRT plugins", why, remedy)]
    return []


def build_gpu_library(bundle: Bundle, target: Target, board: Board, out: Path) -> bool:
    """Build the library for the bundle's geometry; False where no node of it needs one.

    Raises BilevelError for a tool that is missing and for a geometry that no kernel covers.
    """
    for name in ("triton", "onnx"):
        require(name)
    from bilevel.export.graph.operator_geometry import read_requests
    from bilevel.plugins.library.build import build_library

    requests = read_requests(bundle.graph_path)
    if requests:
        build_library(requests, [board.arch], out, cuda=str(board.cuda[0]), target=target.machine)
    return bool(requests)
