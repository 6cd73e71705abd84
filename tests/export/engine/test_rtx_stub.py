"""The stand-in for the library that TensorRT-RTX's wheels lack."""

from __future__ import annotations

import ctypes
import math
import platform
from pathlib import Path

import pytest

from bilevel.errors import ExportError
from bilevel.export.engine import rtx_stub

if platform.system() != "Linux" or platform.machine() not in rtx_stub._MACHINES:
    pytest.skip("the stand-in is for Linux, x86-64 and aarch64", allow_module_level=True)
MACHINE = rtx_stub._MACHINES[platform.machine()]


def write_stub(folder: Path, name: str, needed: str) -> Path:
    path = folder / "stub.so"
    path.write_bytes(rtx_stub.make_stub(name, needed, MACHINE))
    return path


def test_what_opens_the_missing_name_finds_the_real_library(tmp_path: Path) -> None:
    name = "libnobodyhasthis.so"
    with pytest.raises(OSError):
        ctypes.CDLL(name)
    ctypes.CDLL(str(write_stub(tmp_path, name, "libm.so.6")))
    cosine = ctypes.CDLL(name).cos
    cosine.restype, cosine.argtypes = ctypes.c_double, [ctypes.c_double]
    assert cosine(0.5) == math.cos(0.5)


def test_a_real_library_that_is_absent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_stub, "_MISSING", "libnobodyhasthat.so")
    monkeypatch.setattr(rtx_stub, "_REAL", "libnobodyhasthat.so.1")
    rtx_stub.load_stub.cache_clear()
    with pytest.raises(ExportError, match="pip install tensorrt-rtx-cu13"):
        rtx_stub.load_stub()


def test_another_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_stub, "_MISSING", "libnobodyhasthat.so")
    monkeypatch.setattr(rtx_stub.platform, "machine", lambda: "riscv64")
    rtx_stub.load_stub.cache_clear()
    with pytest.raises(ExportError, match="not on linux riscv64"):
        rtx_stub.load_stub()
