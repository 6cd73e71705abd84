"""What the checks of ``make gpu-test`` run on, and how they say what they found. Needs PyTorch and nothing else beside bilevel.

The checks take a ``Machine`` and never ask what it is: a GPU here, in ``tests/gpu/test_program.py`` a stand-in on host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bilevel import contract
from bilevel.errors import BilevelError
from bilevel.plugins.launch.plans import RUNTIME_SIZES
from bilevel.plugins.library.assemblers import CHOICES
from bilevel.plugins.library.build import choose_assemblers, compile_kernels

Inputs = dict[str, Tensor]
Attributes = dict[str, Any]
UNWRITTEN = -7  # in int32 outputs before a call: no route and no expert is that
_GUARD_BYTES, _GUARD = 4096, 0xA5


class Machine:
    """One GPU by way of PyTorch. Every tensor it gives has a guard behind it, which ``intact`` looks at."""

    compile_all: Callable[..., Any] = staticmethod(compile_kernels)

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self._guards: list[Tensor] = []

    @property
    def arch(self) -> int:
        """Compute capability, as in 90."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def random(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def allocate(self, count: int) -> Tensor:
        """uint8 [count], uninitialised, at an address that is a multiple of 256."""
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def bytes(self, count: int) -> Tensor:
        """uint8 [count] of 255, which is NaN in every float type, and a guard behind it; its address is a multiple of 256."""
        raw = self.allocate(count + _GUARD_BYTES)
        assert raw.data_ptr() % 256 == 0, "PyTorch gave memory that is not aligned to 256 bytes"
        raw[:count] = 255
        raw[count:] = _GUARD
        self._guards.append(raw[count:])
        return raw[:count]

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of NaN, or of UNWRITTEN where it is of int32."""
        count = 1
        for size in shape:
            count *= size
        tensor = self.bytes(count * dtype.itemsize).view(dtype).view(*shape)
        return tensor.fill_(UNWRITTEN) if dtype == torch.int32 else tensor

    def put(self, tensor: Tensor) -> Tensor:
        """A copy that ends where the guard begins."""
        return self.blank(tensor.shape, tensor.dtype).copy_(tensor)

    def outputs(self, op: contract.Op, inputs: Inputs, attributes: Attributes) -> list[Tensor]:
        """Blank outputs of a call."""
        sizes = op.bind_shapes([x.shape for x in inputs.values()])
        dtypes = op.output_dtypes(dtype_name(next(iter(inputs.values()))))
        shapes = op.output_shapes(sizes, attributes)
        return [self.blank(shape, getattr(torch, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def intact(self) -> bool:
        """Whether nothing was written behind any tensor since the last time; forgets them."""
        self.synchronize()
        found = all(bool((guard == _GUARD).all()) for guard in self._guards)
        self._guards.clear()
        return found

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """The handle of a stream beside PyTorch's own; work before and after it is ordered."""
        side, own = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(own)
        yield side.cuda_stream
        own.wait_stream(side)

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        """``work(stream)`` as a CUDA graph; what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work(torch.cuda.current_stream(self.device).cuda_stream)
        return graph.replay

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])


def geometry_of(op: contract.Op, inputs: Inputs, attributes: Attributes) -> Mapping[str, Any]:
    sizes = op.bind_shapes([x.shape for x in inputs.values()])
    return {**{name: size for name, size in sizes.items() if name not in RUNTIME_SIZES}, **attributes}


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def choose_cuda(arch: int) -> str:
    """The ``cuda`` option of ``build_library`` for which this machine has an assembler. Raises BilevelError."""
    problem: BilevelError | None = None
    for cuda in CHOICES:
        try:
            choose_assemblers([arch], cuda)
            return cuda
        except BilevelError as error:
            problem = problem or error
    assert problem is not None
    raise problem
