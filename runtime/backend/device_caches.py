"""Rows in a GPU's memory: what engines (``engine``) and ONNX Runtime's CUDA provider (``onnx_cuda``) have in common.

An input of the caches and its output lie at one address. Tokens go up to the GPU; logits and routes stay there until they are
read, and are then copied in one piece. A call of one token per row is an exception: its logits, or the best of them where the
engine ranks them, are copied at once, because a sampler always reads them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.manifest import CALL_INPUTS
from bilevel.bundle.tensors import DTYPES, TensorSpec
from bilevel.errors import RequestError
from bilevel.runtime.backend.device_layout import DeviceSession, Place, RowMemory, result_places
from bilevel.runtime.backend.device_results import DeviceLogits, DeviceRoutes
from bilevel.runtime.backend.dlpack import DeviceTensor, TokenIds
from bilevel.runtime.backend.session import RouteArrays, Routes

_Self = TypeVar("_Self", bound="DeviceCaches")


@dataclass(frozen=True)
class Strips:
    """Part of a cache's row: ``count`` strips of ``width`` bytes, ``pitch`` apart; rows are ``row`` bytes apart."""

    spec: TensorSpec
    address: int
    row: int
    width: int
    pitch: int
    count: int


class DeviceCaches(ABC):
    """See ``Caches``. A backend says how a call is prepared and executed. memory: these rows' own, or a part of other rows'."""

    gives_scores = False  # an engine gives each row's last logits only

    def __init__(self, session: DeviceSession, batch: int, capacity: int, memory: RowMemory) -> None:
        self.batch, self.capacity = batch, capacity
        self.last_call, self._length = 0, 1
        self._routes: Routes | None = None
        self._session, self._gpu, self._bundle = session, session.gpu, session.bundle
        self._memory, self._state, self._buffers = memory, memory.state, memory.buffers
        self._places: dict[int, dict[str, Place]] = {}
        self._hosts: dict[tuple[str, ...], NDArray[np.uint8]] = {}
        self._names = self._route_names()

    @property
    def vocab_size(self) -> int:
        """The number of a row's logits."""
        return self._bundle.vocab_size

    @abstractmethod
    def _prepare(self, length: int) -> None:
        """Get ready for a call of ``length`` tokens a row. Raises RequestError where the backend does not take it."""

    @abstractmethod
    def _execute(self, length: int) -> None:
        """Enqueue the call that was prepared; its inputs have been uploaded."""

    @abstractmethod
    def rows(self: _Self, first: int, count: int) -> _Self:
        """See ``Caches.rows``."""

    def _memory_from(self, first: int) -> RowMemory:
        """The memory of the rows from ``first`` on. Raises RequestError where a row does not begin where a backend reads."""
        return self._memory.from_row(first, self._bundle, self.capacity)

    def _route_names(self) -> tuple[str, ...]:
        """The outputs that hold routes, in the order of the results; empty where the backend lacks one of them."""
        routes, results = self._bundle.graph.routes, [spec.name for spec in self._session.results]
        if routes is None:
            return ()
        names = {*routes.blocks, *routes.experts.values(), *([routes.candidates] if routes.candidates else [])}
        return tuple(name for name in results if name in names) if names <= set(results) else ()

    def places(self, length: int) -> dict[str, Place]:
        """Where the results of a call of ``length`` tokens a row lie."""
        if length not in self._places:
            sizes = {**self._bundle.sizes(self.batch, self.capacity), "new_tokens": length}
            self._places[length] = result_places(self._session.results, sizes)
        return self._places[length]

    def addresses(self, length: int) -> dict[str, int]:
        """The address of every input and output in a call of ``length`` tokens a row."""
        addresses = {name: memory.address for name, memory in self._buffers.call.items()}
        addresses |= {name: self._buffers.results.address + place.offset for name, place in self.places(length).items()}
        # An input and its output share the memory: new tokens are written where the old ones lie.
        for spec, output in self._bundle.graph.state:
            addresses[spec.name] = addresses[output] = self._state[spec.name][1]
        return addresses

    def score(self, lines: Sequence[int], columns: Sequence[int]) -> NDArray[np.float32]:
        """See ``Caches.score``."""
        raise RequestError("this backend gives each row's last logits only; use --backend onnx for those of other tokens")

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """See ``Caches.copy_prefix``."""
        for strips in self._strips(tokens):
            if strips.width:
                places = (strips.address + target * strips.row, strips.address + source * strips.row)
                self._gpu.copy_strips(*places, strips.width, strips.pitch, strips.count)

    def _strips(self, tokens: int) -> list[Strips]:
        """Of each cache, where row 0 holds its first ``tokens`` tokens."""
        # The key of an incomplete block is never read: the call that completes the block pools it anew.
        bundle, sizes = self._bundle, self._bundle.sizes(1, self.capacity)
        counts = {"capacity": tokens, "num_blocks": tokens // bundle.block_size}
        found = []
        for spec, _ in bundle.graph.state:
            axis = next((n for n, size in enumerate(spec.shape) if size in counts), 0)
            shape, address, row = spec.resolve(sizes), self._state[spec.name][1], spec.num_bytes(sizes)
            step = math.prod(shape[axis + 1 :]) * spec.itemsize
            width = counts.get(str(spec.shape[axis]), 1) * step
            found.append(Strips(spec, address, row, width, shape[axis] * step, math.prod(shape[:axis])))
        return found

    def read_prefix(self, row: int, tokens: int) -> list[NDArray[Any]]:
        """See ``Caches.read_prefix``."""
        sizes = {"batch": 1, "capacity": tokens, "num_blocks": tokens // self._bundle.block_size}
        parts = []
        for strips in self._strips(tokens):
            part = np.empty(strips.spec.resolve(sizes), DTYPES[strips.spec.dtype].numpy)
            for index, host in enumerate(part.reshape(strips.count, -1).view(np.uint8) if part.size else ()):
                self._gpu.download(host, strips.address + row * strips.row + index * strips.pitch)
            parts.append(part)
        self._gpu.synchronize()
        return parts

    def write_prefix(self, row: int, parts: Sequence[NDArray[Any]], tokens: int) -> None:
        """See ``Caches.write_prefix``."""
        for strips, part in zip(self._strips(tokens), parts, strict=True):
            lines = np.ascontiguousarray(part).reshape(strips.count, -1).view(np.uint8) if strips.width else ()
            for index, host in enumerate(lines):
                self._gpu.upload(strips.address + row * strips.row + index * strips.pitch, host[: strips.width])
        self._gpu.synchronize()

    def run(self, input_ids: Any, past_len: NDArray[np.int32], new_len: NDArray[np.int32]) -> DeviceLogits:
        """See ``Caches.run``; input_ids may lie on the GPU (``TokenIds``).

        Raises RequestError when a call does not fit, EngineError or BundleError when the backend fails.
        """
        ids = TokenIds(input_ids, self._gpu)
        batch, length = ids.shape
        if batch != self.batch or length < 1:
            raise RequestError(f"input_ids has shape {list(ids.shape)}, the caches hold {self.batch} rows")
        if int(past_len.max()) + length > self.capacity:
            raise RequestError(
                f"{length} new tokens do not fit behind {int(past_len.max())} in caches of {self.capacity}; "
                "give shorter prompts"
            )
        self._prepare(length)
        self._buffers.num_calls += 1
        self.last_call, self._length, self._routes = self._buffers.num_calls, length, None
        ids.put(self._buffers.call["input_ids"].address)
        for name, array in (("past_len", past_len), ("new_len", new_len)):
            self._gpu.upload(self._buffers.call[name].address, np.ascontiguousarray(array, DTYPES[CALL_INPUTS[name]].numpy))
        self._write_tokens(past_len, length)
        self._execute(length)
        logits = DeviceLogits(self)
        if length == 1:
            logits.start()
        self._gpu.synchronize()
        return logits

    def _write_tokens(self, past_len: NDArray[np.int32], length: int) -> None:
        """Enqueue copies of the call's tokens, behind those of each row, into the caches that the backend only reads."""
        for spec in self._session.only_read:
            size, first = spec.itemsize, self._state[spec.name][1]
            for row, past in enumerate(past_len.tolist()):
                source = self._buffers.call["input_ids"].address + row * length * size
                self._gpu.copy_strips(first + (row * self.capacity + past) * size, source, length * size, length * size, 1)

    def tensor(self, name: str) -> DeviceTensor:
        """A cache, by its input's name, or a result of the last call, where it lies; anything that speaks DLPack may take it.

        Calls go on writing to it. Raises RequestError for a name that is neither.
        """
        sizes = self._bundle.sizes(self.batch, self.capacity)
        for spec, _ in self._bundle.graph.state:
            if spec.name == name:
                memory, address = self._state[name]
                return DeviceTensor(address, spec.resolve(sizes), spec.dtype, self._gpu, memory)
        for spec in self._session.results:
            if spec.name == name:
                place = self.places(self._length)[name]
                results = self._buffers.results
                return DeviceTensor(results.address + place.offset, place.shape, spec.dtype, self._gpu, results)
        names = [spec.name for spec in (*self._session.results, *(spec for spec, _ in self._bundle.graph.state))]
        raise RequestError(f"there is no tensor {name!r} on the GPU; take one of {', '.join(names)}")

    def reserve(self) -> None:
        """See ``Caches.reserve``: a GPU's memory is taken when it is allocated, and cleared by the time that this returns."""
        self._gpu.synchronize()

    @property
    def routes(self) -> Routes | None:
        """See ``Caches.routes``. All are copied when a field is first looked at; a call without readers copies nothing."""
        return DeviceRoutes(self) if self._names and self.last_call else None

    def read_routes(self) -> Routes:
        """Those of the last call, copied from the GPU the first time."""
        routes = self._bundle.graph.routes
        assert routes is not None
        if self._routes is None:
            outputs = self.fetch(self._names)
            blocks = np.stack([outputs[name] for name in routes.blocks])
            experts = {layer: outputs[name] for layer, name in routes.experts.items()}
            self._routes = RouteArrays(outputs[routes.candidates] if routes.candidates else None, blocks, experts)
        return self._routes

    def fetch(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Neighbouring results of the last call, copied in one piece."""
        results = self.start_fetch(names)
        self._gpu.synchronize()
        return results

    def start_fetch(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Enqueue that copy; the arrays may be read once the stream is synchronised."""
        places = self.places(self._length)
        first, end = places[names[0]].offset, places[names[-1]].end
        host = self._hosts.get(tuple(names))
        if host is None or host.size != end - first:
            host = self._hosts[tuple(names)] = np.empty(end - first, np.uint8)
        self._gpu.download(host, self._buffers.results.address + first)
        parts = {name: host[places[name].offset - first : places[name].end - first] for name in names}
        return {name: part.view(places[name].dtype).reshape(places[name].shape) for name, part in parts.items()}

    def check_call(self, call: int, what: str) -> None:
        """Raises RequestError where the results of a call have been overwritten by a later one."""
        if call != self._buffers.num_calls:
            raise RequestError(f"the {what} of an earlier call are gone from the GPU; read them before the next call")
