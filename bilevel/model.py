"""The decoder: Llama/Qwen3 with two-level routing. Weight names are those of Hugging Face.

One forward serves training (no state: the call is the whole text), chunked prefill and decode (a ``DecoderState`` that the
call extends). Everything stateful is here, as ordinary tensor code; the routing operators themselves are pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ops
from bilevel.attention import dense_attention
from bilevel.config import Experts, ModelConfig
from bilevel.plugins.errors import ContractError
from bilevel.rotary import apply_rotary, rotary_angles


@dataclass
class LayerState:
    """One layer's cache: key, value [B, Hkv, M, D]; block_key [B, Hkv, N, D] (None where attention is dense)."""

    key: Tensor
    value: Tensor
    block_key: Tensor | None


@dataclass
class DecoderState:
    """What one call leaves for the next. token_ids int64 [B, M] and word_block_key [B, 1, N, Dr] belong to level 1."""

    layers: list[LayerState]
    token_ids: Tensor | None = None
    word_block_key: Tensor | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32) -> DecoderState:
        """Zeroed caches for ``capacity`` tokens; the capacity must be a multiple of the block size."""
        routing = config.routing
        if capacity % routing.block_size:
            raise ContractError(f"capacity={capacity} must be a multiple of routing.block_size={routing.block_size}")
        num_blocks = capacity // routing.block_size

        def zeros(tokens: int) -> Tensor:
            return torch.zeros(batch, config.num_key_value_heads, tokens, config.head_dim, dtype=dtype)

        layers = [
            LayerState(zeros(capacity), zeros(capacity), None if routing.is_dense else zeros(num_blocks))
            for _ in range(config.num_hidden_layers)
        ]
        if not routing.is_two_level:
            return cls(layers)
        word_block_key = torch.zeros(batch, 1, num_blocks, config.route_dim, dtype=dtype)
        return cls(layers, torch.zeros(batch, capacity, dtype=torch.int64), word_block_key)


@dataclass
class Trace:
    """What the routers saw and chose, for training losses, recall and parity checks; filled when given to ``forward``.

    candidates: level 1's blocks, int32 [B, 1, L, K1]. word_query / word_block_key: what level 1 compared.
    Per layer: query [B, Hq, L, D], block_key [B, Hkv, N, D], routes int32 [B, Hs, L, K2], attention [B, Hq, L, D].
    Per expert layer: expert_logits [T, E], group_logits [T, Gp], expert_ids int32 [T, k], expert_weights [T, k],
    expert_out [T, d].
    """

    candidates: Tensor | None = None
    word_query: Tensor | None = None
    word_block_key: Tensor | None = None
    query: list[Tensor] = field(default_factory=list)
    block_key: list[Tensor] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    expert_logits: list[Tensor] = field(default_factory=list)
    group_logits: list[Tensor] = field(default_factory=list)
    expert_ids: list[Tensor] = field(default_factory=list)
    expert_weights: list[Tensor] = field(default_factory=list)
    expert_out: list[Tensor] = field(default_factory=list)


@dataclass
class Step:
    """What every layer of one call shares. cos, sin: [B, L, D/2]; words: unit word embeddings [B, L, d] or None."""

    past_len: Tensor
    new_len: Tensor
    cos: Tensor
    sin: Tensor
    candidates: Tensor | None
    words: Tensor | None
    trace: Trace | None


def _extend(cache: Tensor | None, update: Tensor, start: Tensor, block_size: int) -> Tensor:
    """The cache with this call's rows written at ``start``; without a cache the call is the whole text."""
    return ops.pad_to_blocks(update, block_size) if cache is None else ops.write_cache(cache, update, start)


def _pool_into(cache: Tensor | None, tokens: Tensor, past_len: Tensor, length: int, block_size: int) -> Tensor:
    """Block means of the cache with the blocks that this call touched pooled anew."""
    first = torch.div(past_len, block_size, rounding_mode="floor")
    pooled = ops.pool_blocks(tokens, first, (length + block_size - 1) // block_size, block_size)
    return pooled if cache is None else ops.write_cache(cache, pooled, first)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors divided by their length, in fp32."""
    return F.normalize(vectors.float(), dim=-1)


class WordRouter(nn.Module):
    """Level 1, the word-embedding layer: candidates for every word, once per call, shared by all layers and heads.

    With ê the (projected) word embedding over its length: a word's query is the normalised mean of ê over the last
    ``window`` words, a block's key the normalised mean of ê over its words, and their dot product the score.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.routing = config.routing
        self.proj = nn.Linear(config.hidden_size, config.route_dim, bias=False) if config.routing.route_dim else nn.Identity()

    def words(self, embeddings: Tensor) -> Tensor:
        """ê: fp32 [..., Dr] for embeddings [..., d]."""
        return _unit(self.proj(embeddings))

    def query(self, token_ids: Tensor, past_len: Tensor, length: int, embed: nn.Embedding) -> Tensor:
        """[B, 1, L, Dr]: normalised mean over the last ``window`` words up to each position; token_ids [B, M]."""
        offset = torch.arange(self.routing.window, device=token_ids.device)
        position = past_len[:, None].long() + torch.arange(length, device=token_ids.device)
        index = position[..., None] - offset
        ids = token_ids.gather(1, index.clamp(min=0, max=token_ids.shape[1] - 1).flatten(1)).unflatten(1, (length, -1))
        words = torch.where((index >= 0)[..., None], self.words(embed(ids)), 0.0)
        return _unit(words.sum(2))[:, None].to(embed.weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        past_len: Tensor,
        new_len: Tensor,
        embed: nn.Embedding,
        state: DecoderState | None,
        trace: Trace | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (candidates int32 [B, 1, L, K1], token_ids [B, M], word_block_key [B, 1, N, Dr])."""
        routing, length = self.routing, input_ids.shape[1]
        size = routing.block_size
        if state is None or state.token_ids is None or state.word_block_key is None:
            token_ids, block_key = F.pad(input_ids, (0, -length % size)), None
        else:
            token_ids, block_key = ops.write_cache(state.token_ids, input_ids, past_len), state.word_block_key
        first = torch.div(past_len, size, rounding_mode="floor")
        num_touched = (length + size - 1) // size
        touched = ops.gather_blocks(token_ids[:, None, :, None], first, num_touched, size)[:, 0, :, :, 0]
        pooled = _unit(self.words(embed(touched)).mean(2))[:, None].to(embed.weight.dtype)
        block_key = pooled if block_key is None else ops.write_cache(block_key, pooled, first)
        query = self.query(token_ids, past_len, length, embed)
        candidates = ops.coarse_route(
            query,
            block_key,
            past_len,
            new_len,
            block_size=size,
            topk=routing.coarse_topk,
            num_selection_heads=1,
            init_blocks=routing.init_blocks,
            local_blocks=routing.local_blocks,
            causal=1,
        )
        if trace is not None:
            trace.word_query, trace.word_block_key, trace.candidates = query, block_key, candidates
        return candidates, token_ids, block_key


class Attention(nn.Module):
    """Grouped-query attention; level 2 of the routing decides which blocks of tokens each word reads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)
        if config.has_qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def route(self, q: Tensor, block_key: Tensor, step: Step) -> Tensor:
        """The blocks that each word of this layer reads: int32 [B, Hs, L, K2]."""
        routing = self.config.routing
        attributes = {
            "block_size": routing.block_size,
            "topk": routing.topk,
            "num_selection_heads": self.config.num_selection_heads,
            "init_blocks": routing.init_blocks,
            "local_blocks": routing.local_blocks,
            "causal": 1,
        }
        if step.candidates is None:
            return ops.coarse_route(q, block_key, step.past_len, step.new_len, **attributes)
        return ops.fine_route(q, block_key, step.candidates, step.past_len, step.new_len, **attributes)

    def forward(self, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """x: [B, L, d]. Returns ([B, L, d], the layer's state after this call)."""
        config, size, length = self.config, self.config.routing.block_size, x.shape[1]
        q, k, v = (
            proj(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if config.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, step.cos, step.sin), apply_rotary(k, step.cos, step.sin)
        key = _extend(state.key if state else None, k, step.past_len, size)
        value = _extend(state.value if state else None, v, step.past_len, size)
        scale = config.head_dim**-0.5
        block_key = None
        if config.routing.is_dense:
            out = dense_attention(q, key, value, step.past_len, step.new_len, scale=scale)
        else:
            block_key = _pool_into(state.block_key if state else None, key, step.past_len, length, size)
            routes = self.route(q, block_key, step)
            out = ops.routed_attention(
                q, key, value, routes, step.past_len, step.new_len, block_size=size, causal=1, scale=scale
            )
            if step.trace is not None:
                step.trace.query.append(q)
                step.trace.block_key.append(block_key)
                step.trace.routes.append(routes)
                step.trace.attention.append(out)
        return self.o_proj(out.transpose(1, 2).flatten(2)), LayerState(key, value, block_key)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertGate(nn.Module):
    """The weights of both levels of expert routing; the choice itself is ``ops.expert_route``."""

    e_score_correction_bias: Tensor

    def __init__(self, experts: Experts, width: int) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts.num_experts, width))
        nn.init.normal_(self.weight, std=0.02)
        if experts.select_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts.num_experts))
        if experts.group_score == "external":
            self.group_centroid = nn.Parameter(torch.empty(experts.n_group, width))
            nn.init.normal_(self.group_centroid, std=0.02)

    def forward(self, x: Tensor, words: Tensor | None, trace: Trace | None) -> tuple[Tensor, Tensor]:
        """x: [T, d]; words: unit word embeddings fp32 [T, d], for level 1's prior. Returns ids, weights [T, k]."""
        spec = self.experts
        logits = F.linear(x.float(), self.weight.float())
        if words is not None and spec.group_score == "external":
            group_logits = F.linear(words, _unit(self.group_centroid))
        else:
            group_logits = logits.new_zeros(x.shape[0], spec.n_group)
        bias = self.e_score_correction_bias if spec.select_bias else logits.new_zeros(spec.num_experts)
        ids, weights = ops.expert_route(
            logits,
            group_logits,
            bias.float(),
            top_k=spec.top_k,
            topk_group=spec.topk_group,
            score_func=spec.score_func,
            group_score=spec.group_score,
            normalize=int(spec.normalize),
            scale=float(spec.scale),
        )
        if trace is not None:
            trace.expert_logits.append(logits)
            trace.group_logits.append(group_logits)
            trace.expert_ids.append(ids)
            trace.expert_weights.append(weights)
        return ids, weights


class ExpertWeights(nn.Module):
    """All experts' weights stacked: gate_up_proj [E, 2f, d] (gate rows first), down_proj [E, d, f]."""

    def __init__(self, experts: Experts, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts.num_experts, 2 * experts.intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(experts.num_experts, width, experts.intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)


class ExpertMLP(nn.Module):
    """A mixture of experts routed in two levels: groups by the word, experts by the context."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.gate = ExpertGate(experts, config.hidden_size)
        self.experts = ExpertWeights(experts, config.hidden_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        flat = x.flatten(0, 1)
        words = step.words.flatten(0, 1) if step.words is not None else None
        ids, weights = self.gate(flat, words, step.trace)
        out = ops.routed_experts(flat, ids, weights, self.experts.gate_up_proj, self.experts.down_proj)
        if step.trace is not None:
            step.trace.expert_out.append(out)
        return out.reshape(x.shape)


class DecoderLayer(nn.Module):
    """Attention and MLP (or experts), each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        has_experts = config.experts is not None and index in config.experts.layers
        self.self_attn = Attention(config)
        self.mlp = ExpertMLP(config, config.experts) if has_experts and config.experts else MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState]:
        attended, state = self.self_attn(self.input_layernorm(x), step, state)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), step), state


class Decoder(nn.Module):
    """Embedding, level 1, the layers and the last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        if config.routing.is_two_level:
            self.word_router = WordRouter(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, past_len: Tensor, new_len: Tensor, state: DecoderState | None, trace: Trace | None = None
    ) -> tuple[Tensor, DecoderState]:
        """input_ids: int64 [B, L], right-padded. past_len, new_len: int32 [B]. Returns ([B, L, d], the new state)."""
        config = self.config
        x = self.embed_tokens(input_ids)
        candidates = token_ids = word_block_key = None
        if config.routing.is_two_level:
            candidates, token_ids, word_block_key = self.word_router(
                input_ids, past_len, new_len, self.embed_tokens, state, trace
            )
        position = past_len[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        cos, sin = rotary_angles(position, config)
        needs_words = config.experts is not None and config.experts.group_score == "external"
        step = Step(past_len, new_len, cos, sin, candidates, _unit(x) if needs_words else None, trace)
        layers = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, step, state.layers[index] if state else None)
            layers.append(layer_state)
        return self.norm(x), DecoderState(layers, token_ids, word_block_key)


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
