"""Memory of a GPU for other libraries, and token ids from them, by the DLPack protocol: no copy out, none over the bus in.

torch.from_dlpack(caches.tensor("past.key.0"))      # PyTorch's, CuPy's or JAX's view of the same memory
caches.run(torch_ids_on_the_gpu, past_len, new_len)

None of these libraries is needed. NumPy makes the capsules: of an array that is never read, whose address is the GPU's, so that
memory is kept and released by NumPy's own C code, on any thread and at the interpreter's end.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.tensors import DTYPES
from bilevel.errors import RequestError

CPU, CUDA, CUDA_HOST = 1, 2, 3  # DLDeviceType
_LEGACY, _VERSIONED = b"dltensor", b"dltensor_versioned"
_BFLOAT = 4  # DLDataTypeCode; 0 is a signed integer
_NO_SYNC, _AMBIGUOUS = -1, 0  # values of a stream that are none


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


def _tensor_of(capsule: Any) -> _Tensor:
    """The tensor that a capsule describes, which lives as long as the capsule."""
    if _is_valid(capsule, _VERSIONED):
        return _ManagedVersioned.from_address(_pointer(capsule, _VERSIONED)).tensor
    return _Managed.from_address(_pointer(capsule, _LEGACY)).tensor


class OnDevice(Protocol):
    """What is asked of a device."""

    stream: int

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """(DLDeviceType, index) of its memory."""

    def order(self, stream: int) -> None:
        """Have a stream wait for everything enqueued here."""

    def synchronize(self) -> None:
        """Wait for everything enqueued here."""

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to an address."""

    def clear(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""

    def copy_strips(self, target: int, source: int, width: int, pitch: int, count: int, source_pitch: int = 0) -> None:
        """See ``CudaDevice.copy_strips``."""


@dataclass(frozen=True)
class DeviceTensor:
    """Memory of a device, dense and in C order.

    dtype: a key of DTYPES. owner: kept alive as long as a capsule or an array made of it.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    device: OnDevice
    owner: object

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.dlpack_device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule, versioned where the consumer knows it.

        stream: the consumer's, which waits for what is enqueued (-1: it need not). Raises BufferError for a copy or another
        device, ValueError for stream 0, which names no stream.
        """
        kind, index = self.device.dlpack_device
        if copy or dl_device not in (None, (kind, index)):
            raise BufferError(f"this tensor is handed out where it lies, on device {(kind, index)}; copy it there")
        if stream == _AMBIGUOUS:
            raise ValueError("stream=0 names no stream; give 1 for the legacy default stream, 2 for the thread's")
        if kind == CPU:
            self.device.synchronize()
        elif stream != _NO_SYNC:
            self.device.order(1 if stream is None else stream)
        capsule = self._capsule(max_version)
        tensor = _tensor_of(capsule)
        tensor.device_type, tensor.device_id = kind, index
        if self.dtype == "bfloat16":
            tensor.code = _BFLOAT
        return capsule

    def _capsule(self, max_version: tuple[int, int] | None) -> Any:
        kind = DTYPES[self.dtype].numpy
        buffer: Any = (ctypes.c_char * (math.prod(self.shape) * kind.itemsize)).from_address(self.address)
        buffer.owner = self.owner
        array = np.frombuffer(buffer, kind).reshape(self.shape)
        try:
            return array.__dlpack__(max_version=max_version)
        except TypeError:  # NumPy before 2.1 knows the legacy capsule alone
            return array.__dlpack__()


class TokenIds:
    """Token ids [B, L] of int64 or int32: a NumPy array, or anything with ``__dlpack__`` in the host's memory or the device's.

    What lies on the device is not looked at: an id outside the vocabulary is the caller's to avoid. Raises RequestError.
    """

    def __init__(self, ids: Any, device: OnDevice) -> None:
        self._device, self._address = device, 0
        self._source: Any = ids
        if not isinstance(ids, np.ndarray) and not hasattr(ids, "__dlpack_device__"):
            raise RequestError(f"input_ids is a {type(ids).__name__}; give a NumPy array, or a tensor that speaks DLPack")
        place = (CPU, 0) if isinstance(ids, np.ndarray) else tuple(map(int, ids.__dlpack_device__()))
        if place[0] != CPU and place == tuple(device.dlpack_device):
            self._take(ids)
        elif place[0] in (CPU, CUDA_HOST):
            self._source = ids if isinstance(ids, np.ndarray) else np.from_dlpack(ids)
            self._check(self._source.shape, str(self._source.dtype))
        else:
            raise RequestError(
                f"input_ids lie on device {place} (DLPack's numbers), the caches on {tuple(device.dlpack_device)}; "
                "move them there"
            )

    def _check(self, shape: tuple[int, ...], dtype: str) -> None:
        if len(shape) != 2 or dtype not in ("int64", "int32"):
            raise RequestError(f"input_ids is {dtype} {list(shape)}; give int64 or int32 ids [rows, tokens]")
        self.shape, self._itemsize = shape, 8 if dtype == "int64" else 4

    def _take(self, ids: Any) -> None:
        """Keep what lies on the device, which is ready for our stream from here on."""
        try:
            self._source = ids.__dlpack__(stream=self._device.stream, max_version=(1, 0))
        except TypeError:  # of a producer older than the versioned capsule
            self._source = ids.__dlpack__(stream=self._device.stream)
        tensor = _tensor_of(self._source)
        shape = tuple(tensor.shape[: tensor.ndim])
        name = {0: "int", 1: "uint", 2: "float", _BFLOAT: "bfloat"}.get(tensor.code, "code") + str(tensor.bits)
        self._check(shape, name if tensor.lanes == 1 else f"{name}x{tensor.lanes}")
        if tensor.strides and any(
            size > 1 and step != dense for size, step, dense in zip(shape, tensor.strides[:2], (shape[1], 1), strict=True)
        ):
            raise RequestError("input_ids are not contiguous on the GPU; copy them into a dense tensor")
        self._address = tensor.data + tensor.byte_offset

    def put(self, address: int) -> None:
        """Enqueue the copy to int64 [B, L] at an address of the device; this object is kept until it is done."""
        count = math.prod(self.shape)
        if not self._address:
            self._device.upload(address, np.ascontiguousarray(self._source, np.int64))
        elif self._itemsize == 8:
            self._device.copy_strips(address, self._address, 8 * count, 8 * count, 1)
        else:  # ids are not negative: the upper halves are zero
            self._device.clear(address, 8 * count)
            self._device.copy_strips(address, self._address, 4, 8, count, 4)
