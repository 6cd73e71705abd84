"""The graph on a backend: one call turns new tokens and the caches into logits.

``Session`` and ``Caches`` are all that generation knows of a backend; ``OnnxSession`` implements them on ONNX Runtime.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle, load_bundle
from bilevel.bundle.manifest import CALL_INPUTS
from bilevel.bundle.tensors import DTYPES, TensorSpec
from bilevel.errors import BundleError, MissingDependency, RequestError, require
from bilevel.machine import available_memory
from bilevel.plugins.library.cpu import VARIABLE, find_cpu_library


@dataclass(frozen=True)
class Routes:
    """What the routers of one call chose; -1 fills what was not used.

    candidates: level 1's blocks, int32 [B, 1, L, K1], None where there is no level 1. blocks: what each layer's selection heads
    read, int32 [layers, B, Hs, L, K2]. experts: {layer: int32 [B, L, k]}.
    """

    candidates: NDArray[np.int32] | None
    blocks: NDArray[np.int32]
    experts: Mapping[int, NDArray[np.int32]]


class Logits(Protocol):
    """fp32 [B, vocab]: an array, or what stays on a device until it is read and can be made an array (numpy.asarray)."""

    def __getitem__(self, row: int, /) -> Any:
        """One row's, ``RowLogits`` as a sampler takes them."""

    def __array__(self) -> NDArray[np.float32]:
        """All of them."""


class Caches(Protocol):
    """The state of one batch of rows, and the means to extend it."""

    batch: int
    capacity: int

    @property
    def routes(self) -> Routes | None:
        """Of the last call, overwritten by the next; None where what runs does not give them.

        On a GPU a field costs a copy when it is first looked at, so whoever watches looks at few of the calls.
        """

    def run(self, input_ids: NDArray[np.int64], past_len: NDArray[np.int32], new_len: NDArray[np.int32]) -> Logits:
        """One call: write the tokens into the caches and return logits [B, vocab] of each row's last valid token.

        input_ids: [B, L], right-padded. past_len, new_len: [B]; past_len + L <= capacity in every row.
        What is returned is overwritten by the next call.
        """

    def rows(self, first: int, count: int) -> Caches:
        """Rows first to first + count - 1 as caches of their own, which share this memory: a call leaves the others alone."""

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Give row ``target`` the first ``tokens`` tokens of row ``source``; what it held there is lost."""

    def reserve(self) -> None:
        """Take the memory of new caches now, where it would otherwise be taken as it is written."""


class Session(Protocol):
    """An opened bundle. It holds no state between calls, so one session may serve several batches."""

    bundle: Bundle

    def allocate(self, batch: int, capacity: int) -> Caches:
        """Zeroed caches for ``batch`` rows of ``capacity`` tokens (a multiple of the bundle's block_size)."""


class OnnxGraph(ABC):
    """A bundle's graph opened in ONNX Runtime, wherever it runs.

    threads: threads inside one operator on the CPU; 0 leaves the choice to ONNX Runtime (one per core). profile: where given, ONNX
    Runtime records every node's time, and ``end_profiling`` writes a file that begins with this name.
    Raises BundleError when the graph cannot be opened or is not the one that the manifest describes.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, profile: Path | None = None) -> None:
        if threads < 0:
            raise RequestError(f"threads={threads} must be at least 0 (0: one per core)")
        self.bundle = bundle
        self._ort = _require_onnxruntime(bundle)
        self._ort.set_default_logger_severity(3)
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self.cpu_library = self._register_library(options)
        self._session = self._open_graph(options)
        self._check_ports("input", self._session.get_inputs(), bundle.graph.inputs)
        self._check_ports("output", self._session.get_outputs(), bundle.graph.outputs)

    def _register_library(self, options: Any) -> Path | None:
        """Give the options a library of the routed operators; its file, None where the graph's portable bodies run."""
        return None

    @abstractmethod
    def _open_graph(self, options: Any) -> Any:
        """ONNX Runtime's session over the graph."""

    def end_profiling(self) -> Path:
        """Stop recording and return the profile's file: JSON, events in Chrome's trace format with times in microseconds."""
        return Path(self._session.end_profiling())

    def _check_ports(self, kind: str, found: list[Any], expected: tuple[TensorSpec, ...]) -> None:
        types = {port.name: port.type for port in found}
        for spec in expected:
            if types.get(spec.name) != DTYPES[spec.dtype].ort_name:
                raise BundleError(
                    f"{self.bundle.graph_path} has {kind} {spec.name} as {types.get(spec.name, 'nothing')}, bundle.json says "
                    f"{spec.dtype}; {self.bundle.remedy}"
                )

    def _check_sizes(self, batch: int, capacity: int) -> None:
        if batch < 1:
            raise RequestError(f"batch={batch} must be at least 1")
        if capacity < 1 or capacity % self.bundle.block_size:
            raise RequestError(
                f"capacity={capacity} must be a multiple of the model's block_size={self.bundle.block_size}; "
                f"use {self.bundle.round_up(capacity)}"
            )


class OnnxSession(OnnxGraph):
    """See ``OnnxGraph``; on the CPU. The routed operators run in the fast CPU library where there is one (``cpu_library`` is then its
    path), else in the graph's portable bodies.
    """

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, threads: int = 0) -> OnnxSession:
        """Load the bundle at ``path`` and open it."""
        return cls(load_bundle(path, verify), threads)

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
        return OnnxCaches(self._ort, self._session, self.bundle, state, batch, capacity)


class OnnxCaches:
    """Caches in numpy memory, bound once: an input and its output share the buffer, and a call rebinds nothing.

    ONNX Runtime reads and writes the arrays held here directly, so nothing is copied but the new tokens.
    state: {name: array with the rows along the first axis}.
    """

    def __init__(
        self, ort: Any, session: Any, bundle: Bundle, state: dict[str, NDArray[Any]], batch: int, capacity: int
    ) -> None:
        self.batch, self.capacity, self.state = batch, capacity, state
        self.routes: Routes | None = None
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
        return OnnxCaches(self._ort, self._session, self._bundle, state, count, self.capacity)

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """See ``Caches.copy_prefix``."""
        # A block that is not whole yet has no key that anybody reads: it is pooled anew by the call that ends it.
        sizes = {"capacity": tokens, "num_blocks": tokens // self._bundle.block_size}
        for spec, _ in self._bundle.graph.state:
            cut = tuple(slice(sizes.get(str(size))) for size in spec.shape[1:])
            self.state[spec.name][target][cut] = self.state[spec.name][source][cut]

    def reserve(self) -> None:
        """See ``Caches.reserve``."""
        # The system zeroes a page when it is first written: with huge pages 2 MiB for every head of every layer, half a second
        # at a text's first word and again each time that it grows past such a page. A byte of every page, and it is done.
        for array in self.state.values():
            array.reshape(-1).view(np.uint8)[:: os.sysconf("SC_PAGE_SIZE")] = 0

    def _bind_call(self, length: int) -> None:
        """Buffers for calls of ``length`` columns: their tokens, and what their routers choose."""
        self._input_ids = self._bind_input("input_ids", (self.batch, length))
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
        self.routes = Routes(candidates, blocks, experts)

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


def _require_onnxruntime(bundle: Bundle) -> ModuleType:
    """The library, recent enough for the graph.

    1.24 is the first version with opset 24 and its TensorScatter; 1.23 the earliest in which MatMulNBits was tried.
    """
    ort = require("onnxruntime")
    version, format_name = tuple(map(int, ort.__version__.split(".")[:2])), bundle.weights["format"]
    if format_name != "fp32" and version < (1, 23):
        raise MissingDependency(
            f"onnxruntime {ort.__version__} is too old for the {format_name} weights of {bundle.folder}; "
            "they take 1.23 or later: pip install -U 'bilevel[cpu]'"
        )
    if bundle.opset >= 24 and version < (1, 24):
        raise MissingDependency(
            f"onnxruntime {ort.__version__} cannot run opset {bundle.opset}, which {bundle.folder} uses; "
            "it takes 1.24 or later, which needs Python 3.11 or later: pip install -U 'bilevel[cpu]'"
        )
    return ort


@contextmanager
def translated(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever ONNX Runtime raises (it has no base class of its own) into one sentence."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BundleError(f"{what} ({reason}); {remedy}") from error
