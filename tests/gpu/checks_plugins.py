"""Checks of ``make gpu-test``, third part: the TensorRT plugins of the kernel library, driven without TensorRT."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel import contract
from bilevel.errors import BilevelError, KernelError
from bilevel.plugins.library.build import find_compiler
from bilevel.plugins.library.gpu import DeviceTensor, KernelCall, KernelLibrary
from bilevel.plugins.tensorrt.headers import Headers, find_headers
from tests.gpu.checks_library import CASES, Cases, Placed, place
from tests.gpu.machine import Attributes, Machine
from tests.gpu.result import Result

_SOURCE = Path(__file__).with_name("enqueue_harness.cpp")


class _Field(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [("dims", ctypes.c_int64 * 8), ("rank", ctypes.c_int32), ("dtype", ctypes.c_int32)]


def _tensors(tensors: Sequence[DeviceTensor]) -> Any:
    made = (_Tensor * len(tensors))()
    for one, tensor in zip(made, tensors, strict=True):
        one.rank, one.dtype = len(tensor.shape), contract.DTYPE_CODES[tensor.dtype]
        for axis, size in enumerate(tensor.shape):
            one.dims[axis] = size
    return made


def _described(call: KernelCall) -> tuple[Any, int, Any, int]:
    return _tensors(call.inputs), len(call.inputs), _tensors(call.outputs), len(call.outputs)


def _addresses(tensors: Sequence[DeviceTensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.address for tensor in tensors))


@dataclass(frozen=True)
class Harness:
    """``enqueue_harness.cpp``, compiled, and the library whose plugins it drives."""

    code: ctypes.CDLL
    get_creators: ctypes.c_void_p

    def log(self) -> str:
        return str(self.code.harness_log().decode(errors="replace"))

    def create(self, op: contract.Op, attributes: Attributes) -> int:
        """A plugin as the ONNX parser makes it; 0 where the creator refuses."""
        kept: list[Any] = []
        fields = (_Field * len(op.attributes))()
        for field, attribute in zip(fields, op.attributes, strict=True):
            value = attributes[attribute.name]
            if attribute.kind == "string":
                data: Any = ctypes.create_string_buffer(value.encode())
            else:
                data = (ctypes.c_int32 if attribute.kind == "int" else ctypes.c_float)(value)
            kept.append(data)
            field.name, field.kind = attribute.name.encode(), ("int", "float", "string").index(attribute.kind)
            field.length, field.data = len(data) if attribute.kind == "string" else 1, ctypes.addressof(data)
        return int(self.code.harness_create(self.get_creators, op.name.encode(), fields, len(fields)) or 0)

    def engine(self, call: KernelCall) -> tuple[int, int]:
        """(a plugin that went through a plan and is attached to a context, bytes of its workspace). Raises KernelError."""
        code, name, shapes = self.code, call.op.name.encode(), _described(call)
        plugin = self.create(call.op, dict(call.attributes))
        if not plugin:
            raise KernelError(f"createPlugin gave none: {self.log()}")
        status = code.harness_configure(plugin, *shapes)
        if status:
            raise KernelError(f"the builder's step {status} failed: {self.log()}")
        size = code.harness_workspace(plugin, *shapes)
        read = code.harness_reload(self.get_creators, name, plugin)
        code.harness_destroy(plugin)
        attached = code.harness_attach(read) if read else None
        if read:
            code.harness_destroy(read)
        if not attached:
            raise KernelError(f"the plan could not be read: {self.log()}")
        if code.harness_shapes(attached, *shapes):
            raise KernelError(f"onShapeChange refused: {self.log()}")
        return int(attached), int(size)

    def enqueue(self, plugin: int, call: KernelCall, workspace: int, stream: int) -> int:
        addresses = _addresses(call.inputs), _addresses(call.outputs)
        return int(self.code.harness_enqueue(plugin, *_described(call), *addresses, workspace or None, stream or None))


def compile_harness(library: KernelLibrary, headers: Headers, folder: Path) -> Harness:
    """The harness for a library's plugins. Raises KernelError and MissingDependency."""
    out = folder / "harness.so"
    folders = [f"-isystem{path}" for path in headers.include_dirs]
    target = str(library.info["target"])
    command = [find_compiler(target), "-std=c++17", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", *folders, _SOURCE, "-o", out]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise KernelError(f"enqueue_harness.cpp does not compile: {run.stderr.strip().splitlines()[0]}")
    code, plugins = ctypes.CDLL(str(out)), ctypes.CDLL(str(library.path))
    pointer, count = ctypes.c_void_p, ctypes.c_int32
    shapes = [pointer, count, pointer, count]
    for name, result, arguments in (
        ("listen", None, [pointer]),
        ("log", ctypes.c_char_p, []),
        ("create", pointer, [pointer, ctypes.c_char_p, pointer, count]),
        ("configure", count, [pointer, *shapes]),
        ("workspace", ctypes.c_size_t, [pointer, *shapes]),
        ("reload", pointer, [pointer, ctypes.c_char_p, pointer]),
        ("attach", pointer, [pointer]),
        ("shapes", count, [pointer, *shapes]),
        ("enqueue", count, [pointer, *shapes, pointer, pointer, pointer, pointer]),
        ("destroy", None, [pointer]),
    ):
        function = getattr(code, f"harness_{name}")
        function.restype, function.argtypes = result, arguments
    code.harness_listen(ctypes.cast(plugins.setLoggerFinder, pointer))
    return Harness(code, ctypes.cast(plugins.getCreators, pointer))


def _disagreeing(call: KernelCall) -> KernelCall:
    """The call with a first input that claims one row more than the others have."""
    first = call.inputs[0]
    shape = (first.shape[0] + 1, *first.shape[1:])
    return KernelCall(
        call.op, [DeviceTensor(first.address, shape, first.dtype), *call.inputs[1:]], call.outputs, call.attributes
    )


def _run(machine: Machine, harness: Harness, placed: Placed) -> tuple[str, bool]:
    plugin, size = harness.engine(placed.call)
    # TensorRT promises nothing of where a workspace begins: at a multiple of 256 no more than elsewhere.
    workspace = machine.bytes(size + 128)[128:]
    try:
        with machine.stream() as stream:
            refused = harness.enqueue(plugin, _disagreeing(placed.call), workspace.data_ptr(), stream)
        log = harness.log()
        if not refused or f"bilevel.{placed.made.name}" not in log:
            return f"enqueue took a wrong shape (it returned {refused} and logged {log!r})", False
        with machine.stream() as stream:
            status = harness.enqueue(plugin, placed.call, workspace.data_ptr(), stream)
        if status:
            return f"enqueue returned {status}: {harness.log()}", False
        intact = machine.intact()
        measure, right = placed.judge()
        return measure + ("" if intact else "; WROTE BEHIND A TENSOR"), right and intact
    finally:
        harness.code.harness_destroy(plugin)


def plugins(machine: Machine, folder: Path, cases: Cases = CASES) -> Iterator[Result]:
    """Every plugin from a node's attributes to ``enqueue``; the library lies in ``folder``."""
    headers = find_headers()
    if isinstance(headers, str):
        yield Result("TensorRT plugin", "all operators", headers, None)
        return
    if not (folder / "library.so").is_file():
        yield Result("TensorRT plugin", "all operators", "there is no kernel library", None)
        return
    library = KernelLibrary(folder / "library.so")
    if library.info["tensorrt"] is None:
        yield Result("TensorRT plugin", "all operators", "the kernel library was built without NVIDIA's headers", None)
        return
    try:
        harness = compile_harness(library, headers, folder)
    except BilevelError as error:
        yield Result("TensorRT plugin", f"headers {headers.version}", str(error), False)
        return
    for made in cases.calls(machine):
        placed = place(machine, library, made)
        try:
            measure, right = _run(machine, harness, placed)
        except KernelError as error:
            measure, right = str(error), False
        size = "T" if made.name in ("ExpertRoute", "RoutedExperts") else "L"
        dtype = placed.call.inputs[0].dtype
        yield Result("TensorRT plugin", f"{made.name} {dtype} {size}={made.tokens}, headers {headers.version}", measure, right)
