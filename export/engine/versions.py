"""The flavours of TensorRT and how their versions differ: every known difference, as a predicate with its reason.

Enum members are used by name everywhere: 11.0 renumbered some.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from bilevel.bundle.engines import BACKENDS
from bilevel.errors import EngineError

_INSTALL = {
    "tensorrt": "JetPack brings it to a Jetson, elsewhere NVIDIA's packages or pip install tensorrt-cu13",
    "tensorrt-rtx": "pip install 'bilevel[rtx]'",
}
_OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 3)}


@dataclass(frozen=True)
class Flavour:
    """An installed TensorRT. backend: "tensorrt" or "tensorrt-rtx"; trt: its Python module."""

    backend: str
    trt: Any
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        """As in "10.3.0.30"."""
        return ".".join(map(str, self.version))


def load_flavour(backend: str) -> Flavour:
    """The installed TensorRT of a backend. Raises EngineError for one that is unknown, absent, broken or too old."""
    if backend not in BACKENDS:
        raise EngineError(f"there is no backend {backend!r}; engines are built by {' or '.join(BACKENDS)}")
    try:
        trt = importlib.import_module(BACKENDS[backend])
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"{backend} cannot be loaded ({reason}); install it: {_INSTALL[backend]}") from None
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:4])
    if version < _OLDEST[backend]:
        oldest = ".".join(map(str, _OLDEST[backend]))
        raise EngineError(f"{backend} {trt.__version__} is too old; install {oldest} or newer")
    return Flavour(backend, trt, version)


def needs_stub(flavour: Flavour) -> bool:
    """Importing a plugin needs ``rtx_stub``: TensorRT-RTX's wheels lack a library that its parser opens by name."""
    return flavour.backend == "tensorrt-rtx"


def must_strip_functions(flavour: Flavour) -> bool:
    """A local function always wins over a plugin of its name before 10.7 (JetPack 6 has 10.3), so the functions must go.

    From 10.7 a registered plugin wins; from 10.15, and in TensorRT-RTX, where the node names its namespace, as ours do.
    """
    return flavour.backend == "tensorrt" and flavour.version < (10, 7)


def has_cache_layer(flavour: Flavour) -> bool:
    """TensorScatter is imported, as the layer that writes a cache in place: from 10.15 on, and in TensorRT-RTX (1.7).

    Before, a plugin of ours does the same: ScatterND copies the whole cache, or does not, as TensorRT likes.
    """
    return flavour.backend == "tensorrt-rtx" or flavour.version >= (10, 15)


def has_opset_23(flavour: Flavour) -> bool:
    """RMSNormalization and RotaryEmbedding are imported: from 10.15 on. JetPack 6 (10.3) and 7.0 are given older operators."""
    return flavour.backend == "tensorrt-rtx" or flavour.version >= (10, 15)


def has_attention(flavour: Flavour) -> bool:
    """Attention, of dense models, is imported: from 10.14 on."""
    return flavour.backend == "tensorrt-rtx" or flavour.version >= (10, 14)


def crashes_on_keys_of_blocks(flavour: Flavour) -> bool:
    """TensorRT-RTX 1.7 dies while it builds where that layer writes caches of tokens and of blocks, of two lengths.

    Its heap is damaged: some sizes and models get through. None has died where something else writes what counts in blocks.
    """
    return flavour.backend == "tensorrt-rtx"


def is_weakly_typed(flavour: Flavour) -> bool:
    """Networks choose their own types unless told otherwise: TensorRT before 11. Later ones, and TensorRT-RTX, never do."""
    return flavour.backend == "tensorrt" and flavour.version < (11,)


def measures_kernels(flavour: Flavour) -> bool:
    """A build times kernels on the GPU, which a timing cache spares the next one. TensorRT-RTX chooses them when it runs."""
    return flavour.backend == "tensorrt"


def builds_ahead_of_time(flavour: Flavour) -> bool:
    """Engines can be built for GPUs that are not there: TensorRT-RTX alone takes a list of compute capabilities."""
    return flavour.backend == "tensorrt-rtx"


def builder_flags(flavour: Flavour, weight_streaming: bool) -> list[Any]:
    """What a build is told beside its sizes.

    TensorRT-RTX (1.2 and later) "requires" REQUIRE_USER_ALLOCATION of engines that are captured into CUDA graphs: without it
    the engine allocates while it runs, once a tensor outgrows what was planned. It refuses that beside WEIGHT_STREAMING, which
    allocates while it runs: an engine whose weights may stream is not captured.
    """
    names = ["WEIGHT_STREAMING" if weight_streaming else "REQUIRE_USER_ALLOCATION"]
    members = flavour.trt.BuilderFlag.__members__
    return [members[name] for name in names if name in members]


def compute_capabilities(flavour: Flavour) -> dict[int, Any]:
    """GPU architecture, as in 89 -> the member that names it; empty where engines are for the GPU at hand."""
    if not builds_ahead_of_time(flavour):
        return {}
    members = flavour.trt.ComputeCapability.__members__
    return {int(name[2:]): member for name, member in members.items() if name.startswith("SM")}
