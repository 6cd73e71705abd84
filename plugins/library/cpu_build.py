"""The CPU library for another kind of machine, by a cross compiler: as ``pip install`` builds it for this one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bilevel.errors import KernelError
from bilevel.plugins.library.build import CSRC, find_compiler

# Those of pyproject.toml, and what setuptools adds for an extension.
FLAGS = ("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread")


def build_cpu_library(target: str, out: Path) -> Path:
    """Compile the library for "x86_64" or "aarch64" into the file ``out``. Raises MissingDependency, KernelError.

    Takes ten seconds of CPU time.
    """
    compiler, sources = find_compiler(target), sorted((CSRC / "ort").glob("*.cpp"))
    if not sources:
        raise KernelError(f"{CSRC / 'ort'} holds no sources of the CPU kernels; reinstall bilevel")
    command = [compiler, *FLAGS, *map(str, sources), "-s", "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "error" in line.lower()]
        reason = errors[0] if errors else run.stderr.strip()[-300:] or "no message"
        raise KernelError(f"{compiler} could not build the CPU kernels ({reason}); install GCC 9 or newer")
    return out
