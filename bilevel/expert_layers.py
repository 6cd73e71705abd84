"""A mixture of experts routed in two levels: groups by the word, experts by the context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ops
from bilevel.config import Experts, ModelConfig
from bilevel.operators.experts import weights_of
from bilevel.operators.precision import wide
from bilevel.state import Step, Trace
from bilevel.word_router import unit


class ExpertGate(nn.Module):
    """The weights of both levels of expert routing; the choice itself is ``ops.expert_route``.

    vocabulary: entries of the table that gives a word's experts, 0 where the context chooses them. The table,
    ``tid2eid`` int32 [vocabulary, k], is level 1 alone: each expert is a group, and the word's k are kept.
    """

    e_score_correction_bias: Tensor
    tid2eid: Tensor

    def __init__(self, experts: Experts, width: int, vocabulary: int = 0) -> None:
        super().__init__()
        self.experts, self.by_table = experts, vocabulary > 0
        self.weight = nn.Parameter(torch.empty(experts.num_experts, width))
        nn.init.normal_(self.weight, std=0.02)
        if self.by_table:
            table = torch.arange(vocabulary * experts.top_k, dtype=torch.int32).view(vocabulary, -1)
            self.register_buffer("tid2eid", table % experts.num_experts)
        elif experts.select_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts.num_experts))
        if experts.group_score == "external" and not self.by_table:
            self.group_centroid = nn.Parameter(torch.empty(experts.n_group, width))
            nn.init.normal_(self.group_centroid, std=0.02)

    def _group_logits(self, logits: Tensor, words: Tensor | None, token_ids: Tensor | None) -> Tensor:
        """Level 1, [T, Gp]: 1 for the experts that the table names and 0 for the others, or cosines with the centroids."""
        if self.by_table:
            assert token_ids is not None
            named = self.tid2eid.index_select(0, token_ids).long()
            return torch.zeros_like(logits).scatter(1, named, torch.ones_like(named, dtype=logits.dtype))
        if words is not None and self.experts.group_score == "external":
            return F.linear(words, unit(self.group_centroid))
        return logits.new_zeros(logits.shape[0], self.experts.n_group)

    def forward(self, x: Tensor, words: Tensor | None, token_ids: Tensor | None, trace: Trace | None) -> tuple[Tensor, Tensor]:
        """x: [T, d]; for level 1 unit word embeddings fp32 [T, d], or token_ids int64 [T]. Returns ids, weights [T, k]."""
        spec = self.experts
        logits = F.linear(wide(x), wide(self.weight))
        group_logits = self._group_logits(logits, words, token_ids)
        has_bias = spec.select_bias and not self.by_table
        bias = self.e_score_correction_bias if has_bias else logits.new_zeros(spec.num_experts)
        ids, weights = ops.expert_route(logits, group_logits, bias.to(logits.dtype), **spec.route_attributes(self.by_table))
        if trace is not None and (given := trace.given("expert_ids")) is not None:
            ids, weights = given, self._given_weights(logits, given, trace.given("expert_weights"))
        if trace is not None:
            trace.expert_logits.append(logits)
            trace.group_logits.append(group_logits)
            trace.expert_bias.append(bias)
            trace.expert_ids.append(ids)
            trace.expert_weights.append(weights)
        return ids, weights

    def _given_weights(self, logits: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
        """The weights that come with given experts, or those that these would have had here."""
        if weights is not None:
            return weights.to(logits.dtype)
        spec = self.experts
        return weights_of(
            logits,
            ids,
            score_func=spec.score_func,
            normalize=int(spec.normalize),
            scale=float(spec.scale),
            norm_floor=float(spec.norm_floor),
        )


class ExpertWeights(nn.Module):
    """All experts' weights stacked: gate_up_proj [E, 2f, d] (gate rows first), down_proj [E, d, f]."""

    def __init__(self, experts: Experts, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts.num_experts, 2 * experts.intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(experts.num_experts, width, experts.intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): width -> hidden -> width."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertMLP(nn.Module):
    """Experts routed in two levels, groups by the word and experts by the context; beside them a shared expert, or none."""

    def __init__(self, config: ModelConfig, experts: Experts, index: int) -> None:
        super().__init__()
        self.gate = ExpertGate(experts, config.hidden_size, config.vocab_size if index in experts.hash_layers else 0)
        self.experts = ExpertWeights(experts, config.hidden_size)
        self.shared_experts: SwiGLU | None = None
        if experts.shared_intermediate_size:
            self.shared_experts = SwiGLU(config.hidden_size, experts.shared_intermediate_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        flat = x.flatten(0, 1)
        words = step.words.flatten(0, 1) if step.words is not None else None
        token_ids = step.token_ids.flatten() if step.token_ids is not None else None
        ids, weights = self.gate(flat, words, token_ids, step.trace)
        out = ops.routed_experts(flat, ids, weights, self.experts.gate_up_proj, self.experts.down_proj)
        if step.trace is not None:
            step.trace.expert_out.append(out)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.reshape(x.shape)
