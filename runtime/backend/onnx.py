"""The graph in ONNX Runtime on the CPU: its caches are numpy arrays, which calls read and write where they lie."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle, load_bundle
from bilevel.bundle.manifest import CALL_INPUTS
from bilevel.bundle.tensors import DTYPES
from bilevel.errors import BundleError, RequestError
from bilevel.machine import available_memory
from bilevel.plugins.library.cpu import VARIABLE, find_cpu_library
from bilevel.runtime.backend.onnx_graph import OnnxGraph, translated
from bilevel.runtime.backend.onnx_head import OnnxHead
from bilevel.runtime.backend.session import RouteArrays, Routes, SessionLimits


class OnnxSession(OnnxGraph):
    """See ``OnnxGraph``; on the CPU.

    The routed operators run in the fast CPU library where there is one (``cpu_library`` is then its path), else in the graph's
    portable bodies.
    """

    backend, device = "onnx", "cpu"

    def __init__(self, bundle: Bundle, threads: int = 0, profile: Path | None = None) -> None:
        super().__init__(bundle, threads, profile)
        self._runner: CallTimer | None = None
        self._head = self._find_head()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, threads: int = 0) -> OnnxSession:
        """Load the bundle at ``path`` and open it."""
        return cls(load_bundle(path, verify), threads)

    @property
    def limits(self) -> SessionLimits:
        """See ``Session.limits``: the model's and the host's memory's only."""
        return SessionLimits(longest_call=self.bundle.prefill_chunk, cache_bytes=available_memory())

    def _find_head(self) -> OnnxHead | None:
        if (head := self.bundle.graph.head) is None:
            return None
        shape = next((each.shape for each in self._session.get_outputs() if each.name == head.hidden), None)
        if shape is None or not isinstance(shape[-1], int):
            raise BundleError(
                f"{self.bundle.graph_path} has no output {head.hidden} of a known width, which bundle.json names; "
                f"{self.bundle.remedy}"
            )
        return OnnxHead(self._ort, self.bundle, self._options, shape[-1])

    def time_calls(self) -> CallTimer:
        """A clock of what ONNX Runtime takes in the calls of caches that are allocated from now on."""
        self._runner = CallTimer(self._session)
        return self._runner

    def _register_library(self, options: Any) -> Path | None:
        # The library's kernels are fp32; a graph without routed operators has no use for it.
        library = find_cpu_library() if self.bundle.graph.operators and self.bundle.precision == "float32" else None
        if library is not None:
            with translated(f"{library} cannot be loaded", f"reinstall bilevel, or set {VARIABLE}=none"):
                options.register_custom_ops_library(str(library))
        return library

    def _open_graph(self, options: Any) -> Any:
        bundle = self.bundle
        try:
            with translated(f"{bundle.graph_path} cannot be opened by ONNX Runtime", bundle.remedy):
                return self._ort.InferenceSession(bundle.graph_path, options, providers=["CPUExecutionProvider"])
        except BundleError as error:
            if bundle.precision != "bfloat16" or type(error.__cause__).__name__ != "NotImplemented":
                raise
            raise BundleError(
                f"{bundle.folder} is in bfloat16, for which onnxruntime {self._ort.__version__} lacks kernels on a CPU; "
                "to run on a CPU, export with --precision fp16 or fp32"
            ) from error

    def allocate(self, batch: int, capacity: int) -> OnnxCaches:
        """See ``Session.allocate``. Raises RequestError where the sizes are wrong or the memory is not there."""
        self._check_sizes(batch, capacity)
        needed = self.bundle.state_bytes(batch, capacity)
        # The system would grant the memory now and kill the process when it is used.
        if (present := available_memory()) is not None and needed > present:
            raise RequestError(
                f"caches for {batch} rows of {capacity} tokens need {needed / 2**20:.0f} MiB, this machine has "
                f"{present / 2**20:.0f} MiB free; lower the capacity or the number of prompts"
            )
        sizes = self.bundle.sizes(batch, capacity)
        state = {spec.name: np.zeros(spec.resolve(sizes), DTYPES[spec.dtype].numpy) for spec, _ in self.bundle.graph.state}
        return OnnxCaches(self._ort, self._runner or self._session, self.bundle, state, batch, capacity, self._head)


class CallTimer:
    """ONNX Runtime's session with the seconds spent in its run call."""

    def __init__(self, session: Any) -> None:
        self.seconds = 0.0
        self._session = session

    def run_with_iobinding(self, binding: Any) -> None:
        """One call, timed."""
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - start

    def io_binding(self) -> Any:
        """See ONNX Runtime's."""
        return self._session.io_binding()


class OnnxCaches:
    """Caches in numpy memory, bound once: an input and its output share the buffer, and a call rebinds nothing.

    ONNX Runtime reads and writes the arrays held here directly, so nothing is copied but the new tokens.
    state: {name: array with the rows along the first axis}.
    """

    def __init__(
        self,
        ort: Any,
        session: Any,
        bundle: Bundle,
        state: dict[str, NDArray[Any]],
        batch: int,
        capacity: int,
        head: OnnxHead | None = None,
    ) -> None:
        self.batch, self.capacity, self.state = batch, capacity, state
        self.routes: Routes | None = None
        self._head, self.gives_scores = head, head is not None
        self._ort, self._session, self._binding, self._bundle = ort, session, session.io_binding(), bundle
        for spec, present in bundle.graph.state:
            value = self._value(state[spec.name], spec.dtype)
            self._binding.bind_ortvalue_input(spec.name, value)
            self._binding.bind_ortvalue_output(present, value)
        self._logits = np.zeros((batch, bundle.vocab_size), np.float32)
        self._binding.bind_ortvalue_output("logits", self._value(self._logits, "float32"))
        self._past_len = self._bind_input("past_len", (batch,))
        self._new_len = self._bind_input("new_len", (batch,))
        self._bind_call(1)

    def rows(self, first: int, count: int) -> OnnxCaches:
        """See ``Caches.rows``."""
        state = {name: array[first : first + count] for name, array in self.state.items()}
        return OnnxCaches(self._ort, self._session, self._bundle, state, count, self.capacity, self._head)

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """See ``Caches.copy_prefix``."""
        for name, cut in self._cuts(tokens):
            self.state[name][target][cut] = self.state[name][source][cut]

    def _cuts(self, tokens: int) -> list[tuple[str, tuple[slice, ...]]]:
        """Of each cache, where a row holds its first ``tokens`` tokens."""
        # The key of an incomplete block is never read: the call that completes the block pools it anew.
        sizes = {"capacity": tokens, "num_blocks": tokens // self._bundle.block_size}
        return [
            (spec.name, tuple(slice(sizes.get(str(size))) for size in spec.shape[1:])) for spec, _ in self._bundle.graph.state
        ]

    def read_prefix(self, row: int, tokens: int) -> list[NDArray[Any]]:
        """See ``Caches.read_prefix``."""
        return [self.state[name][row][cut][None].copy() for name, cut in self._cuts(tokens)]

    def write_prefix(self, row: int, parts: Sequence[NDArray[Any]], tokens: int) -> None:
        """See ``Caches.write_prefix``."""
        for (name, cut), part in zip(self._cuts(tokens), parts, strict=True):
            self.state[name][row][cut] = part[0][cut]

    def reserve(self) -> None:
        """See ``Caches.reserve``."""
        # The system zeroes a page when it is first written: with huge pages 2 MiB for every head of every layer, half a second
        # at a text's first word and again each time that it grows past such a page. A byte of every page, and it is done.
        for array in self.state.values():
            array.reshape(-1).view(np.uint8)[:: os.sysconf("SC_PAGE_SIZE")] = 0

    def _bind_call(self, length: int) -> None:
        """Buffers for calls of ``length`` columns: their tokens, and what their routers choose."""
        self._input_ids = self._bind_input("input_ids", (self.batch, length))
        if self._head is not None:
            self._hidden = np.zeros((self.batch, length, self._head.width), DTYPES[self._bundle.precision].numpy)
            self._binding.bind_ortvalue_output(self._head.hidden, self._value(self._hidden, self._bundle.precision))
        if (names := self._bundle.graph.routes) is None:
            return
        sizes = {**self._bundle.sizes(self.batch, self.capacity), "new_tokens": length}
        shapes = {spec.name: spec.resolve(sizes) for spec in self._bundle.graph.outputs}
        blocks = np.empty((len(names.blocks), *shapes[names.blocks[0]]), np.int32)
        experts = {layer: np.empty(shapes[name], np.int32) for layer, name in names.experts.items()}
        candidates = np.empty(shapes[names.candidates], np.int32) if names.candidates else None
        bound = [*zip(names.blocks, blocks, strict=True), *((names.experts[layer], experts[layer]) for layer in experts)]
        for name, array in bound if candidates is None else [*bound, (str(names.candidates), candidates)]:
            self._binding.bind_ortvalue_output(name, self._value(array, "int32"))
        self.routes = RouteArrays(candidates, blocks, experts)

    def _value(self, array: NDArray[Any], dtype: str) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, DTYPES[dtype].onnx_type)

    def _bind_input(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        array = np.zeros(shape, DTYPES[CALL_INPUTS[name]].numpy)
        self._binding.bind_ortvalue_input(name, self._value(array, CALL_INPUTS[name]))
        return array

    def run(self, input_ids: NDArray[np.int64], past_len: NDArray[np.int32], new_len: NDArray[np.int32]) -> NDArray[np.float32]:
        """See ``Caches.run``. Raises RequestError when a row does not fit, BundleError when the graph fails."""
        batch, length = input_ids.shape
        if batch != self.batch or length < 1:
            raise RequestError(f"input_ids has shape {list(input_ids.shape)}, the caches hold {self.batch} rows")
        if int(past_len.max()) + length > self.capacity:
            raise RequestError(
                f"{length} new tokens do not fit behind {int(past_len.max())} in caches of {self.capacity}; "
                "raise the capacity or give shorter prompts"
            )
        if self._input_ids.shape[1] != length:
            self._bind_call(length)
        self._input_ids[:], self._past_len[:], self._new_len[:] = input_ids, past_len, new_len
        with translated("ONNX Runtime could not run the graph", "use fewer or shorter prompts, or a smaller chunk"):
            self._session.run_with_iobinding(self._binding)
        return self._logits

    def score(self, lines: Sequence[int], columns: Sequence[int]) -> NDArray[np.float32]:
        """See ``Caches.score``. Raises RequestError where the bundle has no head of its own."""
        if self._head is None:
            raise RequestError(f"{self._bundle.folder} has no head.onnx; {self._bundle.remedy}")
        return self._head.logits(self._hidden[list(lines), list(columns)])
