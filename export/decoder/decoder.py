"""The decoder as an exportable graph: flat caches in, logits of each row's last valid token and flat caches out.

Its precision is the model's own: weights, activations and caches have the type of the parameters. The logits are fp32 in every
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from bilevel.config import ModelConfig
from bilevel.export.decoder.fused import FusedAttention, fused_projections
from bilevel.export.graph.module import Inputs, save_onnx
from bilevel.model import CausalLM
from bilevel.state import DecoderState, LayerState, Trace


@dataclass(frozen=True)
class StateTensor:
    """One cache of the graph: ``past.<name>`` in, ``present.<name>`` out; a string in the shape is a free size."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype


def state_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> list[StateTensor]:
    """The caches that the graph takes and gives, in order."""
    heads, width = config.num_key_value_heads, config.head_dim
    tensors = []
    for i in range(config.num_hidden_layers):
        tensors += [StateTensor(f"{kind}.{i}", ("batch", heads, "capacity", width), dtype) for kind in ("key", "value")]
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
    """``CausalLM.step`` with its state as a flat list in the order of :func:`state_tensors`, and its routers' choices."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Returns (logits fp32 [B, vocab], *present, *choices in the order of :func:`route_outputs`)."""
        config = self.model.config
        values = iter(past)
        layers = [
            LayerState(next(values), next(values), next(values) if i in config.routed_layers else None)
            for i in range(config.num_hidden_layers)
        ]
        state = DecoderState(layers, *((next(values), next(values)) if config.routing.is_two_level else ()))
        trace = Trace()
        logits, state = self.model.step(input_ids, past_len, new_len, state, trace)
        if config.routing.is_dense:
            return logits.float(), *flatten_state(state)
        candidates = [] if trace.candidates is None else [trace.candidates]
        experts = [ids.unflatten(0, input_ids.shape) for ids in trace.expert_ids]
        return logits.float(), *flatten_state(state), *candidates, *trace.routes, *experts


def flatten_state(state: DecoderState) -> list[Tensor]:
    """The state's tensors in the order of :func:`state_tensors`."""
    flat: list[Tensor] = []
    for layer in state.layers:
        flat += [layer.key, layer.value] + ([] if layer.block_key is None else [layer.block_key])
    if state.token_ids is not None and state.word_block_key is not None:
        flat += [state.token_ids, state.word_block_key]
    return flat


def save_decoder(model: CausalLM, path: Path, attention: type[FusedAttention] = FusedAttention) -> onnx.ModelProto:
    """Export the decoder to ``path``, every layer with ``attention``. Free sizes: batch, new_tokens, capacity, num_blocks."""
    config = model.config
    tensors = state_tensors(config, model.lm_head.weight.dtype)
    batch, length = 2, config.routing.block_size + 3  # any sizes of at least 2 would do: they stay free
    capacity = 4 * config.routing.block_size
    example = {"batch": batch, "capacity": capacity, "num_blocks": capacity // config.routing.block_size}
    past = [torch.zeros([example[s] if isinstance(s, str) else s for s in t.shape], dtype=t.dtype) for t in tensors]
    inputs: Inputs = {
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
    outputs = ["logits", *(f"present.{t.name}" for t in tensors), *_route_names(config)]
    with fused_projections(model, attention):
        return save_onnx(ExportableDecoder(model), inputs, path, input_names=names, output_names=outputs, dynamic=dynamic)
