"""A bundle's graph opened in ONNX Runtime: what its CPU (``onnx``) and its CUDA provider (``onnx_cuda``) have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.bundle.format import Bundle
from bilevel.bundle.tensors import DTYPES, TensorSpec
from bilevel.errors import BundleError, MissingDependency, RequestError, require


class OnnxGraph(ABC):
    """A bundle's graph opened in ONNX Runtime, wherever it runs.

    threads: threads inside one operator on the CPU; 0 leaves the choice to ONNX Runtime (one per core). profile: where given,
    ONNX Runtime records every node's time, and ``end_profiling`` writes a file that begins with this name. Raises BundleError
    when the graph cannot be opened or is not the one that the manifest describes.
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
        self._options = options
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

    def _check_ports(self, kind: str, ports: list[Any], expected: tuple[TensorSpec, ...]) -> None:
        types = {port.name: port.type for port in ports}
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
