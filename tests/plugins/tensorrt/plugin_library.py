"""The C++ plugins over a kernel library without machine code, and TensorRT's side of them (``harness.cpp``) from Python."""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bilevel.plugins.library.build import KernelRequest, find_compiler
from bilevel.plugins.library.gpu import DeviceTensor, KernelCall
from bilevel.plugins.tensorrt.fields import Field
from bilevel.plugins.tensorrt.headers import Headers, find_headers
from tests.doubles.gpu import build

_HARNESS = Path(__file__).parent / "harness.cpp"
# TensorRT's numbers: PluginFieldType and DataType.
FIELD_TYPES = {"FLOAT32": 1, "FLOAT64": 2, "INT32": 5, "CHAR": 6, "INT64": 10}
_FIELD_NUMBERS = {"FLOAT32": ctypes.c_float, "FLOAT64": ctypes.c_double, "INT32": ctypes.c_int32, "CHAR": ctypes.c_char}
_FIELD_NUMBERS["INT64"] = ctypes.c_int64
DATA_TYPES = {"float32": 0, "float16": 1, "int32": 3, "bfloat16": 7, "int64": 8}


class _Field(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("length", ctypes.c_int32)]


class _Fields(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("fields", ctypes.POINTER(_Field))]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("most", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    ]


def need_headers() -> Headers:
    """NVIDIA's headers; skips the test, with the reason, where they are not installed."""
    found = find_headers()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def build_plugins(requests: Sequence[KernelRequest], out: Path, archs: Sequence[int] = (80,)) -> Path:
    """A kernel library without machine code, with the plugins."""
    need_headers()
    return build(requests, out, archs, plugins="required").path


@functools.cache
def _harness(folder: Path) -> ctypes.CDLL:
    out = folder / "harness.so"
    folders = [f"-isystem{path}" for path in need_headers().include_dirs]
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
    subprocess.run([find_compiler(platform.machine()), *flags, *folders, str(_HARNESS), "-o", str(out)], check=True)
    library = ctypes.CDLL(str(out))
    for name in ("harness_make", "harness_attach"):
        getattr(library, name).restype = ctypes.c_void_p
    for name in ("harness_said", "harness_timing_key"):
        getattr(library, name).restype = ctypes.c_char_p
    library.harness_workspace.restype = ctypes.c_size_t
    library.harness_fields.restype = ctypes.POINTER(_Fields)
    return library


def _data(field: Field) -> Any:
    number = _FIELD_NUMBERS[field.kind]
    values = [bytes([int(value)]) for value in field.data] if field.kind == "CHAR" else field.data
    return (number * max(1, len(field.data)))(*values)


def describe(tensors: Sequence[DeviceTensor], varies: bool = True) -> Any:
    """TensorRT's view of a call's tensors; ``varies``: every size may be smaller."""
    made = (_Tensor * len(tensors))()
    for place, tensor in zip(made, tensors, strict=True):
        place.rank, place.type, place.data = len(tensor.shape), DATA_TYPES[tensor.dtype], tensor.address or None
        for axis, size in enumerate(tensor.shape):
            place.dims[axis], place.most[axis] = -1 if varies else size, size
    return made


@dataclass
class Plugin:
    """A C++ plugin. ``call`` gives the tensors of what TensorRT would tell it."""

    plugins: Plugins
    address: int

    def _told(self, function: str, call: KernelCall, *more: Any, varies: bool = True) -> int:
        tensors = describe([*call.inputs, *call.outputs], varies)
        counts = (len(call.inputs), len(call.outputs))
        return int(
            getattr(self.plugins.harness, function)(ctypes.c_void_p(self.address), *more[:1], tensors, *counts, *more[1:])
        )

    def configure(self, call: KernelCall, varies: bool = True) -> int:
        return self._told("harness_configure", call, varies=varies)

    def workspace(self, call: KernelCall) -> int:
        return self._told("harness_workspace", call)

    def supports(self, position: int, call: KernelCall, is_packed: bool = False) -> bool:
        return bool(self._told("harness_supports", call, position, int(is_packed)))

    def shape_change(self, call: KernelCall) -> int:
        return self._told("harness_shape_change", call)

    def enqueue(self, call: KernelCall, workspace: int) -> int:
        tensors = describe([*call.inputs, *call.outputs])
        counts = (len(call.inputs), len(call.outputs))
        where = ctypes.c_void_p(workspace or None)
        return int(self.plugins.harness.harness_enqueue(ctypes.c_void_p(self.address), tensors, *counts, where))

    def output_types(self, inputs: Sequence[str], count: int) -> list[str]:
        given, found = (ctypes.c_int32 * len(inputs))(*(DATA_TYPES[name] for name in inputs)), (ctypes.c_int32 * count)()
        assert not self.plugins.harness.harness_output_types(ctypes.c_void_p(self.address), given, len(inputs), found, count)
        names = {number: name for name, number in DATA_TYPES.items()}
        return [names[number] for number in found]

    def timing_key(self) -> str:
        return str(self.plugins.harness.harness_timing_key(ctypes.c_void_p(self.address)).decode())

    def fields(self) -> list[Field]:
        found = self.plugins.harness.harness_fields(ctypes.c_void_p(self.address)).contents
        names = {number: name for name, number in FIELD_TYPES.items()}
        fields = []
        for raw in found.fields[: found.count]:
            kind = names[raw.type]
            data = (_FIELD_NUMBERS[kind] * raw.length).from_address(raw.data) if raw.length else ()
            values = tuple(value[0] if kind == "CHAR" else value for value in data)
            fields.append(Field(raw.name.decode(), kind, values))
        return fields

    def attach(self) -> Plugin:
        address = self.plugins.harness.harness_attach(ctypes.c_void_p(self.address))
        assert address
        return Plugin(self.plugins, address)


class Plugins:
    """The compiled plugins. ``said``: what they logged since it was last asked."""

    def __init__(self, library: Path) -> None:
        self.path, self.library = library, ctypes.CDLL(str(library))
        self.harness = _harness(library.parent)
        self.harness.harness_listen(self.library.setLoggerFinder, 1)

    def make(self, op: str, fields: Sequence[Field] | None, from_plan: bool) -> Plugin | None:
        """A plugin from fields (None: no collection at all), or None where it is refused."""
        data = [_data(field) for field in fields or ()]
        made = (_Field * max(1, len(data)))()
        for place, field, numbers in zip(made, fields or (), data, strict=False):
            place.name, place.type, place.length = field.name.encode(), FIELD_TYPES[field.kind], len(field.data)
            place.data = ctypes.addressof(numbers)
        given = None if fields is None else made
        address = self.harness.harness_make(self.library.getCreators, op.encode(), given, len(data), int(from_plan))
        return Plugin(self, address) if address else None

    def said(self) -> str:
        return str(self.harness.harness_said().decode())
