"""ONNX Runtime sessions over a bundle's graph, or over a copy of it that was changed in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bilevel.errors import BundleError

Arrays = dict[str, np.ndarray[Any, Any]]


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph at ``path`` without its weights."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise BundleError(f"{path} is no readable ONNX file; export it again") from error


def open_session(path: Path, model: bytes | None = None, library: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU over ``path``, or over ``model`` with the weights that lie beside ``path``.

    library: the fast CPU kernels, which then run in place of the routed nodes' portable bodies.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, in one sentence
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if library is not None:
        options.register_custom_ops_library(str(library))
    try:
        return ort.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many types, all of them for a file it cannot run
        summary = str(error).splitlines()[0][:200]
        raise BundleError(f"ONNX Runtime cannot open {path} ({summary}); export it again") from error


def run_session(session: Any, outputs: list[str] | None, feeds: Arrays) -> list[np.ndarray[Any, Any]]:
    """``session.run``; a graph that fails while it runs is a BundleError."""
    try:
        return list(session.run(outputs, feeds))
    except Exception as error:  # ONNX Runtime raises many types
        summary = str(error).splitlines()[0][:200]
        raise BundleError(f"ONNX Runtime cannot run the graph on the check's tokens ({summary}); export it again") from error
