"""The decoder: the Llama/Qwen3 shape with two-level routing. Weight names are those of Hugging Face.

One forward serves training (no state: the call is the whole text), chunked prefill and decode (a ``DecoderState`` that the
call extends). Everything stateful is here, as ordinary tensor code; the routing operators themselves are pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilevel import ops
from bilevel.block_keys import block_keys
from bilevel.bundle.cache_rows import CacheRows
from bilevel.config import ModelConfig
from bilevel.expert_layers import ExpertMLP, SwiGLU
from bilevel.operators.attention import causal_attention, masked_attention
from bilevel.operators.packed_caches import unpack_rows
from bilevel.rotary import apply_rotary, rotary_angles
from bilevel.state import DecoderState, LayerState, Step, Trace
from bilevel.word_router import WordRouter, unit


class Attention(nn.Module):
    """Grouped-query attention; level 2 of the routing decides which blocks of tokens each word reads."""

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.has_positions = index not in config.nope_layers
        self.is_routed = index in config.routed_layers
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=config.has_output_bias)
        if config.has_qk_norm:
            whole = config.qk_norm_kind == "projection"
            heads = (config.num_attention_heads, config.num_key_value_heads) if whole else (1, 1)
            self.q_norm, self.k_norm = (nn.RMSNorm(h * config.head_dim, eps=config.rms_norm_eps) for h in heads)
        if self.is_routed:
            self.block_keys = block_keys(config, self.has_positions)

    def _pool(self, cache: Tensor | None, keys: Tensor, step: Step, length: int) -> Tensor:
        """The blocks' keys [B, Hkv, N, Dr], those that this call touched made anew."""
        size = self.config.routing.block_size
        first = torch.div(step.past_len, size, rounding_mode="floor")
        pooled = self.block_keys.pool(keys, first, (length + size - 1) // size, step)
        return pooled if cache is None else ops.write_cache(cache, pooled.to(cache.dtype), first)

    def _extend(self, cache: Tensor | None, update: Tensor, step: Step) -> Tensor:
        """The cache with this call's keys or values written behind each row's; without a cache the call is the whole text."""
        trace = step.trace
        if trace is not None:
            trace.written.append(update)
        if cache is None:
            return ops.pad_to_blocks(update, self.config.routing.block_size)
        if cache.dtype != torch.uint8:
            return ops.write_cache(cache, update, step.past_len)
        packed = trace.given("packed") if trace is not None else None
        if packed is None:
            rows = CacheRows.of_bytes(cache.shape[-1], self.config.head_dim)
            packed = ops.write_cache_quantized(update, cache, step.past_len, **rows.attributes)
        if trace is not None:
            trace.packed.append(packed)
        return packed

    def route(self, query: Tensor, block_key: Tensor, step: Step) -> Tensor:
        """The blocks that each word of this layer reads: int32 [B, Hs, L, K2]."""
        if step.trace is not None and (given := step.trace.given("routes")) is not None:
            return given
        attributes = self.config.route_attributes(2)
        if step.candidates is None:
            return ops.coarse_route(query, block_key, step.past_len, step.new_len, **attributes)
        return ops.fine_route(query, block_key, step.candidates, step.past_len, step.new_len, **attributes)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Hq, L, D], keys and values [B, Hkv, L, D], before normalisation and rotation."""
        width = self.config.head_dim
        q, k, v = (proj(x).unflatten(-1, (-1, width)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, L, D] with the norm that the model has: none, of each head, or of all heads together."""
        kind = self.config.qk_norm_kind
        if kind == "none":
            return q, k
        if kind == "head":
            return self.q_norm(q), self.k_norm(k)
        q, k = (norm(x.transpose(1, 2).flatten(2)) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        width = self.config.head_dim
        return q.unflatten(-1, (-1, width)).transpose(1, 2), k.unflatten(-1, (-1, width)).transpose(1, 2)

    def turn(self, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions; as they are in a layer without positions."""
        if not self.has_positions:
            return q, k
        return apply_rotary(q, step.cos, step.sin), apply_rotary(k, step.cos, step.sin)

    def _attend_to_all(self, q: Tensor, key: Tensor, value: Tensor, step: Step, is_whole: bool) -> Tensor:
        """Ordinary attention; is_whole: the call is the whole text. The graph of a routed model, and of packed caches, says it
        as routed attention to every block, whose kernels read no more of the cache than is filled."""
        config, length, capacity = self.config, q.shape[2], key.shape[2]
        is_packed = key.dtype == torch.uint8
        if is_whole and not torch.compiler.is_exporting():
            return causal_attention(q, key[:, :, :length], value[:, :, :length], step.new_len, config.attention_scale)
        if torch.compiler.is_exporting() and (config.routed_layers or is_packed):
            return self._attend(q, key, value, step.every_block(capacity, length, config.routing.block_size), step)
        if is_packed:
            rows = CacheRows.of_bytes(key.shape[-1], config.head_dim)
            key, value = (unpack_rows(cache, rows.width, **rows.attributes).to(q.dtype) for cache in (key, value))
        return masked_attention(q, key, value, step.causal_mask(capacity, length), config.attention_scale)

    def _attend(self, q: Tensor, key: Tensor, value: Tensor, routes: Tensor, step: Step) -> Tensor:
        """Attention over the routed blocks of the caches, packed or not."""
        size, scale = self.config.routing.block_size, self.config.attention_scale
        operands = q, key, value, routes, step.past_len, step.new_len
        if key.dtype != torch.uint8:
            return ops.routed_attention(*operands, block_size=size, causal=1, scale=scale)
        packed = CacheRows.of_bytes(key.shape[-1], self.config.head_dim).attributes
        return ops.routed_attention_quantized(*operands, block_size=size, causal=1, scale=scale, **packed)

    def forward(self, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """x: [B, L, d]. Returns ([B, L, d], the layer's state after this call)."""
        config, length = self.config, x.shape[1]
        plain, k, v = self.project(x)
        plain, k = self.normalise(plain, k)
        q, k = self.turn(plain, k, step)
        key = self._extend(state.key if state else None, k, step)
        value = self._extend(state.value if state else None, v, step)
        block_key = None
        if not self.is_routed:
            out = self._attend_to_all(q, key, value, step, state is None)
        else:
            query = self.block_keys.query(plain, q, step)
            block_key = self._pool(state.block_key if state else None, key, step, length)
            routes = self.route(query, block_key, step)
            out = self._attend(q, key, value, routes, step)
            if step.trace is not None:
                step.trace.query.append(query)
                step.trace.block_key.append(block_key)
                step.trace.routes.append(routes)
        if step.trace is not None and (config.routed_layers or key.dtype == torch.uint8):
            step.trace.attention.append(out)
        return self.o_proj(out.transpose(1, 2).flatten(2)), LayerState(key, value, block_key)


class MLP(SwiGLU):
    """The MLP of a layer without experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        return super().forward(x)


class DecoderLayer(nn.Module):
    """Attention and MLP (or experts), each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        has_experts = config.experts is not None and index in config.experts.layers
        self.self_attn = Attention(config, index)
        self.mlp = ExpertMLP(config, config.experts, index) if has_experts and config.experts else MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState]:
        attended, state = self.self_attn(self.input_layernorm(x), step, state)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), step), state


def hidden_name(index: int) -> str:
    """What an exported graph calls the hidden state that enters layer ``index`` (after the last layer: the final norm)."""
    return f"hidden.{index}"


def _steps(step: Step) -> Iterator[Step]:
    """``step``, and then others whose traces are thrown away: a layer that is computed again has left its trace already."""
    before = step.trace.copy() if step.trace is not None else None
    yield step
    while True:
        yield replace(step, trace=before.copy() if before is not None else None)


class Decoder(nn.Module):
    """Embedding, level 1, the layers and the last norm.

    recomputes_layers: in training, a layer keeps what enters it and is computed again on the way back (activation
    checkpointing): a third more work, and memory for one layer's inside instead of all of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputes_layers = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        if config.routing.is_two_level:
            self.word_router = WordRouter(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def begin(
        self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, state: DecoderState | None, trace: Trace | None = None
    ) -> tuple[Tensor, Step, Tensor | None, Tensor | None]:
        """What comes before the layers: (embeddings [B, L, d], what all layers share, token_ids, word_block_key)."""
        config = self.config
        x = self.embed_tokens(input_ids)
        candidates = token_ids = word_block_key = None
        if config.routing.is_two_level:
            candidates, token_ids, word_block_key = self.word_router(
                input_ids, past_len, new_len, self.embed_tokens, state, trace
            )
        position = past_len[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        cos, sin = rotary_angles(position, config)
        experts = config.experts
        words = unit(x) if experts is not None and experts.has_centroids else None
        named = input_ids if experts is not None and experts.hash_layers else None
        step = Step(past_len, new_len, cos, sin, candidates, words, trace, named)
        return ops.name_value(x, hidden_name(0)), step, token_ids, word_block_key

    def forward(
        self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, state: DecoderState | None, trace: Trace | None = None
    ) -> tuple[Tensor, DecoderState]:
        """input_ids: int64 [B, L], right-padded. past_len, new_len: int32 [B]. Returns ([B, L, d], the new state)."""
        x, step, token_ids, word_block_key = self.begin(input_ids, past_len, new_len, state, trace)
        layers = []
        for index, layer in enumerate(self.layers):
            x, layer_state = self._run(layer, x, step, state.layers[index] if state else None)
            x = ops.name_value(x, hidden_name(index + 1))
            layers.append(layer_state)
        return self.norm(x), DecoderState(layers, token_ids, word_block_key)

    def _run(self, layer: nn.Module, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState]:
        if not (self.recomputes_layers and torch.is_grad_enabled() and state is None):
            return layer(x, step, state)
        steps = _steps(step)
        return checkpoint(lambda x: layer(x, next(steps), None), x, use_reentrant=False)


class CausalLM(nn.Module):
    """The decoder with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, trace: Trace | None = None) -> Tensor:
        """Logits [B, L, vocab] of whole texts (training, evaluation): no state, every row full."""
        batch, length = input_ids.shape
        past_len = torch.zeros(batch, dtype=torch.int32, device=input_ids.device)
        hidden, _ = self.model(input_ids, past_len, torch.full_like(past_len, length), None, trace)
        return self.lm_head(hidden)

    def step(
        self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, state: DecoderState, trace: Trace | None = None
    ) -> tuple[Tensor, DecoderState]:
        """One call of chunked prefill or decode: logits [B, vocab] of each row's last valid token, and the new state."""
        hidden, state = self.model(input_ids, past_len, new_len, state, trace)
        return self.lm_head(last_valid(hidden, new_len)), state


def last_valid(hidden: Tensor, new_len: Tensor) -> Tensor:
    """[B, d]: each row's vector at new_len - 1 (position 0 where the row has no new token)."""
    batch, length = hidden.shape[:2]
    index = torch.arange(batch, device=hidden.device) * length + (new_len.long() - 1).clamp(min=0)
    return hidden.flatten(0, 1).index_select(0, index)
