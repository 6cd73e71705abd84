"""Checks of ``make gpu-test``, fourth part: the runtime's side of CUDA, ``runtime/backend/device_memory.py``. Needs
cuda-bindings and NumPy.

``device``: memory, copies, order, graphs, refusals. What a check finds does not depend on where the memory is, so
``tests/gpu/test_program.py`` drives all of them on the host, and plants errors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bilevel.errors import EngineError
from bilevel.runtime.backend.device_memory import CudaDevice, Memory
from bilevel.runtime.backend.dlpack import DeviceTensor, TokenIds
from tests.gpu.result import Result

NAME = "device memory"
SIZES = (1, 255, 4096, 1 << 22)
Make = Callable[[], Any]


def _bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def _read(device: Any, address: int, count: int) -> np.ndarray:
    host = np.empty(count, np.uint8)
    device.download(host, address)
    device.synchronize()
    return host


def _put(device: Any, data: np.ndarray) -> Memory:
    memory: Memory = device.allocate(data.nbytes)
    device.upload(memory.address, data)
    return memory


def copies(make: Make) -> Iterator[Result]:
    """Up and down again; what was given may be changed at once; cleared memory; strips and the gaps between them."""
    device, wrong = make(), 0
    for count in SIZES:
        data = _bytes(count)
        given = data.copy()
        memory = _put(device, given)
        given[:] = 0
        wrong += int((_read(device, memory.address, count) != data).sum())
    yield Result(NAME, f"up and down, up to {SIZES[-1]:,} bytes", f"{wrong} bytes differ", wrong == 0)
    dirty = 0
    for count in SIZES:
        _put(device, np.full(count, 255, np.uint8))  # and free it: the next allocation is likely to lie there
        memory = device.allocate(count, zeroed=True)
        dirty += int(_read(device, memory.address, count).any())
    yield Result(NAME, "allocated as zeros", f"{dirty} of {len(SIZES)} are not", dirty == 0)
    wrong = 0
    for width, pitch, source_pitch, count in ((3, 16, 0, 9), (256, 1024, 256, 33), (4, 8, 4, 1000), (64, 64, 64, 1)):
        source, target = _bytes(2048 * 64, 1)[: (source_pitch or pitch) * count], _bytes(pitch * count, 2)
        up, down = _put(device, source), _put(device, target)
        device.copy_strips(down.address, up.address, width, pitch, count, source_pitch)
        expected = target.reshape(count, pitch).copy()
        expected[:, :width] = source.reshape(count, source_pitch or pitch)[:, :width]
        wrong += int((_read(device, down.address, target.size) != expected.reshape(-1)).sum())
    yield Result(NAME, "strips, of two distances", f"{wrong} bytes differ", wrong == 0)


def order(make: Make, rounds: int = 50) -> Iterator[Result]:
    """Work on one stream is done in its order; another stream waits when it is told to."""
    device, other, wrong = make(), make(), 0
    count = SIZES[-1]
    one, two = _put(device, _bytes(count)), _put(device, _bytes(count))
    for seed in range(rounds):
        first, second = _bytes(count, 2 * seed), _bytes(count, 2 * seed + 1)
        device.upload(one.address, first)
        device.copy_strips(two.address, one.address, count, count, 1)
        device.upload(one.address, second)
        wrong += not np.array_equal(_read(device, two.address, count), first)
    yield Result(NAME, f"order of a stream, {rounds} times", f"{wrong} out of order", wrong == 0)
    wrong = 0
    for seed in range(rounds):
        data = _bytes(count, seed)
        device.upload(one.address, data)
        device.copy_strips(two.address, one.address, count, count, 1)
        device.order(other.stream)
        wrong += not np.array_equal(_read(other, two.address, count), data)
    yield Result(NAME, f"another stream waits, {rounds} times", f"{wrong} out of order", wrong == 0)


def graphs(make: Make) -> Iterator[Result]:
    """A capture runs nothing; a replay reads what is there then; a capture that fails leaves the stream usable."""
    device, count = make(), 4096
    source, target = _put(device, _bytes(count, 1)), _put(device, _bytes(count, 2))
    device.synchronize()
    launch = device.capture(lambda: device.copy_strips(target.address, source.address, count, count, 1))
    untouched = np.array_equal(_read(device, target.address, count), _bytes(count, 2))
    wrong = 0
    for seed in (3, 4, 5):
        device.upload(source.address, _bytes(count, seed))
        launch()
        wrong += not np.array_equal(_read(device, target.address, count), _bytes(count, seed))
    measure = f"{wrong} of 3 replays wrong" + ("" if untouched else "; CAPTURING RAN THE COPY")
    yield Result(NAME, "capture and replay", measure, wrong == 0 and untouched)

    def broken() -> None:
        raise EngineError("no")

    try:
        device.capture(broken)
        said = "nothing"
    except EngineError as error:
        said = str(error)
    usable = np.array_equal(_read(device, target.address, count), _bytes(count, 5))
    measure = f"it said {said!r}" + ("" if usable else "; THE STREAM IS NOT USABLE")
    yield Result(NAME, "a capture that fails", measure, said == "no" and usable)


def limits(make: Make) -> Iterator[Result]:
    """More memory than there is: one sentence, and everything goes on. What is dropped comes back."""
    device = make()
    try:
        device.allocate(1 << 50)
        said = "it was given"
    except EngineError as error:
        said = str(error)
    memory = _put(device, _bytes(64))
    usable = np.array_equal(_read(device, memory.address, 64), _bytes(64))
    right = "out of memory" in said and "use a smaller capacity, batch or chunk" in said and "\n" not in said
    yield Result(NAME, "more than there is", said + ("" if usable else "; NOTHING WORKS AFTER IT"), right and usable)
    before, size = device.free_bytes(), 64 << 20
    memory = device.allocate(size)
    held = before - device.free_bytes()
    del memory
    lost = before - device.free_bytes()
    yield Result(NAME, "memory comes back", f"{held:,} bytes of {size:,} taken, {lost:,} lost", held >= size // 2 > lost)


def dlpack(make: Make) -> Iterator[Result]:
    """PyTorch takes memory where it lies, and gives token ids that lie there."""
    if importlib.util.find_spec("torch") is None:
        yield Result("DLPack", "with PyTorch on the GPU", "PyTorch is not installed", None)
        return
    import torch

    device = make()
    on_host = device.dlpack_device[0] == 1
    if not on_host and not torch.cuda.is_available():
        yield Result("DLPack", "with PyTorch on the GPU", "this PyTorch sees no GPU", None)
        return
    memory = _put(device, np.arange(6, dtype=np.float32).view(np.uint8))
    taken = torch.from_dlpack(DeviceTensor(memory.address, (2, 3), "float32", device, memory))
    same = taken.data_ptr() == memory.address
    right = same and torch.equal(taken.cpu(), torch.arange(6.0).view(2, 3))
    yield Result("DLPack", "out, to PyTorch", "the same address" if same else "IT WAS COPIED", right)
    wrong = 0
    for dtype in (torch.int64, torch.int32):
        ids = torch.arange(12, dtype=dtype, device="cpu" if on_host else "cuda").view(3, 4) * 1000
        target = device.allocate(96)
        kept = TokenIds(ids, device)
        kept.put(target.address)
        found = _read(device, target.address, 96).view(np.int64)
        wrong += not np.array_equal(found, np.arange(12) * 1000)
    yield Result("DLPack", "in, token ids of PyTorch's", f"{wrong} of 2 differ", wrong == 0)


def device(make: Make = CudaDevice) -> Iterator[Result]:
    """All of them; where there is no cuda-bindings, a line that says so."""
    if make is CudaDevice and importlib.util.find_spec("cuda") is None:
        yield Result(NAME, "all checks", "cuda.bindings is not installed; pip install cuda-bindings", None)
        return
    for check in (copies, order, graphs, limits, dlpack):
        yield from check(make)
