"""``bilevel kernels build``, ``show`` and ``trust``."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilevel.errors import ContractError, KernelError, require
from bilevel.plugins.launch.tiles import ARCHITECTURES, shared_limit
from bilevel.plugins.library.assemblers import CHOICES
from bilevel.plugins.library.gpu import needed_versions, read_info, trust

LIBRARY = "libbilevel_kernels.so"
EPILOG = """\
build makes one shared library of the GPU kernels that the routed nodes of a bundle need, in machine code for every architecture
named. Neither a GPU nor its driver is asked: build on a PC, copy to the board.

  bilevel kernels build --geometry my-bundle --arch sm_87                          Jetson Orin, JetPack 6 and 7
  bilevel kernels build --geometry my-bundle --arch sm_87,sm_110 --target aarch64  the same from a PC, Thor too
  bilevel kernels show my-bundle/kernels/aarch64/libbilevel_kernels.so             what a library holds
  bilevel kernels trust my-bundle/kernels/aarch64/libbilevel_kernels.so            load it from that bundle from now on

A library in a bundle is native code: engines load it where you built it on this machine, trust it, or name it with --library.

architectures: sm_80 (A100), sm_86 (RTX 30), sm_87 (Orin), sm_89 (RTX 40), sm_90 (H100), sm_100 (B200), sm_110 (Thor),
sm_120 (RTX 50)

The library has a plain C interface (plugins/csrc/gpu/bilevel_kernels.h documents it) and, where NVIDIA's headers are found, the
TensorRT plugins. It needs no CUDA runtime; the driver is opened when the first kernel is launched. Machine code for sm_80 to
sm_90 is made by an assembler of CUDA 12, which drivers of CUDA 12 and 13 load, for newer architectures by one of CUDA 13:
--cuda chooses otherwise.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Build the library of GPU kernels for a bundle's geometry, or show what a library holds."
    parser.epilog = EPILOG
    parser.add_argument("action", choices=("build", "show", "trust"), help="what to do")
    parser.add_argument("library", nargs="?", type=Path, metavar="LIBRARY", help="show, trust: the library")
    parser.add_argument(
        "--geometry",
        action="append",
        type=Path,
        metavar="BUNDLE",
        help="build: the bundle whose routed nodes are to be served; several may share a library",
    )
    parser.add_argument("--arch", metavar="LIST", help="build: architectures, as in sm_87,sm_90, or all")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"build: the file to write (default BUNDLE/kernels/TARGET/{LIBRARY})"
    )
    parser.add_argument("--cuda", choices=CHOICES, default="auto", help="build: the CUDA of the drivers (default: see below)")
    parser.add_argument(
        "--target", choices=("x86_64", "aarch64"), help="build: the machine that loads it (default: this one's kind)"
    )
    parser.add_argument(
        "--tensorrt",
        choices=("auto", "none", "required"),
        default="auto",
        help="build: the TensorRT plugins, which need NVIDIA's headers ($TENSORRT_ROOT/include or the usual folders); "
        "auto, the default, goes without them where there are none",
    )
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="build: processes that compile (default: one per core)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def parse_architectures(text: str | None) -> list[int]:
    """``"sm_87,90"`` -> [87, 90]; "all": every one that there are kernels for. Raises ContractError."""
    if text == "all":
        return list(ARCHITECTURES)
    archs = []
    for part in (text or "").split(","):
        digits = part.strip().removeprefix("sm_")
        if not digits.isascii() or not digits.isdigit():
            known = ",".join(f"sm_{arch}" for arch in ARCHITECTURES)
            raise ContractError(f"--arch {text or '(nothing)'} must list architectures such as sm_87,sm_90; there are {known}")
        shared_limit(int(digits))
        archs.append(int(digits))
    return sorted(set(archs))


def _check(args: argparse.Namespace) -> tuple[list[int], list[Path]]:
    """(the architectures, the bundles' graphs); options that contradict each other are refused before anything heavy loads."""
    if args.action != "build":
        if args.library is None or args.geometry or args.arch or args.out:
            raise KernelError(f"{args.action} takes a library and nothing else: bilevel kernels {args.action} LIBRARY")
        return [], []
    if args.library is not None or not args.geometry:
        raise ContractError("build takes the bundle as an option: bilevel kernels build --geometry BUNDLE --arch sm_87")
    if args.jobs < 0:
        raise ContractError(f"--jobs {args.jobs} must be at least 0 (0: one process per core)")
    from bilevel.bundle.format import read_manifest

    graphs = [read_manifest(bundle).graph_path for bundle in args.geometry]
    return parse_architectures(args.arch), graphs


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    archs, graphs = _check(args)
    if args.action == "trust":
        trust(args.library)
        print(f"{args.library} may be loaded from a bundle from now on")
        return 0
    return _show(args) if args.action == "show" else _build(args, archs, graphs)


def _build(args: argparse.Namespace, archs: list[int], graphs: list[Path]) -> int:
    for name in ("triton", "onnx"):
        require(name)
    from bilevel.export.graph.operator_geometry import read_requests
    from bilevel.plugins.library.build import build_library

    started = time.perf_counter()
    target = args.target or platform.machine()
    out = args.out or args.geometry[0] / "kernels" / target / LIBRARY
    requests = [request for graph in graphs for request in read_requests(graph)]
    if not requests:
        raise ContractError(f"{args.geometry[0]} has no routed nodes and no caches, so it needs no kernels; run it as it is")
    rich = require("rich.progress")
    console = require("rich.console").Console(stderr=True)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    with rich.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=None)
        build = build_library(
            requests,
            archs,
            out,
            cuda=args.cuda,
            target=target,
            plugins=args.tensorrt,
            jobs=args.jobs,
            on_progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    with suppress(KernelError):  # whoever cannot write there names the library
        trust(build.path)
    seconds = time.perf_counter() - started
    size = build.path.stat().st_size
    if args.json:
        print(
            json.dumps(
                {"path": str(build.path), "bytes": size, "code_bytes": build.code_bytes, "seconds": seconds, **build.info}
            )
        )
        return 0
    print(f"wrote {build.path} ({size / 1e6:.1f} MB, {build.code_bytes / 1e6:.1f} MB of machine code) in {seconds:.1f} s")
    print(_summary(build.path, build.info))
    if build.without_plugins:
        print(f"without the TensorRT plugins: {build.without_plugins}")
    return 0


def _summary(path: Path, info: Mapping[str, Any]) -> str:
    """A library's description as text."""
    needed = " and ".join(f"{name} {version}" for name, version in needed_versions(path).items())
    archs = ", ".join(f"sm_{arch} (CUDA {version})" for arch, version in info["architectures"].items())
    plugins = f"TensorRT plugins (headers of {info['tensorrt']})" if info["tensorrt"] else "no TensorRT plugins"
    lines = [f"for {info['target']} with {needed} or newer; {archs}; {plugins}"]
    for variant in info["variants"]:
        sizes = " ".join(f"{name}={value}" for name, value in variant["geometry"].items())
        lines.append(f"  {variant['op']:16} {variant['dtype']:9} {sizes}")
    return "\n".join(lines)


def _show(args: argparse.Namespace) -> int:
    info = read_info(args.library)
    print(json.dumps(info) if args.json else _summary(args.library, info))
    return 0
