"""A bundle's graph as a TensorRT network: parsed with our plugins, and its profiles.

``trt`` is the module ``tensorrt`` or ``tensorrt_rtx``. What differs between versions is asked of ``versions``. This module and
what it imports load little besides TensorRT: ``worker`` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import EngineError
from bilevel.export.engine.rtx_stub import load_stub
from bilevel.export.engine.versions import Flavour, is_weakly_typed, needs_stub

_KEPT = 5  # errors of TensorRT's that are worth repeating


@dataclass(frozen=True)
class Limits:
    """What an engine takes: rows of a batch (batch_least to batch), tokens of a row's caches, tokens of a prefill call."""

    batch: int
    capacity: int
    chunk: int
    block_size: int
    batch_least: int = 1

    def sizes(self, batch: int, new_tokens: int) -> dict[str, int]:
        """The graph's free sizes in a call."""
        blocks = self.capacity // self.block_size
        return {"batch": batch, "new_tokens": new_tokens, "capacity": self.capacity, "num_blocks": blocks}

    def profiles(self) -> dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]]:
        """Profile -> the free sizes of its smallest, its typical and its largest call."""
        one, chunk = self.sizes(self.batch_least, 1), self.sizes(self.batch_least, self.chunk)
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


def failure(logger: Any, what: str, remedy: str) -> EngineError:
    """An error that repeats what TensorRT logged."""
    said = "; ".join(logger.messages[:_KEPT]) or "TensorRT logged no reason"
    return EngineError(f"{what} ({said[:1200]}); {remedy}")


def parse_graph(flavour: Flavour, model: bytes, graph: Path, nodes: int) -> Network:
    """Parse an ONNX model of which ``nodes`` must become plugins; 0: it is to run its portable bodies. Raises EngineError.

    graph: the file that the model is of; its weights lie beside it. The plugins must have been registered: a node without its
    plugin falls back to its body, and no TensorRT says so.
    """
    trt = flavour.trt
    if nodes and needs_stub(flavour):
        load_stub()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    strongly = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if is_weakly_typed(flavour) else 0
    network = builder.create_network(strongly)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model, str(graph)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        logger.messages[:0] = [" ".join(error.split()) for error in errors]
        raise failure(logger, f"{flavour.backend} {flavour.version_text} cannot read {graph}", "export the bundle anew")
    found = count_plugins(trt, network)
    if nodes and found != nodes:
        raise EngineError(
            f"{graph} has {nodes} nodes for plugins, but {flavour.backend} {flavour.version_text} made {found} plugin layers "
            "of them: the rest would run their portable bodies; build with the plugins of this bilevel (--plugins python), or "
            "with --plugins none"
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
