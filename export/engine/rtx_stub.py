"""Lets TensorRT-RTX's wheels import plugins: a stand-in for a file that they lack (standard library only).

The ONNX parser of TensorRT-RTX 1.7 reaches the builder by the name ``libtensorrt_rtx.so`` when it meets a plugin; the wheels
ship ``libtensorrt_rtx.so.1`` alone, and the process aborts. A shared library that has the missing name and needs the real one,
loaded beforehand, mends that without touching the installation.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import struct
import sys
import tempfile
from pathlib import Path

from bilevel.errors import ExportError

_MISSING, _REAL = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"
_MACHINES = {"x86_64": 62, "aarch64": 183}
_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 1, 4, 5, 6, 10, 11, 14
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK, _READ_WRITE = 1, 2, 0x6474E551, 6


def make_stub(soname: str, needed: str, machine: int) -> bytes:
    """A shared library (ELF, 64 bits) without code or symbols that is called ``soname`` and loads ``needed``."""
    strings = f"\0{soname}\0{needed}\0".encode()
    header, headers = 64, 3 * 56
    symbols = header + headers
    table = symbols + 24  # after the one symbol that every table starts with
    dynamic = table + 16  # after a hash table of one empty bucket
    tags = [
        (_DT_SONAME, 1),
        (_DT_NEEDED, 2 + len(soname)),
        (_DT_HASH, table),
        (_DT_SYMTAB, symbols),
        (_DT_SYMENT, 24),
        (_DT_STRTAB, dynamic + 8 * 16),
        (_DT_STRSZ, len(strings)),
        (0, 0),
    ]
    size = dynamic + len(tags) * 16 + len(strings)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    content = struct.pack("<16sHHIQQQIHHHHHH", ident, 3, machine, 1, 0, header, 0, 0, header, 56, 3, 64, 0, 0)
    content += struct.pack("<IIQQQQQQ", _PT_LOAD, _READ_WRITE, 0, 0, 0, size, size, 0x1000)
    content += struct.pack("<IIQQQQQQ", _PT_DYNAMIC, _READ_WRITE, dynamic, dynamic, dynamic, len(tags) * 16, len(tags) * 16, 8)
    content += struct.pack("<IIQQQQQQ", _PT_GNU_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16)  # no executable stack
    content += bytes(24) + struct.pack("<IIII", 1, 1, 0, 0)
    return content + b"".join(struct.pack("<QQ", *tag) for tag in tags) + strings


@functools.cache
def load_stub() -> None:
    """Make plugins importable by ``tensorrt_rtx``, which must have been imported; again and again costs nothing.

    Raises ExportError where neither the missing library nor a stand-in can be loaded.
    """
    try:
        ctypes.CDLL(_MISSING)  # NVIDIA's own, where an SDK is installed
        return
    except OSError:
        pass
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        raise ExportError(f"TensorRT-RTX imports plugins on Linux, x86-64 and aarch64, not on {sys.platform} {machine}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _MISSING
        path.write_bytes(make_stub(_MISSING, _REAL, _MACHINES[machine]))
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            raise ExportError(f"{_REAL} could not be loaded ({error}); install it: pip install tensorrt-rtx-cu13") from None
