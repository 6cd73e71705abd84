"""The decoder's forward pass layer by layer, with a choice of what each layer reads: everything, or blocks by any kind of keys.

``bilevel.model`` is the truth; here a context is read once and many questions behind it share its caches, and whoever wants
to see a layer's queries and keys is shown them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import ops
from bilevel.block_keys import MeanKeys, block_keys
from bilevel.config import ModelConfig, Routing
from bilevel.export.route.words import WordLevel
from bilevel.model import Attention, CausalLM, DecoderLayer
from bilevel.operators.routing import block_mask, head_map
from bilevel.rotary import rotary_angles
from bilevel.state import Step
from bilevel.word_router import unit

_CHUNK, _DENSE_CHUNK = 512, 256  # queries of a routed and of a dense layer at a time

# Layer -> what chooses its blocks; a layer that is not named reads everything.
Choosers = Mapping[int, "Chooser"]
# Is shown of each layer: its index, queries and keys [1, H, L, D] before rotation, and after it.
Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Chooser:
    """What one layer's words choose their blocks by. config: of a model whose routing section says how."""

    config: ModelConfig
    keys: MeanKeys
    words: WordLevel | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.config.routing.block_size

    def pool(self, key: Tensor) -> Tensor:
        """The blocks' keys [1, Hkv, N, Dr] of rotated keys [1, Hkv, M, D], M a multiple of the block size."""
        first = torch.zeros(1, dtype=torch.int32)
        return self.keys.pool(key, first, key.shape[2] // self.block_size, shared_step(self.config, torch.zeros(1, 1)))

    def choose(self, query: Tensor, unit_key: Tensor, past_len: Tensor, candidates: Tensor | None) -> Tensor:
        """bool [B, Hs, L, N]: the blocks that are read, from queries [B, Hr, L, Dr] behind ``past_len`` [B] tokens.

        candidates: level 1's, int32 [B, 1, L, K1]; None: all blocks."""
        new_len, attributes = torch.full_like(past_len, query.shape[2]), self.config.route_attributes(2)
        if candidates is None:
            routes = ops.coarse_route(query, unit_key, past_len, new_len, **attributes)
        else:
            routes = ops.fine_route(query, unit_key, candidates, past_len, new_len, **attributes)
        return block_mask(routes, unit_key.shape[2])


def make_choosers(
    config: ModelConfig,
    routing: Routing,
    gates: Mapping[int, Mapping[str, Tensor]] | None = None,
    words: WordLevel | None = None,
) -> dict[int, Chooser]:
    """A chooser for each layer that ``routing`` does not leave dense. gates: layer -> the gate's parameters by name. words:
    level 1, where there is one."""
    routed = dataclasses.replace(config, routing=routing)
    choosers = {}
    for layer in routed.routed_layers:
        keys = block_keys(routed, layer not in config.nope_layers)
        if gates is not None:
            keys.load_state_dict(dict(gates[layer]))
        choosers[layer] = Chooser(routed, keys, words)
    return choosers


@dataclass
class Prefix:
    """A context that was read. ids: int64 [M]. keys, values: per layer [1, Hkv, M, D], rotated. hidden: [1, M, d] behind the
    last norm. word_keys: level 1's, [1, 1, N, Dr]."""

    ids: Tensor

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None
    word_keys: Tensor | None = None

    @property
    def length(self) -> int:
        """M."""
        return self.keys[0].shape[2]


def shared_step(config: ModelConfig, positions: Tensor, words: Tensor | None = None, token_ids: Tensor | None = None) -> Step:
    """What layers share, for tokens at positions [1, L]."""
    cos, sin = rotary_angles(positions, config)
    empty = torch.zeros(1, dtype=torch.int32)
    return Step(empty, torch.full_like(empty, positions.shape[1]), cos, sin, None, words, None, token_ids)


def _begin(model: CausalLM, ids: Tensor, positions: Tensor) -> tuple[Tensor, Step]:
    """Embeddings [1, L, d] and what layers share."""
    x = model.model.embed_tokens(ids[None])
    experts = model.config.experts
    words = unit(x) if experts is not None and experts.has_centroids else None
    return x, shared_step(model.config, positions[None], words, ids[None])


def _projected(attention: Attention, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys before rotation, after it, and values, of the normed stream x [1, L, d]."""
    plain_q, plain_k, v = attention.project(x)
    plain_q, plain_k = attention.normalise(plain_q, plain_k)
    q, k = attention.turn(plain_q, plain_k, step)
    return plain_q, plain_k, q, k, v


def _layers(model: CausalLM) -> list[DecoderLayer]:
    return [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]


def _wide_heads(x: Tensor, heads: int) -> Tensor:
    return x[:, head_map(heads, x.shape[1], x.device)]


@torch.inference_mode()
def read(model: CausalLM, ids: Tensor, choosers: Choosers, observe: Observer | None = None) -> Prefix:
    """Read a context int64 [M] from its beginning. M must be a multiple of the choosers' block sizes."""
    x, step = _begin(model, ids, torch.arange(len(ids)))
    prefix, candidates = Prefix(ids), None
    if (words := word_level(choosers)) is not None:
        candidates, prefix.word_keys = words.read(ids)
    for index, layer in enumerate(_layers(model)):
        attention = layer.self_attn
        plain_q, plain_k, q, k, v = _projected(attention, layer.input_layernorm(x), step)
        if observe is not None:
            observe(index, plain_q, plain_k, q, k)
        if (chooser := choosers.get(index)) is None:
            out = _read_dense(q, _wide_heads(k, q.shape[1]), _wide_heads(v, q.shape[1]), model.config.attention_scale)
        else:
            out = _read_routed(chooser, chooser.keys.query(plain_q, q, step), q, k, v, candidates)
        prefix.keys.append(k)
        prefix.values.append(v)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x), step)
    prefix.hidden = model.model.norm(x)
    return prefix


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention [1, H, L, D] over what ``mask``, bool [1, H or 1, L, M], allows."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # On a CPU that multiplies bfloat16 fast, plain products take half the time of PyTorch's fused attention in it.
    return ((q * scale) @ k.mT).masked_fill_(~mask, -torch.inf).softmax(-1) @ v


def _read_dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention [1, Hq, M, D] of a whole context."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    outs = []
    for first in range(0, q.shape[2], _DENSE_CHUNK):
        part = q[:, :, first : first + _DENSE_CHUNK]
        end = first + part.shape[2]
        mask = torch.arange(end) <= torch.arange(first, end)[:, None]
        outs.append(_attend(part, k[:, :, :end], v[:, :, :end], mask, scale))
    return torch.cat(outs, 2)


def _read_routed(chooser: Chooser, query: Tensor, q: Tensor, k: Tensor, v: Tensor, candidates: Tensor | None) -> Tensor:
    """Attention [1, Hq, M, D] of a whole context, some queries at a time."""
    unit_key, size, heads = chooser.pool(k), chooser.block_size, q.shape[1]
    k, v = _wide_heads(k, heads), _wide_heads(v, heads)
    outs = []
    for first in range(0, q.shape[2], _CHUNK):
        part = q[:, :, first : first + _CHUNK]
        end = first + part.shape[2]
        blocks = -(-end // size)
        past_len = torch.tensor([first], dtype=torch.int32)
        offered = None if candidates is None else candidates[:, :, first:end]
        kept = chooser.choose(query[:, :, first:end], unit_key[:, :, :blocks], past_len, offered)
        causal = torch.arange(end) <= torch.arange(first, end)[:, None]
        mask = _wide_heads(kept, heads).repeat_interleave(size, -1)[..., :end] & causal
        scale = chooser.config.attention_scale
        outs.append(_attend(part, k[:, :, :end], v[:, :, :end], mask, scale))
    return torch.cat(outs, 2)


@dataclass
class Packed:
    """Questions behind one context as a single row of T tokens, each question reading the context and itself.

    ids, positions: int64 [T]. own: bool [T, T], what a token reads of the row. bounds: (first, end) of each question.
    """

    ids: Tensor
    positions: Tensor
    own: Tensor
    bounds: list[tuple[int, int]]

    @classmethod
    def of(cls, questions: Sequence[Tensor], context: int) -> Packed:
        """questions: int64 [Q] each, behind ``context`` tokens."""
        lengths = [len(question) for question in questions]
        place = torch.cat([torch.arange(length) for length in lengths])
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        own = (row[:, None] == row) & (place[:, None] >= place)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return cls(torch.cat(list(questions)), context + place, own, list(zip([0, *ends], ends, strict=False)))


@torch.inference_mode()
def ask(
    model: CausalLM, prefix: Prefix, packed: Packed, choosers: Choosers, *, start: tuple[int, Tensor] | None = None,
    streams: list[Tensor] | None = None, observe: Observer | None = None,
) -> Tensor:  # fmt: skip
    """The stream [1, T, d] behind the last norm, of questions behind a context.

    start: (layer, its input), to go on from there. streams: is given each layer's input.
    """
    x, step = _begin(model, packed.ids, packed.positions)
    candidates = _candidates(prefix, packed, choosers)
    first = 0
    if start is not None:
        first, x = start
    for index, layer in list(enumerate(_layers(model)))[first:]:
        if streams is not None:
            streams.append(x)
        attention = layer.self_attn
        plain_q, plain_k, q, k, v = _projected(attention, layer.input_layernorm(x), step)
        if observe is not None:
            observe(index, plain_q, plain_k, q, k)
        mask = packed.own[None, None]
        if (chooser := choosers.get(index)) is None:
            context = torch.ones(1, 1, len(packed.ids), prefix.length, dtype=torch.bool)
        else:
            query = chooser.keys.query(plain_q, q, step)
            kept = chosen_blocks(chooser, query, chooser.pool(prefix.keys[index]), packed, candidates)
            context = _wide_heads(kept, q.shape[1]).repeat_interleave(chooser.block_size, -1)
        mask = torch.cat([context, mask.expand(-1, context.shape[1], -1, -1)], -1)
        k, v = (torch.cat(pair, 2) for pair in ((prefix.keys[index], k), (prefix.values[index], v)))
        k, v = (_wide_heads(each, q.shape[1]) for each in (k, v))
        out = _attend(q, k, v, mask, model.config.attention_scale)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x), step)
    return model.model.norm(x)


def word_level(choosers: Choosers) -> WordLevel | None:
    """Level 1, which all layers share."""
    return next((chooser.words for chooser in choosers.values()), None)


def _candidates(prefix: Prefix, packed: Packed, choosers: Choosers) -> Tensor | None:
    """Level 1's candidates int32 [Q, 1, longest, K1] for the tokens of the questions; None without a level 1."""
    words = word_level(choosers)
    if words is None or prefix.word_keys is None:
        return None
    longest, window = max(end - first for first, end in packed.bounds), words.config.routing.window
    before = prefix.ids[-window:]
    rows = packed.ids.new_zeros(len(packed.bounds), len(before) + longest)
    for row, (first, end) in enumerate(packed.bounds):
        rows[row, : len(before) + end - first] = torch.cat([before, packed.ids[first:end]])
    keys = _with_room(prefix.word_keys, longest, words.config.routing.block_size, len(rows))
    past_len = torch.full((len(rows),), prefix.length, dtype=torch.int32)
    return words.candidates(words.queries(rows, len(before)), keys, past_len)


def _with_room(unit_key: Tensor, length: int, block_size: int, rows: int) -> Tensor:
    """Keys [1, H, N, Dr] for every one of ``rows`` rows, with blocks for ``length`` further tokens."""
    return F.pad(unit_key, (0, 0, 0, -(-length // block_size))).expand(rows, -1, -1, -1)


def chosen_blocks(
    chooser: Chooser, query: Tensor, unit_key: Tensor, packed: Packed, candidates: Tensor | None = None
) -> Tensor:
    """bool [1, Hs, T, N]: the context's blocks that each token of the questions reads. query: [1, Hr, T, Dr]."""
    longest = max(end - first for first, end in packed.bounds)
    blocks = unit_key.shape[2]
    rows = query.new_zeros(len(packed.bounds), query.shape[1], longest, query.shape[3])
    for row, (first, end) in enumerate(packed.bounds):
        rows[row, :, : end - first] = query[0, :, first:end]
    # The questions' own blocks are forced and take their share of the budget; what they hold is read in any case.
    unit_key = _with_room(unit_key, longest, chooser.block_size, len(rows))
    past_len = torch.full((len(rows),), blocks * chooser.block_size, dtype=torch.int32)
    kept = chooser.choose(rows, unit_key, past_len, candidates)[..., :blocks]
    parts = [kept[row, :, : end - first] for row, (first, end) in enumerate(packed.bounds)]
    return torch.cat(parts, 1)[None]
