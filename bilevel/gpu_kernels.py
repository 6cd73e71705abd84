"""Where the operators' GPU kernels come from: the one place that decides whether ``bilevel.ops`` uses them.

They need Triton, which PyTorch's CUDA builds bring (``pip install 'bilevel[kernels]'`` elsewhere), and are loaded at the first
call with a tensor on a GPU. BILEVEL_GPU_KERNELS=none switches them off: the PyTorch forms run instead.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

VARIABLE = "BILEVEL_GPU_KERNELS"
DEVICES = frozenset({"cuda"})


@functools.lru_cache(maxsize=1)
def _load() -> ModuleType | None:
    if os.environ.get(VARIABLE, "").lower() == "none" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("bilevel.plugins.kernels.launch")


def kernels_for(device: str) -> ModuleType | None:
    """``bilevel.plugins.kernels.launch`` for tensors on ``device`` ("cuda", "cpu", ...), or None: the PyTorch forms."""
    return _load() if device in DEVICES else None
