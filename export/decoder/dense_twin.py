"""The dense twin: a routed decoder's weights with ordinary attention, as a graph that ``bilevel bench`` measures it against.

The twin is not handicapped: attention is ONNX Runtime's own fused operator (``com.microsoft.GroupQueryAttention``) on packed
projections, which rotates, writes the caches in place where a cache's input and output share a buffer, and attends, all in one
node. (Rotating in nodes of our own takes the same time within what measurements scatter, at 1,024 and 8,192 cached tokens.)
Everything else (projections, norms, MLP or experts, head) is the routed decoder's own code, and so is the layout of the
graph: input_ids, past_len, new_len and past.{key,value}.i in, logits and present.{key,value}.i out.
It has kernels for fp32 and fp16 on the CPU, none for bf16, so a model in bf16 has no twin.
Limit of that operator: a call of several tokens behind cached ones takes one row; prefill from nothing and decode take any
batch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.export.decoder.decoder import save_decoder
from bilevel.export.decoder.fused import FusedAttention
from bilevel.model import CausalLM
from bilevel.rotary import rotary_angles
from bilevel.state import LayerState, Step

_OPERATOR = "com.microsoft::GroupQueryAttention"


class TwinAttention(FusedAttention):
    """Attention over every cached token by GroupQueryAttention. Can be exported, not executed in PyTorch."""

    cos_cache: Tensor
    sin_cache: Tensor

    @property
    def rotates(self) -> bool:
        """Whether the operator turns q and k itself: whole heads only, of whole vectors of 16, and fp32 only.

        In fp16 it would take tables of cos and sin in fp16, but the model's are fp32 in every precision.
        """
        whole = self.has_positions and self.config.rotated_channels == self.config.head_dim
        return whole and self.config.head_dim % 16 == 0 and self.qkv_proj.weight.dtype == torch.float32

    def _operands(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q, k, v packed [B, L, (Hq + 2 Hkv) D]; apart, [B, L, H D] each, where something is done to q and k before."""
        if not self.config.has_qk_norm and (self.rotates or not self.has_positions):
            return self.qkv_proj(x), None, None
        q, k, v = self.project(x)
        q, k = self.normalise(q, k)
        if not self.rotates:
            q, k = self.turn(q, k, step)
        q, k, v = (heads.transpose(1, 2).flatten(2) for heads in (q, k, v))
        return q, k, v

    def forward(self, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """See ``Attention.forward``. All L columns of a row are written at past_len, padding too, as in the routed graph."""
        assert state is not None  # a decoder is exported with its caches
        config, length = self.config, x.shape[1]
        query, key, value = self._operands(x, step)
        attributes: dict[str, Any] = {
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "do_rotary": int(self.rotates),
            "scale": config.attention_scale,
        }
        last, total = step.past_len + (length - 1), step.past_len.max() + length
        rotary = (self.cos_cache, self.sin_cache) if self.rotates else ()
        out, new_key, new_value = torch.onnx.ops.symbolic_multi_out(
            _OPERATOR,
            (query, key, value, state.key, state.value, last.to(torch.int32), total.to(torch.int32), *rotary),
            attributes,
            dtypes=[x.dtype] * 3,
            shapes=[[x.shape[0], length, config.num_attention_heads * config.head_dim], state.key.shape, state.value.shape],
            version=1,
        )
        return self.o_proj(out), LayerState(new_key, new_value, None)


def dense_config(config: ModelConfig) -> ModelConfig:
    """The same model with every earlier token attended to."""
    routing = dataclasses.replace(config.routing, preset="dense")
    return dataclasses.replace(config, routing=routing)


def dense_twin(model: CausalLM) -> CausalLM:
    """A model with the weights of ``model`` (the same tensors, not copies) and a dense routing preset."""
    config = dense_config(model.config)
    with torch.device("meta"):
        twin = CausalLM(config)
    names = set(twin.state_dict())
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in names}, assign=True)
    if config.tie_word_embeddings:
        twin.lm_head.weight = twin.model.embed_tokens.weight
    return twin.eval()


def save_dense_twin(model: CausalLM, path: Path, *, trace_all: bool = False) -> onnx.ModelProto:
    """Export the dense twin of a routed ``model`` to ``path``; returns the graph without its weights.

    trace_all: see ``save_decoder``.
    """
    twin = dense_twin(model)
    size = twin.config.routing.block_size
    # A padded chunk may reach past the last position, but not past its whole blocks.
    positions = -(-twin.config.max_position_embeddings // size) * size
    cos, sin = (table[0] for table in rotary_angles(torch.arange(positions)[None], twin.config))
    for layer in twin.model.layers:  # one table: tracing recognises a tensor that it has met
        attention = layer.get_submodule("self_attn")
        attention.register_buffer("cos_cache", cos, persistent=False)
        attention.register_buffer("sin_cache", sin, persistent=False)
    return save_decoder(twin, path, attention=TwinAttention, trace_all=trace_all)
