"""A library that ``bilevel kernels build`` made, from Python: ``csrc/gpu/bilevel_kernels.h`` by ctypes (standard library only).

``KernelLibrary.info`` is the library's own description (``read_info`` finds it in a library for another machine too):
library: "bilevel kernels" · abi: int · bilevel: version that built it · target: "x86_64" or "aarch64" ·
operators: {name: version} · architectures: {"87": CUDA version of its machine code, as in "12.6"} ·
shared: {"87": bytes of shared memory that the largest of these kernels takes} ·
variants: list of {op, dtype, geometry: {size or attribute: value}} ·
tensorrt: version of the headers that its TensorRT plugins were built with, None where it has none.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel import contract
from bilevel.errors import KernelError
from bilevel.folders import file_sha256
from bilevel.machine import SHARED_LIMIT, runs_on

ABI, MARK = 1, "bilevel kernels"
_REMEDY = "build one: bilevel kernels build --geometry BUNDLE"
STATUSES = (
    "OK",
    "BAD_ARGUMENT",
    "NOT_BUILT",
    "NO_DRIVER",
    "NO_ARCHITECTURE",
    "WORKSPACE_TOO_SMALL",
    "CUDA_ERROR",
    "OUT_OF_MEMORY",
)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class _Attribute(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("number", ctypes.c_double), ("text", ctypes.c_char_p)]


class _Call(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("op", ctypes.c_char_p),
        ("num_inputs", ctypes.c_int32),
        ("inputs", ctypes.POINTER(_Tensor)),
        ("num_outputs", ctypes.c_int32),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("num_attributes", ctypes.c_int32),
        ("attributes", ctypes.POINTER(_Attribute)),
    ]


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in a GPU's memory; ``address`` is a multiple of 16. dtype: a key of ``contract.DTYPE_CODES``."""

    address: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class KernelCall:
    """One call of an operator: its tensors in the contract's order, all of its attributes."""

    op: contract.Op
    inputs: Sequence[DeviceTensor]
    outputs: Sequence[DeviceTensor]
    attributes: Mapping[str, int | float | str]


def _tensors(tensors: Sequence[DeviceTensor]) -> Any:
    array = (_Tensor * len(tensors))()
    for place, tensor in zip(array, tensors, strict=True):
        dims = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
        place.data, place.rank, place.dtype = (
            tensor.address or None,
            len(tensor.shape),
            contract.DTYPE_CODES.get(tensor.dtype, 0),
        )
        place.dims = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64))
    return array


def _attributes(values: Mapping[str, int | float | str]) -> Any:
    array = (_Attribute * len(values))()
    for place, (name, value) in zip(array, values.items(), strict=True):
        place.name = name.encode()
        if isinstance(value, str):
            place.text = value.encode()
        else:
            place.number = value
    return array


def serves(info: Mapping[str, Any], capability: int) -> bool:
    """Whether kernels of a library run on a GPU: by the kind of its code, and by the shared memory that all of them get."""
    room, shared = SHARED_LIMIT.get(capability, 0), info.get("shared", {})
    return any(runs_on(int(code), capability) and shared.get(code, 0) <= room for code in info["architectures"])


def read_info(path: Path) -> dict[str, Any]:
    """The description in a library's file, which is read, not loaded. Raises KernelError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KernelError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None
    start = content.find(b'{"library": "%s", "abi": ' % MARK.encode())
    if start < 0:
        raise KernelError(f"{path} is no kernel library; {_REMEDY}")
    return dict(json.loads(content[start : content.index(b"\0", start)]))


def trusted_file() -> Path:
    """Where the SHA-256 of the libraries that this user built or trusts stand, one a line."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "bilevel" / "kernel-libraries"


def trust(library: Path) -> None:
    """Let a library be loaded from a bundle, where it is native code that came with data. Raises KernelError."""
    read_info(library)
    digest, path = file_sha256(library), trusted_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="ascii") as file:
            file.write(f"{digest}\n")
    except OSError as error:
        raise KernelError(
            f"{path} cannot be written ({error.strerror}); give the library with --library FILE instead"
        ) from None


def distrust_problem(library: Path) -> str:
    """Why a library that lies in a bundle is not loaded; "" where this user built or trusts it."""
    try:
        trusted = trusted_file().read_text(encoding="ascii").split()
    except (OSError, ValueError):
        trusted = []
    if file_sha256(library) in trusted:
        return ""
    return (
        f"{library} is native code that came with the bundle, and this user neither built nor trusted it; "
        f"give it with --library, or trust it: bilevel kernels trust {library}"
    )


def needed_versions(path: Path) -> dict[str, str]:
    """The oldest glibc and libstdc++ symbol versions that a library runs with: {"GLIBC": "2.34", "GLIBCXX": "3.4.29"}."""
    content = path.read_bytes()
    needed = {}
    for name in ("GLIBC", "GLIBCXX"):
        versions = re.findall(rb"\0%s_([0-9.]+)(?=\0)" % name.encode(), content)
        if versions:
            numbers = [version.decode() for version in versions]
            needed[name] = max(numbers, key=lambda number: [int(part) for part in number.split(".")])
    return needed


class KernelLibrary:
    """An opened library. Raises KernelError for a file that is none, or is of another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            self._library.bilevel_library_info.restype = ctypes.c_char_p
            self._library.bilevel_last_error.restype = ctypes.c_char_p
            self._library.bilevel_num_copies.restype = ctypes.c_uint64
            abi = int(self._library.bilevel_abi_version())
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path} is no kernel library for this machine ({error}); {_REMEDY}") from None
        if abi != ABI:
            raise KernelError(f"{path} has interface version {abi}, this bilevel reads {ABI}; {_REMEDY}")
        self.info: dict[str, Any] = json.loads(self._library.bilevel_library_info())

    def _check(self, status: int) -> None:
        if status:
            sentence = self._library.bilevel_last_error().decode(errors="replace")
            raise KernelError(f"{self.path.name}: {sentence} ({STATUSES[status]})")

    @staticmethod
    def _call(call: KernelCall) -> _Call:
        parts = (_tensors(call.inputs), _tensors(call.outputs), _attributes(call.attributes))
        inputs, outputs, attributes = parts
        c_call = _Call(ctypes.sizeof(_Call), call.op.name.encode())
        c_call.num_inputs, c_call.inputs = len(inputs), ctypes.cast(inputs, ctypes.POINTER(_Tensor))
        c_call.num_outputs, c_call.outputs = len(outputs), ctypes.cast(outputs, ctypes.POINTER(_Tensor))
        c_call.num_attributes, c_call.attributes = len(attributes), ctypes.cast(attributes, ctypes.POINTER(_Attribute))
        return c_call

    def workspace_size(self, call: KernelCall, arch: int = 0) -> int:
        """Bytes that suffice for this call and every smaller one on ``arch`` (0: on any). Raises KernelError."""
        size = ctypes.c_size_t()
        self._check(self._library.bilevel_workspace_size(ctypes.byref(self._call(call)), arch, ctypes.byref(size)))
        return size.value

    def num_copies(self) -> int:
        """How many calls of WriteCache copied the whole cache so far, because their output lay elsewhere."""
        return int(self._library.bilevel_num_copies())

    def prepare(self, call: KernelCall) -> None:
        """Load what calls of this geometry need into the current GPU. Raises KernelError."""
        self._check(self._library.bilevel_prepare(ctypes.byref(self._call(call))))

    def launch(self, call: KernelCall, workspace: int = 0, workspace_bytes: int = 0, stream: int = 0) -> None:
        """Enqueue the call; workspace: an address that is a multiple of 256. Raises KernelError."""
        status = self._library.bilevel_launch(
            ctypes.byref(self._call(call)),
            ctypes.c_void_p(workspace or None),
            ctypes.c_size_t(workspace_bytes),
            ctypes.c_void_p(stream or None),
        )
        self._check(status)
