"""A checkpoint that runs in PyTorch where the runtime runs a bundle, and chooses blocks by their true attention mass.

In every routed layer ordinary attention over all visible tokens is computed from the layer's input, its weights are summed over
the tokens of each block and over the query heads that share a choice, and the blocks with most of it are read (and those that
are always kept). No router that reads as many blocks of this input keeps more of the attention.

``open_session`` gives what ``bilevel.runtime.backend.session.Session`` describes; the runtime loads this module by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel import ops
from bilevel.bundle.format import Bundle
from bilevel.checkpoint import load_model
from bilevel.errors import CheckpointError
from bilevel.model import Attention, CausalLM
from bilevel.operators.attention import visible_tokens
from bilevel.operators.routing import block_mask
from bilevel.state import DecoderState, LayerState, Step, Trace


@dataclass(frozen=True)
class Limits:
    """See the runtime's ``SessionLimits``."""

    longest_call: int
    capacity: int | None = None
    fewest_rows: int = 1
    builder: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class ChosenRoutes:
    """See the runtime's ``Routes``. Level 1 is passed over, so there are no candidates."""

    blocks: NDArray[np.int32]
    candidates: None = None
    experts: dict[int, NDArray[np.int32]] = field(default_factory=dict)


class TrueMass:
    """Takes the place of one layer's choice.

    recalls: of single tokens, the share of the best choice's mass that the model's own choice holds. Blocks that are always
    kept are left out of both; nothing is noted where they leave no mass.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention, self.own_route = attention, attention.route
        self.recalls: list[float] = []
        self._input: tuple[Tensor, Step, LayerState] | None = None
        attention.register_forward_pre_hook(self._remember)
        attention.route = self.route  # type: ignore[method-assign]

    def _remember(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self._input = (arguments[0], arguments[1], arguments[2])

    def route(self, query: Tensor, block_key: Tensor, step: Step) -> Tensor:
        """The blocks of most mass, int32 [B, Hs, L, K2]. The layer's key cache holds this call's keys already."""
        assert self._input is not None
        x, _, state = self._input
        config = self.attention.config
        attributes = config.route_attributes(2)
        heads, size = int(attributes["num_selection_heads"]), config.routing.block_size
        plain, k, _ = self.attention.project(x)
        q, _ = self.attention.turn(*self.attention.normalise(plain, k), step)
        mass = block_mass(q, state.key, step, config.attention_scale, size, heads)
        best = choose_by_mass(mass, step, attributes)
        if mass.shape[2] == 1:
            self._note(mass, best, self.own_route(query, block_key, step))
        return best

    def _note(self, mass: Tensor, best: Tensor, own: Tensor) -> None:
        routing = self.attention.config.routing
        last = int(self._position()) // routing.block_size
        free = torch.ones(mass.shape[-1])
        free[: routing.init_blocks] = 0
        free[max(last + 1 - max(routing.local_blocks, 1), 0) :] = 0
        held, most = ((mass * block_mask(routes, mass.shape[-1]) * free).sum() for routes in (own, best))
        if most > 0:
            self.recalls.append(min(float(held / most), 1.0))

    def _position(self) -> Tensor:
        assert self._input is not None
        return self._input[1].past_len[0]


def block_mass(q: Tensor, key: Tensor, step: Step, scale: float, block_size: int, heads: int) -> Tensor:
    """Weights of dense attention summed over blocks: fp32 [B, Hs, L, N], the mean over a selection head's query heads.

    q: [B, Hq, L, D], key: [B, Hkv, M, D] with this call's keys.
    """
    groups = q.shape[1] // key.shape[1]
    scores = q.float() @ key.float().repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    visible = visible_tokens(key.shape[2], q.shape[2], step.past_len, step.new_len, True)[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    blocks = weights.unflatten(-1, (-1, block_size)).sum(-1)
    return blocks.unflatten(1, (heads, -1)).mean(2)


def choose_by_mass(mass: Tensor, step: Step, attributes: dict[str, Any]) -> Tensor:
    """CoarseRoute with the mass itself as score: its product with unit vectors, one for each block."""
    unit = torch.eye(mass.shape[-1]).expand(mass.shape[0], mass.shape[1], -1, -1).contiguous()
    return ops.coarse_route(mass, unit, step.past_len, step.new_len, **attributes)


class MassCaches:
    """One batch; see the runtime's ``Caches``."""

    def __init__(self, model: CausalLM, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.routes: ChosenRoutes | None = None
        self._model, self._state = model, DecoderState.empty(model.config, batch, capacity)

    @torch.no_grad()
    def run(self, input_ids: NDArray[np.int64], past_len: NDArray[np.int32], new_len: NDArray[np.int32]) -> NDArray[np.float32]:
        """See ``Caches.run``."""
        trace = Trace()
        ids, past, new = (torch.from_numpy(array.copy()) for array in (input_ids, past_len, new_len))
        logits, self._state = self._model.step(ids, past, new, self._state, trace)
        self.routes = ChosenRoutes(np.stack([routes.numpy() for routes in trace.routes]))
        return np.asarray(logits.float().numpy())


class MassSession:
    """See the runtime's ``Session``."""

    backend, device = "pytorch", "cpu"

    def __init__(self, bundle: Bundle, model: CausalLM) -> None:
        self.bundle, self.limits = bundle, Limits(bundle.prefill_chunk)
        self._model = model
        routed = (index for index in range(len(model.model.layers)) if index in model.config.routed_layers)
        self._layers = {index: TrueMass(_attention(model, index)) for index in routed}

    def allocate(self, batch: int, capacity: int) -> MassCaches:
        """See ``Session.allocate``."""
        return MassCaches(self._model, batch, capacity)

    def mass_recall(self) -> dict[int, float]:
        """Of each routed layer, the mean over the single tokens read so far (see ``TrueMass``)."""
        return {index: sum(each.recalls) / len(each.recalls) for index, each in self._layers.items() if each.recalls}


def _attention(model: CausalLM, index: int) -> Attention:
    attention = model.model.layers[index].get_submodule("self_attn")
    assert isinstance(attention, Attention)
    return attention


def open_session(bundle: Bundle, checkpoint: Path) -> MassSession:
    """The checkpoint of a bundle. Raises CheckpointError where it is another model's, ConfigError where it cannot be read."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no folder; give the checkpoint that the bundle was exported from")
    model = load_model(checkpoint, ignore=bundle.ignored_keys)
    config, routing = bundle.config, bundle.config["routing"]
    theirs = (config["num_hidden_layers"], config["hidden_size"], bundle.vocab_size, routing["topk"], bundle.block_size)
    own = model.config
    ours = (own.num_hidden_layers, own.hidden_size, own.vocab_size, own.routing.topk, own.routing.block_size)
    if theirs != ours or not own.routed_layers:
        raise CheckpointError(f"{checkpoint} is not the checkpoint of {bundle.folder}; give the one that it was exported from")
    return MassSession(bundle, model.eval())
