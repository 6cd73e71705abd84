"""A GPU that is none: kernel libraries whose machine code is a number, launched through ``cuda.c`` into Triton's interpreter.

So the C launcher (checks, workspace, grids, arguments and their order) runs for real, on host memory, against the reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import contract
from bilevel.plugins.launch.launches import Launch
from bilevel.plugins.launch.plans import RUNTIME_SIZES
from bilevel.plugins.library.build import KernelRequest, build_library
from bilevel.plugins.library.compile import Compiled
from bilevel.plugins.library.gpu import DeviceTensor, KernelCall, KernelLibrary
from bilevel.plugins.library.source import CodeKey
from tests.support.operator_calls import Attributes, Inputs
from tests.support.triton_calls import triton_launch

DRIVER = "BILEVEL_CUDA_DRIVER"
_SCRATCH, _ID_BYTES, _ALIGNMENT = 2, 16, 256
_SOURCE = Path(__file__).parent / "cuda.c"
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)
_CODES: dict[bytes, Launch] = {}


def geometry_of(name: str, inputs: Inputs, attributes: Attributes) -> dict[str, Any]:
    sizes = contract.BY_NAME[name].bind_shapes([x.shape for x in inputs.values()])
    return {**{key: size for key, size in sizes.items() if key not in RUNTIME_SIZES}, **attributes}


def request_of(name: str, inputs: Inputs, attributes: Attributes) -> KernelRequest:
    dtype = str(next(iter(inputs.values())).dtype).removeprefix("torch.")
    return contract.BY_NAME[name], geometry_of(name, inputs, attributes), dtype


def number_kernels(
    wanted: Mapping[CodeKey, Launch], tools: Mapping[int, Any], jobs: int, on_progress: Any
) -> dict[CodeKey, Compiled]:
    """In place of ``compile_kernels``: code that the fake driver knows again."""
    made = {}
    for key, launch in wanted.items():
        code = b"%016d" % len(_CODES)
        _CODES[code] = launch
        made[key] = Compiled(launch.kernel, code, launch.tile.shared, 32 * launch.tile.warps, _SCRATCH)
        on_progress(len(made), len(wanted), launch.kernel)
    return made


def build(requests: Sequence[KernelRequest], out: Path, archs: Sequence[int] = (80,), **options: Any) -> KernelLibrary:
    return KernelLibrary(build_library(requests, archs, out, compile_all=number_kernels, **options).path)


class Memory:
    """Host memory that stands for a GPU's: tensors at aligned addresses, found again by address."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def put(self, tensor: Tensor, dtype: str = "") -> DeviceTensor:
        """A copy of a tensor."""
        raw = self.bytes(tensor.numel() * tensor.element_size())
        raw.copy_(tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else raw)
        return DeviceTensor(raw.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def bytes(self, count: int, fill: int = 255) -> Tensor:
        """uint8 [count], aligned; 255 is NaN in every float type."""
        block = torch.full((count + 2 * _ALIGNMENT,), fill, dtype=torch.uint8)
        first = -block.data_ptr() % _ALIGNMENT
        self._blocks.append(block[first : first + count + 1])  # one byte more: an empty tensor has an address too
        return block[first : first + count]

    def at(self, address: int, dtype: torch.dtype) -> Tensor:
        """What lies at an address, to the end of its block."""
        for block in self._blocks:
            if block.data_ptr() <= address < block.data_ptr() + block.numel():
                rest = block[address - block.data_ptr() : -1]
                return rest[: rest.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        raise AssertionError(f"a kernel was given the address {address:#x}, which nobody allocated")

    def read(self, tensor: DeviceTensor) -> Tensor:
        dtype = getattr(torch, tensor.dtype)
        count = int(np.prod(tensor.shape))
        return self.at(tensor.address, dtype)[:count].view(tensor.shape).clone()


class Gpu:
    """The fake driver, configured; ``errors`` holds what a callback raised."""

    def __init__(self, driver: ctypes.CDLL, memory: Memory) -> None:
        self.driver, self.memory = driver, memory
        self.errors: list[BaseException] = []
        self._callback = _LAUNCH(self._launch)
        self.configure()

    def configure(self, version: int = 13000, capability: int = 80, context: bool = True, load_result: int = 0) -> None:
        self.driver.fake_configure(version, capability, int(context), load_result, self._callback)

    def _launch(
        self, image: int, symbol: bytes, grid: Any, threads: int, shared: int, stream: int | None, parameters: Any
    ) -> int:
        try:
            launch = _CODES[ctypes.string_at(image, _ID_BYTES)]
            assert symbol.decode() == launch.kernel and threads == 32 * launch.tile.warps and shared == launch.tile.shared
            count = len(launch.arguments)
            values = [self._value(a.kind, parameters[n]) for n, a in enumerate(launch.arguments)]
            scratch = [ctypes.cast(parameters[count + n], ctypes.POINTER(ctypes.c_void_p))[0] for n in range(_SCRATCH)]
            assert scratch == [None] * _SCRATCH
            kernel = getattr(__import__(f"bilevel.plugins.kernels.{launch.module}", fromlist=["_"]), launch.kernel)
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                kernel[tuple(grid[:3])](*values, **launch.constants)
            return 0
        except BaseException as error:  # noqa: BLE001 (nothing may pass through the C code that calls)
            self.errors.append(error)
            return 999

    def _value(self, kind: str, place: int) -> Any:
        if kind.startswith("*"):
            address = ctypes.cast(place, ctypes.POINTER(ctypes.c_void_p))[0]
            return self.memory.at(address or 0, getattr(torch, kind[1:]))
        number = ctypes.c_int32 if kind == "int32" else ctypes.c_float
        return ctypes.cast(place, ctypes.POINTER(number))[0]


@functools.cache
def _driver(folder: Path) -> ctypes.CDLL:
    assert triton_launch  # Triton's interpreter is set up before a kernel is loaded
    out = folder / "libfakecuda.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", _SOURCE, "-o", out], check=True)
    return ctypes.CDLL(str(out))


@contextmanager
def fake_gpu(folder: Path) -> Iterator[Gpu]:
    """The fake driver as the driver of libraries that are opened in this time. folder: where it is built, once."""
    before = os.environ.get(DRIVER)
    gpu = Gpu(_driver(folder), Memory())
    os.environ[DRIVER] = str(folder / "libfakecuda.so")
    try:
        yield gpu
    finally:
        os.environ.pop(DRIVER)
        if before is not None:
            os.environ[DRIVER] = before
        assert not gpu.errors, gpu.errors


def call_of(memory: Memory, name: str, inputs: Inputs, attributes: Attributes) -> KernelCall:
    """The call with its tensors in ``memory``; outputs hold NaN or -1."""
    op = contract.BY_NAME[name]
    sizes = op.bind_shapes([x.shape for x in inputs.values()])
    kind = str(next(iter(inputs.values())).dtype).removeprefix("torch.")
    outputs = []
    for shape, dtype in zip(op.output_shapes(sizes, attributes), op.output_dtypes(kind), strict=True):
        raw = memory.bytes(int(np.prod(shape)) * getattr(torch, dtype).itemsize)
        outputs.append(DeviceTensor(raw.data_ptr(), shape, dtype))
    return KernelCall(op, [memory.put(x) for x in inputs.values()], outputs, attributes)
