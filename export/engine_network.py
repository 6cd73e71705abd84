"""A bundle's graph as a TensorRT network: parsed with our plugins, its profiles, its size.

``trt`` is the module ``tensorrt`` or ``tensorrt_rtx``. What differs between versions is asked of ``tensorrt_versions``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from bilevel.export.functions import routed_nodes
from bilevel.export.rtx_stub import load_stub
from bilevel.export.tensorrt_versions import Flavour, is_weakly_typed, must_strip_functions, needs_stub
from bilevel.plugins.errors import ExportError

_KEPT = 5  # errors of TensorRT's that are worth repeating


@dataclass(frozen=True)
class Limits:
    """What an engine takes: rows of a batch, tokens of a row's caches, tokens of a prefill call."""

    batch: int
    capacity: int
    chunk: int
    block_size: int

    def sizes(self, batch: int, new_tokens: int) -> dict[str, int]:
        """The graph's free sizes in a call."""
        blocks = self.capacity // self.block_size
        return {"batch": batch, "new_tokens": new_tokens, "capacity": self.capacity, "num_blocks": blocks}

    def profiles(self) -> dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]]:
        """Profile -> the free sizes of its smallest, its typical and its largest call."""
        one, chunk = self.sizes(1, 1), self.sizes(1, self.chunk)
        return {
            "prefill": (one, chunk, self.sizes(self.batch, self.chunk)),
            "decode": (one, one, self.sizes(self.batch, 1)),
        }


@dataclass
class Network:
    """A parsed graph; the objects depend on each other and live as long as this."""

    flavour: Flavour
    builder: Any
    network: Any
    parser: Any
    logger: Any


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors in ``messages`` and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(" ".join(message.split()))

    return Logger()


def failure(logger: Any, what: str, remedy: str) -> ExportError:
    """An error that repeats what TensorRT logged."""
    said = "; ".join(logger.messages[:_KEPT]) or "TensorRT logged no reason"
    return ExportError(f"{what} ({said[:1200]}); {remedy}")


def _read_graph(graph: Path, strip: bool) -> tuple[bytes, int]:
    """The ONNX file's bytes, without functions where they would win over plugins, and how many nodes plugins must serve."""
    model = onnx.load(str(graph), load_external_data=False)
    if strip:
        del model.functions[:]
    return model.SerializeToString(), len(routed_nodes(model.graph))


def parse_graph(flavour: Flavour, graph: Path, with_plugins: bool = True) -> Network:
    """Parse an ONNX file; with plugins, every routed node must have become one. Raises ExportError.

    The plugins must have been registered: a node without its plugin falls back to its portable body, and no TensorRT says so.
    """
    trt = flavour.trt
    if with_plugins and needs_stub(flavour):
        load_stub()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    strongly = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if is_weakly_typed(flavour) else 0
    network = builder.create_network(strongly)
    parser = trt.OnnxParser(network, logger)
    content, wanted = _read_graph(graph, with_plugins and must_strip_functions(flavour))
    # The path tells the parser where the weights lie.
    if not parser.parse(content, str(graph)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        logger.messages[:0] = [" ".join(error.split()) for error in errors]
        raise failure(logger, f"{flavour.backend} {flavour.version_text} cannot read {graph}", "export the bundle anew")
    found = count_plugins(trt, network)
    if with_plugins and found != wanted:
        raise ExportError(
            f"{graph} has {wanted} routed nodes, but {flavour.backend} {flavour.version_text} made {found} plugin layers of them: the "
            "rest would run their portable bodies; register the plugins (bilevel kernels build, --plugins FILE)"
        )
    return Network(flavour, builder, network, parser, logger)


def count_plugins(trt: Any, network: Any) -> int:
    """Layers that are plugins."""
    return sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))


def resolve(shape: Sequence[int], names: Sequence[str | None], sizes: Mapping[str, int]) -> list[int]:
    """A tensor's shape in a call: its free sizes are looked up by name."""
    return [sizes[str(name)] if size < 0 else size for size, name in zip(shape, names, strict=True)]


def add_profiles(parsed: Network, config: Any, limits: Limits) -> list[str]:
    """Add the optimisation profiles; their names, in order."""
    names = []
    for name, calls in limits.profiles().items():
        profile = parsed.builder.create_optimization_profile()
        for index in range(parsed.network.num_inputs):
            tensor = parsed.network.get_input(index)
            axes = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
            profile.set_shape(tensor.name, *(resolve(tuple(tensor.shape), axes, sizes) for sizes in calls))
        config.add_optimization_profile(profile)
        names.append(name)
    return names
