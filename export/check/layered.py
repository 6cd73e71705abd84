"""PyTorch's side of a comparison, one part of the model in memory at a time: the embedding with level 1, every layer, the head.

A text is cut into calls as a device would read it. Every part runs over all calls before the next part is loaded, so that
memory holds one part's weights and caches and the hidden states of the text, whatever the size of the checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.checkpoint import Checkpoint
from bilevel.config import ModelConfig
from bilevel.export.check.judge import Array
from bilevel.export.check.rounding import round_weights
from bilevel.model import CausalLM, last_valid
from bilevel.state import DecoderState, LayerState, Step, Trace, empty_cache

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TextCall:
    """One call of the graph: ids int64 [B, L], past_len and new_len int32 [B]."""

    ids: Array
    past: Array
    new: Array

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three as tensors."""
        ids, past, new = (torch.from_numpy(np.ascontiguousarray(x)) for x in (self.ids, self.past, self.new))
        return ids, past, new


@dataclass(frozen=True)
class Text:
    """Rows of tokens cut into calls. ids: int64 [B, L], right-padded; lengths: [B]; calls: what a device is fed."""

    ids: Array
    lengths: Array
    calls: tuple[TextCall, ...]
    block_size: int

    @classmethod
    def cut(
        cls,
        ids: Array,
        lengths: Array,
        sizes: Sequence[int],
        block_size: int,
        longest: int | None = None,
        late: bool = False,
    ) -> Text:
        """Calls of the given sizes one after the other, the rest in calls of at most ``longest`` tokens.

        late: all rows but the first begin with the second call, so that rows of one call stand at different positions. A row
        that has not begun or is finished goes along idle at position 0 of its own caches, which nobody reads before it is
        written anew.
        """
        sizes, calls, first = list(sizes), [], 0
        begin = np.zeros(len(ids), np.int64)
        if late and sizes:
            begin[1:] = sizes[0]
        total = int((lengths + begin).max())
        while first < total:
            size = min(sizes.pop(0) if sizes else longest or total, total - first)
            new = np.where(first >= begin, np.clip(lengths + begin - first, 0, size), 0).astype(np.int32)
            past = np.where(new > 0, first - begin, 0).astype(np.int32)
            piece = np.zeros((len(ids), size), ids.dtype)
            for row, tokens in enumerate(ids):
                given = tokens[past[row] : past[row] + size]
                piece[row, : len(given)] = given
            calls.append(TextCall(piece, past, new))
            first += size
        return cls(ids, lengths, tuple(calls), block_size)

    @property
    def capacity(self) -> int:
        """Tokens that the caches hold: no more than the longest row needs, so that the last call fills them."""
        return -(-self.ids.shape[1] // self.block_size) * self.block_size

    @property
    def sizes(self) -> list[int]:
        """Tokens of each call."""
        return [call.ids.shape[1] for call in self.calls]


@dataclass
class Passage:
    """One call on its way through the model.

    x: the hidden state [B, L, d] that enters the next part. step: what all layers share. trace: what the part's routers saw and
    chose. key, value: the cache entries of this call's tokens [B, Hkv, L, D], of the part that ran last.
    """

    call: TextCall
    x: Tensor
    step: Step
    trace: Trace
    key: Tensor | None = None
    value: Tensor | None = None


class LayeredModel:
    """The checkpoint in one precision.

    precision: "float32", "float16" or "bfloat16": what weights and activations are rounded to. exact: compute in fp64 with the
    weights so rounded. weights: "fp32", or the integer format that matrices are rounded to. caches: "fp32", or the format of
    packed keys and values. prepare: called with each part once its weights are there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: str = "float32",
        *,
        exact: bool = False,
        weights: str = "fp32",
        caches: str = "fp32",
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.dtype = torch.float64 if exact else DTYPES[precision]
        self._stored, self._weights, self.caches, self._prepare = DTYPES[precision], weights, caches, prepare
        self.model = checkpoint.skeleton()

    def with_config(self, config: ModelConfig) -> LayeredModel:
        """The same weights in a model of another configuration, which must need none that the checkpoint lacks."""
        other = copy.copy(self)
        other.config = config
        with torch.device("meta"):
            other.model = CausalLM(config).eval()
        return other

    @contextmanager
    def _loaded(self, *parts: str) -> Iterator[None]:
        """These modules with their weights, for a while."""
        modules = [self.model.get_submodule(part) for part in parts]
        try:
            for part, module in zip(parts, modules, strict=True):
                self.checkpoint.fill(self.model, part, self._stored)
                round_weights(module, self._weights, self.checkpoint.config)
                module.to(self.dtype)
                if self._prepare is not None:
                    self._prepare(module)
            with torch.no_grad():
                yield
        finally:
            for module in modules:
                module.to("meta")
            if self.config.tie_word_embeddings:
                self.model.model.embed_tokens.to("meta")

    def words(self, text: Text, obeyed: Sequence[Trace] | None = None) -> list[Passage]:
        """The embedding and level 1 over every call. obeyed: per call, a trace whose candidates are obeyed."""
        config, passages = self.config, []
        router = ("model.word_router",) if config.routing.is_two_level else ()
        state = self._empty(text) if router else None
        with self._loaded("model.embed_tokens", *router):
            for index, call in enumerate(text.calls):
                trace = Trace(forced=obeyed[index] if obeyed is not None else None)
                x, step, ids, keys = self.model.model.begin(*call.tensors, state, trace)
                if state is not None:
                    state.token_ids, state.word_block_key = ids, keys
                    trace.word_block_key = keys.clone() if keys is not None else None  # later calls write into it
                passages.append(Passage(call, x, step, trace))
        return passages

    def _empty(self, text: Text) -> DecoderState:
        """Level 1's state alone."""
        blocks = text.capacity // text.block_size
        rows = len(text.ids)
        keys = torch.zeros(rows, 1, blocks, self.config.route_dim, dtype=self.dtype)
        return DecoderState([], torch.zeros(rows, text.capacity, dtype=torch.int64), keys)

    def layer(
        self, index: int, passages: Sequence[Passage], text: Text, *, obeyed: Sequence[Trace] | None = None, keep: bool = True
    ) -> list[Passage]:
        """Layer ``index`` over every call; returns new passages.

        obeyed: per call, the trace of this layer in another precision, whose choices are obeyed. keep: record traces and cache
        entries, which cost memory.
        """
        config, results = self.config, []
        shape = len(text.ids), config.num_key_value_heads
        blocks = text.capacity // text.block_size
        key, value = (empty_cache(config, len(text.ids), text.capacity, self.dtype, self.caches) for _ in range(2))
        width = config.block_key_width
        block_key = torch.zeros(*shape, blocks, width, dtype=self.dtype) if index in config.routed_layers else None
        state = LayerState(key, value, block_key)
        with self._loaded(f"model.layers.{index}"):
            layer = self.model.model.layers[index]
            for number, passage in enumerate(passages):
                given = obeyed[number] if obeyed is not None else None
                record = Trace(forced=given) if keep or given is not None else None
                step = dataclasses.replace(passage.step, trace=record)
                x, state = layer(passage.x.to(self.dtype), step, state)
                result = dataclasses.replace(passage, x=x)
                if record is not None and keep:
                    record.block_key = [keys.clone() for keys in record.block_key]  # later calls write into it
                    result.trace = record
                    result.key, result.value = record.written
                results.append(result)
        return results

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocab] of hidden states [N, d] that leave the last layer."""
        with self._loaded("model.norm", "lm_head"):
            return self.model.lm_head(self.model.model.norm(hidden.to(self.dtype)))

    def last_logits(self, passages: Sequence[Passage]) -> list[Tensor]:
        """Logits [B, vocab] of each call's last valid tokens."""
        with self._loaded("model.norm", "lm_head"):
            model = self.model
            return [
                model.lm_head(last_valid(model.model.norm(passage.x.to(self.dtype)), passage.step.new_len))
                for passage in passages
            ]

    def hidden(self, text: Text, obeyed: Sequence[Sequence[Trace]] | None = None) -> list[Tensor]:
        """The hidden states that leave the last layer, [B, L, d] per call.

        obeyed: the choices to obey in place of this model's own: per part (level 1, then every layer) a trace per call.
        """
        passages = self.words(text, obeyed[0] if obeyed is not None else None)
        for index in range(self.config.num_hidden_layers):
            given = obeyed[index + 1] if obeyed is not None else None
            passages = self.layer(index, passages, text, obeyed=given, keep=False)
        return [passage.x for passage in passages]
