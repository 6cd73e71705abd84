"""The decoder as an exportable graph: flat caches in, logits of each row's last valid token and flat caches out.

Its precision is the model's own: weights, activations and caches have the type of the parameters. The logits are fp32 in every
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import Tensor, nn

from bilevel.bundle.cache_rows import CacheRows
from bilevel.config import ModelConfig
from bilevel.export.decoder.fused import FusedAttention, fused_projections
from bilevel.export.decoder.layers import alike, named_tensors, only, port_layer
from bilevel.export.graph.guards import refuse_unused
from bilevel.export.graph.module import Inputs, name_ports, name_values, save_onnx, trace, write
from bilevel.export.graph.repeat import Layers, NotRepeatable, repeat_layers
from bilevel.model import CausalLM
from bilevel.state import DecoderState, LayerState, Trace


@dataclass(frozen=True)
class StateTensor:
    """One cache of the graph: ``past.<name>`` in, ``present.<name>`` out; a string in the shape is a free size."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype


def state_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32, caches: str = "fp32") -> list[StateTensor]:
    """The caches that the graph takes and gives, in order. caches: "fp32" (of ``dtype``), or packed keys and values' format."""
    heads, width, stored = config.num_key_value_heads, config.head_dim, dtype
    if caches != "fp32":
        width, stored = CacheRows.of(caches, width).num_bytes, torch.uint8
    tensors = []
    for i in range(config.num_hidden_layers):
        tensors += [StateTensor(f"{kind}.{i}", ("batch", heads, "capacity", width), stored) for kind in ("key", "value")]
        if i in config.routed_layers:
            tensors.append(StateTensor(f"block_key.{i}", ("batch", heads, "num_blocks", config.block_key_width), dtype))
    if config.routing.is_two_level:
        tensors.append(StateTensor("token_ids", ("batch", "capacity"), torch.int64))
        tensors.append(StateTensor("word_block_key", ("batch", 1, "num_blocks", config.route_dim), dtype))
    return tensors


def route_outputs(config: ModelConfig) -> dict[str, Any] | None:
    """Names of the outputs that tell what the routers chose, as bundle.json lists them; None where attention is dense."""
    if config.routing.is_dense:
        return None
    layers = config.experts.layers if config.experts is not None else ()
    return {
        "candidates": "candidates" if config.routing.is_two_level else None,
        "blocks": [f"blocks.{i}" for i in config.routed_layers],
        "experts": {str(i): f"experts.{i}" for i in sorted(layers)},
    }


def _route_names(config: ModelConfig) -> list[str]:
    """The names of :func:`route_outputs`, in the order in which the decoder gives them."""
    names = route_outputs(config)
    if names is None:
        return []
    return [*([names["candidates"]] if names["candidates"] else []), *names["blocks"], *names["experts"].values()]


class ExportableDecoder(nn.Module):
    """``CausalLM.step`` with its state as a flat list in the order of :func:`state_tensors`, and its routers' choices.

    traced: the layers that the state belongs to (None: all); the others must be left out of the model (``layers.only``).
    """

    def __init__(self, model: CausalLM, traced: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.traced = range(model.config.num_hidden_layers) if traced is None else traced

    def forward(self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Returns (logits fp32 [B, vocab], *present, *choices in the order of :func:`route_outputs`)."""
        config = self.model.config
        values = iter(past)
        layers: list[Any] = [None] * config.num_hidden_layers
        for index in self.traced:
            block_key = index in config.routed_layers
            layers[index] = LayerState(next(values), next(values), next(values) if block_key else None)
        state = DecoderState(layers, *((next(values), next(values)) if config.routing.is_two_level else ()))
        trace = Trace()
        logits, state = self.model.step(input_ids, past_len, new_len, state, trace)
        if config.routing.is_dense:
            return logits.float(), *flatten_state(state)
        candidates = [] if trace.candidates is None else [trace.candidates]
        experts = [ids.unflatten(0, input_ids.shape) for ids in trace.expert_ids]
        return logits.float(), *flatten_state(state), *candidates, *trace.routes, *experts


class _WeightsGiven(nn.Module):
    """A module as a function of its weights too: it has no parameters itself."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.call: Callable[..., Any] = lambda weights, *args: torch.func.functional_call(
            module, dict(zip(names, weights, strict=True)), args
        )

    def forward(
        self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, past: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """As ``ExportableDecoder.forward``; weights in the order of the names."""
        result: tuple[Tensor, ...] = self.call(weights, input_ids, past_len, new_len, past)
        return result


def flatten_state(state: DecoderState) -> list[Tensor]:
    """The state's tensors in the order of :func:`state_tensors`."""
    flat: list[Tensor] = []
    for layer in state.layers:
        if layer is not None:
            flat += [layer.key, layer.value] + ([] if layer.block_key is None else [layer.block_key])
    if state.token_ids is not None and state.word_block_key is not None:
        flat += [state.token_ids, state.word_block_key]
    return flat


@dataclass(frozen=True)
class _Example:
    """What a decoder, or some of its layers, is traced with: example tensors, names and free sizes, the outputs' names."""

    inputs: dict[str, Any]
    names: list[str]
    dynamic: dict[str, Mapping[int, str]]
    outputs: list[str]


def _example(model: CausalLM, traced: Sequence[int], caches: str) -> _Example:
    config = model.config

    def belongs(name: str) -> bool:
        layer = port_layer(name)
        return layer is None or layer in traced

    tensors = [t for t in state_tensors(config, model.lm_head.weight.dtype, caches) if belongs(t.name)]
    batch, length = 2, config.routing.block_size + 3  # any sizes of at least 2 would do: they stay free
    capacity = 4 * config.routing.block_size
    example = {"batch": batch, "capacity": capacity, "num_blocks": capacity // config.routing.block_size}
    past = [torch.zeros([example[s] if isinstance(s, str) else s for s in t.shape], dtype=t.dtype) for t in tensors]
    inputs = {
        "input_ids": torch.zeros(batch, length, dtype=torch.int64),
        "past_len": torch.zeros(batch, dtype=torch.int32),
        "new_len": torch.full((batch,), length, dtype=torch.int32),
        "past": past,
    }
    names = ["input_ids", "past_len", "new_len", *(f"past.{t.name}" for t in tensors)]
    dynamic: dict[str, Mapping[int, str]] = {
        "input_ids": {0: "batch", 1: "new_tokens"},
        "past_len": {0: "batch"},
        "new_len": {0: "batch"},
    }
    for tensor in tensors:
        dynamic[f"past.{tensor.name}"] = {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
    routes = [name for name in _route_names(config) if belongs(name)]
    return _Example(inputs, names, dynamic, ["logits", *(f"present.{t.name}" for t in tensors), *routes])


def save_decoder(
    model: CausalLM,
    path: Path,
    attention: type[FusedAttention] = FusedAttention,
    *,
    caches: str = "fp32",
    trace_all: bool = False,
) -> onnx.ModelProto:
    """Export the decoder to ``path``, every layer with ``attention``. Free sizes: batch, new_tokens, capacity, num_blocks.

    caches: "fp32" (of the model's own type), "int8" or "int4". trace_all: trace every layer, not one of each structure. It
    takes far longer and gives the same graph, to which the tests hold the other.
    """
    whole = _example(model, range(model.config.num_hidden_layers), caches)
    with fused_projections(model, attention):
        decoder = ExportableDecoder(model)
        layers = alike(decoder, model, [*whole.names, *whole.outputs])
        if not trace_all and len(set(layers.template)) < len(layers.template):
            try:
                return write(_trace_some(decoder, layers, whole, caches), Path(path))
            except NotRepeatable:
                pass  # what its layers do is not told apart: as any other module
        return save_onnx(
            decoder, whole.inputs, path, input_names=whole.names, output_names=whole.outputs, dynamic=whole.dynamic
        )


def _trace_some(decoder: ExportableDecoder, layers: Layers, whole: _Example, caches: str) -> onnx_ir.Model:
    """The decoder's graph from a trace of one layer of each structure. Raises NotRepeatable."""
    model, weights = decoder.model, named_tensors(decoder)
    traced = sorted(set(layers.template))
    some = _example(model, traced, caches)
    with only(model, traced):
        decoder = ExportableDecoder(model, traced)
        lifted = named_tensors(decoder)
        inputs: Inputs = {**some.inputs, "weights": list(lifted.values())}
        names = [*some.names, *lifted]
        graph = trace(_WeightsGiven(decoder, list(lifted)), inputs, some.dynamic, names)
    name_ports(graph, names, some.outputs)
    refuse_unused(
        str(value.name)
        for value in graph.graph.inputs
        if isinstance(lifted.get(str(value.name)), nn.Parameter) and not value.uses()
    )
    repeat_layers(graph, layers, whole.names, whole.outputs, weights)
    name_values(graph)
    return graph
