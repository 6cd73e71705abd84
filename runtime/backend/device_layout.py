"""Where rows lie in a GPU's memory: their caches, what calls read, what calls give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bilevel.bundle.format import Bundle
from bilevel.bundle.manifest import CALL_INPUTS
from bilevel.bundle.tensors import DTYPES, TensorSpec
from bilevel.errors import RequestError
from bilevel.runtime.backend.device_memory import CudaDevice, Memory

ALIGNMENT = 256  # bytes; of every address that a backend is given


class DeviceSession(Protocol):
    """What the rows ask of their session. results: outputs that are no caches. longest: most new tokens of a call.

    only_read: caches of token ids that the backend does not write.
    """

    bundle: Bundle
    gpu: CudaDevice
    results: tuple[TensorSpec, ...]
    only_read: tuple[TensorSpec, ...]
    longest: int


@dataclass(frozen=True)
class Place:
    """Where a result of a call lies in the results' memory. offset: in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def end(self) -> int:
        """One byte past its last."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def result_places(results: Iterable[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Place]:
    """Where the results of a call lie: one behind the other, so that a copy takes several."""
    places: dict[str, Place] = {}
    offset = 0
    for spec in results:
        places[spec.name] = place = Place(offset, spec.resolve(sizes), DTYPES[spec.dtype].numpy)
        offset = -(-place.end // ALIGNMENT) * ALIGNMENT
    return places


@dataclass
class Buffers:
    """What calls read and what they give, shared by rows that are cut out of others. num_calls: of all who share."""

    call: dict[str, Memory]
    results: Memory
    num_calls: int = 0


@dataclass(frozen=True)
class RowMemory:
    """The memory of some rows. state: {input of a cache: (its memory, the address of the first of these rows)}."""

    state: dict[str, tuple[Memory, int]]
    buffers: Buffers

    @classmethod
    def allocate(cls, session: DeviceSession, batch: int, capacity: int) -> RowMemory:
        """Zeroed caches for ``batch`` rows, and buffers for their longest call.

        Raises EngineError where the GPU has no room.
        """
        bundle, gpu = session.bundle, session.gpu
        sizes = bundle.sizes(batch, capacity)
        caches = {spec.name: gpu.allocate(spec.num_bytes(sizes), zeroed=True) for spec, _ in bundle.graph.state}
        longest = {**sizes, "new_tokens": session.longest}
        call = {spec.name: gpu.allocate(spec.num_bytes(longest)) for spec in bundle.graph.inputs if spec.name in CALL_INPUTS}
        # A backend wants an address for every output, those that are never read included.
        results = gpu.allocate(max(place.end for place in result_places(session.results, longest).values()))
        return cls({name: (memory, memory.address) for name, memory in caches.items()}, Buffers(call, results))

    def from_row(self, first: int, bundle: Bundle, capacity: int) -> RowMemory:
        """That of the rows from ``first`` on. Raises RequestError where a row does not begin where a backend reads."""
        state = {}
        for spec, _ in bundle.graph.state:
            memory, address = self.state[spec.name]
            size = spec.num_bytes(bundle.sizes(1, capacity))
            if size % ALIGNMENT and first:
                raise RequestError(
                    f"a row of the cache {spec.name} takes {size} bytes, a GPU reads from multiples of {ALIGNMENT}; "
                    "take another --capacity (of an engine: when it is built)"
                )
            state[spec.name] = (memory, address + first * size)
        return RowMemory(state, self.buffers)
