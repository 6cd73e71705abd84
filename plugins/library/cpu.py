"""The operators' fast CPU kernels: a shared library that ONNX Runtime loads beside the graph.

It is built when bilevel is installed on a machine with a C++ compiler (``plugins/csrc``). Without it the same graph runs its
portable bodies: the same results, several times slower.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

from bilevel.errors import RequestError

VARIABLE = "BILEVEL_CPU_LIBRARY"


def find_cpu_library() -> Path | None:
    """The library to load: the file that BILEVEL_CPU_LIBRARY names ("none": no library), else the one installed with bilevel.

    Raises RequestError where the variable names a file that is not there.
    """
    named = os.environ.get(VARIABLE, "")
    if named.lower() == "none":
        return None
    if named:
        if not Path(named).is_file():
            raise RequestError(f"{VARIABLE}={named} is no file; unset it, or set it to none to run without the library")
        return Path(named)
    return installed_cpu_library()


def installed_cpu_library() -> Path | None:
    """The library that was built when bilevel was installed, whatever the environment says; None where there is none."""
    spec = importlib.util.find_spec("bilevel.plugins")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in sorted(Path(folder).glob("_cpu*.so")):
            return library
    return None


def instruction_set(library: Path) -> str:
    """The instruction set whose kernels this CPU gets: "avx512", "avx2" or "baseline". Raises OSError."""
    function = ctypes.CDLL(str(library)).bilevel_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())
