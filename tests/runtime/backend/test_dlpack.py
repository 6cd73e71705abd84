"""Memory handed to other libraries and taken from them; the GPU's is the host's here, under its own or another name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.errors import RequestError
from bilevel.runtime.backend.dlpack import CPU, CUDA, DeviceTensor, TokenIds, _tensor_of
from tests import ROOT
from tests.doubles.tensorrt import FakeDevice
from tests.runtime.backend.test_onnx_cuda import Use, open_cuda, use  # noqa: F401


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def make(device: FakeDevice, dtype: str = "float32") -> DeviceTensor:
    """Six numbers on the device: 0 to 5."""
    memory = device.allocate(48)
    if dtype != "bfloat16":
        device.upload(memory.address, np.arange(6, dtype=dtype))
    return DeviceTensor(memory.address, (2, 3), dtype, device, memory)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64", "int8"])
def test_consumers_share_the_memory_and_keep_it(dtype: str, device: FakeDevice) -> None:
    """Written by one, read by the other; the memory goes back when the last of them is gone."""
    device.dlpack_device = (CPU, 0)
    tensor = make(device, dtype)
    array, other = np.from_dlpack(tensor), torch.from_dlpack(tensor)
    assert array.ctypes.data == other.data_ptr() == tensor.address
    np.testing.assert_array_equal(array, np.arange(6, dtype=dtype).reshape(2, 3))
    other[1, 2] = 77
    assert array[1, 2] == 77 and str(array.dtype) == dtype
    del tensor, other
    assert device.used == 48 and array[0, 1] == 1
    del array
    assert device.used == 0


def test_bfloat16(device: FakeDevice) -> None:
    device.dlpack_device = (CPU, 0)
    tensor = make(device, "bfloat16")
    taken = torch.from_dlpack(tensor)
    taken.fill_(1.5)
    assert taken.dtype == torch.bfloat16 and device.array(tensor.address, (6,), np.uint16).tolist() == [0x3FC0] * 6
    with pytest.raises((BufferError, RuntimeError), match="(?i)dtype"):  # NumPy has none, and says so
        np.from_dlpack(tensor)
    del taken, tensor
    assert device.used == 0


@pytest.mark.parametrize("version", [None, (1, 0), (1, 1)])
def test_a_capsule_that_nobody_takes(version: Any, device: FakeDevice) -> None:
    """Legacy or versioned as asked; it says where the memory is, and lets go of it."""
    tensor = make(device)
    capsule = tensor.__dlpack__(max_version=version)
    assert ("versioned" in repr(capsule)) == (version is not None)
    described = _tensor_of(capsule)
    assert (described.device_type, described.device_id, described.data) == (CUDA, 0, tensor.address)
    del tensor
    assert device.used == 48
    del capsule
    assert device.used == 0


def test_streams(device: FakeDevice) -> None:
    """The consumer's stream is made to wait, unless it asks not to; none given is the legacy default stream."""
    tensor = make(device)
    for stream in (None, 2, 4096, -1):
        tensor.__dlpack__(stream=stream)
    assert device.ordered == [1, 2, 4096]
    with pytest.raises(ValueError, match="stream=0 names no stream; give 1"):
        tensor.__dlpack__(stream=0)
    for asked in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="handed out where it lies, on device .2, 0.; copy it there"):
            tensor.__dlpack__(**asked)
    tensor.__dlpack__(dl_device=(2, 0), copy=False)


def test_consumers_that_outlive_the_interpreter() -> None:
    """Whatever is torn down first, the program ends well."""
    program = (
        "import numpy, torch\nfrom tests.runtime.backend.test_dlpack import FakeDevice, make\ndevice = FakeDevice()\n"
        "device.dlpack_device = (1, 0)\n"
        "kept = numpy.from_dlpack(make(device)), torch.from_dlpack(make(device)), make(device).__dlpack__()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


class Elsewhere:
    """A tensor of another library: host memory that it says is a GPU's. is_old: from before the versioned capsule."""

    def __init__(self, array: np.ndarray, place: tuple[int, int] = (CUDA, 0), is_old: bool = False) -> None:
        self.array, self.place, self.is_old, self.streams = array, place, is_old, []  # type: ignore[var-annotated]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place

    def __dlpack__(self, *, stream: int, **asked: Any) -> Any:
        if self.is_old and asked:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.streams.append(stream)
        return self.array.__dlpack__(**asked)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_ids_from_the_device(dtype: Any, is_old: bool, device: FakeDevice) -> None:
    source = np.array([[1, 2, 3], [4, 5, 60000]], dtype)
    memory, other = device.allocate(48), Elsewhere(source, is_old=is_old)
    ids = TokenIds(other, device)
    ids.put(memory.address)
    device.synchronize()
    np.testing.assert_array_equal(device.array(memory.address, (2, 3), np.int64), source)
    assert other.streams == [device.stream] and ids.shape == (2, 3), "the producer makes our stream wait"
    assert device.num_downloads == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_from_the_host(dtype: Any, device: FakeDevice) -> None:
    memory, source = device.allocate(48), torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype).T
    TokenIds(source, device).put(memory.address)
    device.synchronize()
    np.testing.assert_array_equal(device.array(memory.address, (3, 2), np.int64), source.numpy())


@pytest.mark.parametrize(
    "ids, sentence",
    [
        ([[1, 2]], "input_ids is a list; give a NumPy array, or a tensor that speaks DLPack"),
        (np.zeros((2, 3), np.float32), r"input_ids is float32 \[2, 3\]; give int64 or int32 ids \[rows, tokens\]"),
        (np.zeros(3, np.int64), r"input_ids is int64 \[3\]; give int64 or int32"),
        (torch.zeros((2, 3)), r"input_ids is float32 \[2, 3\]; give int64"),
        (Elsewhere(np.zeros((2, 3), np.float16)), r"input_ids is float16 \[2, 3\]; give int64"),
        (Elsewhere(np.zeros((2, 3), np.uint32)), r"input_ids is uint32 \[2, 3\]; give int64"),
        (Elsewhere(np.zeros((1, 2, 3), np.int64)), r"input_ids is int64 \[1, 2, 3\]; give int64"),
        (Elsewhere(np.zeros((3, 2), np.int64).T), "input_ids are not contiguous on the GPU; copy them into a dense tensor"),
        (
            Elsewhere(np.zeros((2, 3), np.int64), (CUDA, 1)),
            r"input_ids lie on device \(2, 1\) .DLPack's numbers., the caches on \(2, 0\); move them there",
        ),
    ],
)
def test_what_is_no_ids(ids: Any, sentence: str, device: FakeDevice) -> None:
    with pytest.raises(RequestError, match=sentence):
        TokenIds(ids, device)


def test_rows_of_a_session(exported: Any, device: FakeDevice, use: Use) -> None:  # noqa: F811
    """Ids in, logits and caches out, as a program around it would: the same numbers, at the caches' own addresses."""
    bundle = exported("two_level")[1]
    use()
    caches = open_cuda(bundle, device).allocate(1, 16)
    zero, three = np.zeros(1, np.int32), np.full(1, 3, np.int32)
    expected = np.array(caches.run(np.array([[1, 2, 3]]), zero, three))
    logits = caches.run(Elsewhere(np.array([[1, 2, 3]], np.int32)), zero, three)
    device.dlpack_device = (CPU, 0)
    np.testing.assert_array_equal(torch.from_dlpack(logits).numpy(), expected)
    keys = torch.from_dlpack(caches.tensor("past.key.0"))
    assert keys.abs().sum() > 0 and keys.shape[0] == 1 and keys.data_ptr() == caches.tensor("past.key.0").address
    caches.run(np.array([[4]]), three, np.ones(1, np.int32))
    with pytest.raises(RequestError, match="the logits of an earlier call are gone"):
        torch.from_dlpack(logits)
    with pytest.raises(RequestError, match="there is no tensor 'keys' on the GPU; take one of logits, "):
        caches.tensor("keys")
    held = device.used
    del caches, logits
    assert 0 < device.used < held and keys.abs().sum() > 0
