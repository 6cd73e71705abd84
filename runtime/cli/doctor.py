"""``bilevel doctor``: what this machine can run, and what to do about the rest. Needs nothing but Python and numpy."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bilevel.bundle.format import read_manifest
from bilevel.errors import KernelError
from bilevel.folders import file_sha256
from bilevel.machine import Machine, look
from bilevel.plugins.library.gpu import distrust_problem, read_info
from bilevel.runtime.backend.select import LIBRARY_VARIABLE, find_library, library_places, library_problem, list_options
from bilevel.runtime.cli.trials import try_all

EPILOG = """\
Without a bundle: the machine, its GPU and driver, the packages that backends need, and the kernel library; the driver, a little
memory of the GPU and the library are really used, and versions that do not fit each other are named. With one: also which of
its engines run here, and for each that does not, the command that mends it.

The kernel library for TensorRT's plugins is looked for in this order: the argument, BUNDLE/kernels/MACHINE, the environment's
BILEVEL_KERNEL_LIBRARY, the package; the first that is there is taken, and an engine that was built with another refuses it. The
bundle's own is taken only where you built it here, named it, or trusted it (bilevel kernels trust FILE): it is native code.
Exit status: 0 when something runs the bundle here, else 1.

--json prints one object: "machine" {system, machine, python, memory_bytes, gpus [{name, capability, memory_bytes,
is_integrated}], driver_cuda (null: none), driver_problem, jetpack, packages {module: version, null, or why it does not load},
cuda_provider_problem}; "trials", calls that were made [{what, measure, problem}]; "libraries", in order [{from, path, found,
is_taken, sha256, architectures, problem}]; and with a bundle "bundle" and "backends", the best first [{backend, name, runs,
problem}]. A problem is a sentence with its remedy, "" where there is none.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, nargs="?", help="folder written by bilevel export")
    parser.add_argument("--library", metavar="FILE", type=Path, help="the kernel library to look at first")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print what was found; 1 when nothing runs the bundle."""
    machine = look()
    facts = describe(machine, args.bundle, args.library)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return 0 if args.bundle is None or any(option["runs"] for option in facts["backends"]) else 1


def describe(machine: Machine, folder: Path | None, library: Path | None) -> dict[str, Any]:
    """Everything that ``--json`` prints."""
    libraries = _libraries(machine, folder, library)
    paths = [Path(each["path"]) for each in libraries if each["found"] and not each["problem"]]
    facts: dict[str, Any] = {"machine": asdict(machine), "libraries": libraries}
    facts["trials"] = [asdict(trial) for trial in try_all(machine, paths)]
    if folder is not None:
        bundle = read_manifest(folder)
        facts["bundle"] = str(folder)
        facts["backends"] = [
            {"backend": option.backend, "name": option.name, "runs": option.does_run, "problem": option.problem}
            for option in list_options(bundle, machine, library, verify=True)
        ]
    return facts


def _libraries(machine: Machine, folder: Path | None, library: Path | None) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    taken = None if folder is None else find_library(folder, machine, library)
    for where, path in library_places(folder, machine, library):
        entry: dict[str, Any] = {"from": where, "path": str(path), "found": path.is_file(), "is_taken": False}
        entry |= {"sha256": None, "architectures": [], "problem": ""}
        if path.is_file():
            entry["is_taken"] = path == taken if folder is not None else not any(each["found"] for each in entries)
            entry["sha256"] = file_sha256(path)
            entry["problem"] = (where == "bundle" and distrust_problem(path)) or library_problem(path, machine)
            try:
                entry["architectures"] = sorted(map(int, read_info(path)["architectures"]))
            except KernelError:
                pass  # the problem says so
        entries.append(entry)
    return entries


def _lines(facts: dict[str, Any]) -> list[str]:
    machine = facts["machine"]
    rows = [
        (
            "system",
            f"{machine['system']} {machine['machine']}, {machine['memory_bytes'] / 2**30:.1f} GiB, Python {machine['python']}",
        ),
        ("board", machine["jetpack"] or "not a Jetson"),
        ("driver", f"CUDA {machine['driver_cuda']}" if machine["driver_cuda"] else machine["driver_problem"]),
    ]
    for gpu in machine["gpus"]:
        shared = ", shared with the host" if gpu["is_integrated"] else ""
        rows.append(("GPU", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB{shared}"))
    lines = ["machine", *_table(rows), "", "packages"]
    lines += _table([(name, version or "not installed") for name, version in machine["packages"].items()])
    lines += ["", "calls that were made"]
    lines += _table([("fails" if each["problem"] else "works", _trial(each)) for each in facts["trials"]])
    lines += ["", "kernel library, in the order in which it is looked for"]
    lines += _table([(each["from"], _library_state(each)) for each in facts["libraries"]])
    if not any(each["found"] for each in facts["libraries"]):
        lines.append(f"  (none; only engines with plugins need one: bilevel kernels build, or set {LIBRARY_VARIABLE})")
    if "backends" in facts:
        lines += ["", f"{facts['bundle']}"]
        lines += _table([("runs" if each["runs"] else "does not", _option(each)) for each in facts["backends"]])
    return lines


def _trial(trial: dict[str, Any]) -> str:
    return f"{trial['what']}: {trial['problem'] or trial['measure']}"


def _option(option: dict[str, Any]) -> str:
    return f"{option['name']} ({option['backend']})" + (f": {option['problem']}" if option["problem"] else "")


def _library_state(library: dict[str, Any]) -> str:
    if not library["found"]:
        return f"{library['path']}: not there"
    kernels = ", ".join(f"sm_{arch}" for arch in library["architectures"])
    state = library["problem"] or f"{library['path']}: kernels for {kernels}"
    return f"{state} [SHA-256 {library['sha256'][:12]}{', taken' if library['is_taken'] else ''}]"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:{width}}  {value}" for name, value in rows]
