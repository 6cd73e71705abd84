"""Selection and computation: PyTorch and the probed graph side by side, call by call, with PyTorch's selections forced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.config import ModelConfig
from bilevel.export.attributes import differing_attributes
from bilevel.export.choices import block_choice, expert_choices
from bilevel.export.decoder import flatten_state, state_tensors
from bilevel.export.judge import Array, Computation, Selection, judge_selection, loosen
from bilevel.export.probe import Arrays, Probe, ProbedNode
from bilevel.model import CausalLM
from bilevel.plugins.errors import BundleError
from bilevel.state import DecoderState, Trace


@dataclass(frozen=True)
class RoutedStep:
    """One routed node, what a report calls it, and its index among the trace's tensors of its kind."""

    node: ProbedNode
    label: str
    index: int


def routed_steps(config: ModelConfig, nodes: list[ProbedNode]) -> list[RoutedStep]:
    """The routed nodes in graph order. Raises BundleError when they are not those of the model."""
    layers, experts = range(config.num_hidden_layers), sorted(config.experts.layers) if config.experts else []
    coarse = ["level 1"] if config.routing.is_two_level else [f"layer {i} level 2" for i in layers]
    fine = [f"layer {i} level 2" for i in layers] if config.routing.is_two_level else []
    labels = {
        "CoarseRoute": [] if config.routing.is_dense else coarse,
        "FineRoute": fine,
        "RoutedAttention": [] if config.routing.is_dense else [f"layer {i} attention" for i in layers],
        "ExpertRoute": [f"layer {i} experts" for i in experts],
        "RoutedExperts": [f"layer {i} expert output" for i in experts],
    }
    for op_type, names in labels.items():
        found = sum(node.op_type == op_type for node in nodes)
        if found != len(names):
            raise BundleError(
                f"the graph holds {found} {op_type} nodes, but the model of its config has {len(names)}; export it again"
            )
    numbered = {op_type: enumerate(names) for op_type, names in labels.items()}
    steps = []
    for node in nodes:
        index, label = next(numbered[node.op_type])
        steps.append(RoutedStep(node, label, index))
    return steps


def chosen(step: RoutedStep, trace: Trace) -> tuple[torch.Tensor, ...]:
    """What PyTorch selected at this node; nothing where the node is no router."""
    if step.node.op_type == "ExpertRoute":
        return trace.expert_ids[step.index], trace.expert_weights[step.index]
    if step.label == "level 1" and trace.candidates is not None:
        return (trace.candidates,)
    return (trace.routes[step.index],) if step.node.selected else ()


class Replay:
    """Runs one batch through both sides and keeps the statistics. Raises BundleError for a graph of another structure.

    probes: the graph under each of its executions (portable bodies, CPU kernels), which are held to the same by name.
    attributes: those of routed nodes that differ from the model's. selections: one per router. computations: one per tensor.
    Both by name and in graph order, so that the first one that fails is the cause.
    """

    def __init__(self, model: CausalLM, probes: dict[str, Probe]) -> None:
        self.model, self.probes = model, probes
        self.steps = routed_steps(model.config, next(iter(probes.values())).nodes)
        self.attributes = [
            entry
            for step in self.steps
            for entry in differing_attributes(model.config, step.node.op_type, step.label, step.node.attributes)
        ]
        self.selections: dict[str, Selection] = {}
        self.computations: dict[str, Computation] = {}

    def run(self, token_ids: Array, lengths: Array, cuts: list[int]) -> None:
        """Feed right-padded rows [B, L] in calls of the given sizes; lengths: valid tokens of each row."""
        for name, probe in self.probes.items():
            self._run(name, probe, token_ids, lengths, cuts)

    def _run(self, execution: str, probe: Probe, token_ids: Array, lengths: Array, cuts: list[int]) -> None:
        config = self.model.config
        size = config.routing.block_size
        batch, total = token_ids.shape
        capacity = -(-total // size) * size
        state = DecoderState.empty(config, batch, capacity)
        names = [tensor.name for tensor in state_tensors(config)]
        caches = {f"past.{n}": t.numpy().copy() for n, t in zip(names, flatten_state(state), strict=True)}
        past = np.zeros(batch, dtype=np.int32)
        for first, last in _calls(cuts, total):
            new = np.clip(lengths - first, 0, last - first).astype(np.int32)
            trace = Trace()
            chunk = np.ascontiguousarray(token_ids[:, first:last])
            with torch.no_grad():
                tokens, past_len, new_len = (torch.from_numpy(x) for x in (chunk, past, new))
                logits, state = self.model.step(tokens, past_len, new_len, state, trace)
            feeds = {"input_ids": chunk, "past_len": past, "new_len": new, **caches, **self._forced(trace)}
            got = probe.run(feeds)
            self._compare(got, trace, past, new, f"{execution}, tokens {first}..{last - 1}")
            self._computation("logits", got["logits"][new > 0], logits.numpy()[new > 0])
            caches = {f"past.{name}": got[f"present.{name}"] for name in names}
            past = past + new
            # A finished row writes its padding at the front of its own cache, which nobody reads again.
            past = np.where(lengths <= last, 0, past).astype(np.int32)

    def _forced(self, trace: Trace) -> Arrays:
        return {
            name: tensor.numpy()
            for step in self.steps
            if step.node.selected
            for name, tensor in zip(step.node.outputs, chosen(step, trace), strict=True)
        }

    def _computation(self, name: str, got: Array, expected: Array) -> None:
        self.computations.setdefault(name, Computation(name)).add(got, expected)

    def _compare(self, got: Arrays, trace: Trace, past: Array, new: Array, where: str) -> None:
        for step in self.steps:
            if step.node.op_type == "ExpertRoute":
                self._compare_experts(got, trace, step, new, where)
            elif step.node.selected:
                self._compare_blocks(got, trace, step, past, new, where)
            else:
                outputs = trace.attention if step.node.op_type == "RoutedAttention" else trace.expert_out
                self._computation(step.label, got[step.node.outputs[0]], outputs[step.index].numpy())

    def _compare_blocks(self, got: Arrays, trace: Trace, step: RoutedStep, past: Array, new: Array, where: str) -> None:
        node, label = step.node, step.label
        if label == "level 1":
            query, block_key = trace.word_query, trace.word_block_key
        else:
            query, block_key = trace.query[step.index], trace.block_key[step.index]
        assert query is not None and block_key is not None
        candidates = trace.candidates.numpy() if node.op_type == "FineRoute" and trace.candidates is not None else None
        lengths = past.astype(np.int64), new.astype(np.int64)
        shown = got[node.operands[0]], got[node.operands[1]]
        expected = query.numpy(), block_key.numpy()
        (routes,) = chosen(step, trace)
        reference = block_choice(*expected, routes.numpy(), candidates, *lengths, node.attributes)
        device = block_choice(*shown, got[node.selected[0]], candidates, *lengths, node.attributes)
        judge_selection(self.selections.setdefault(label, Selection(label)), reference, device, where)
        # Only complete blocks count: what a cache holds for the others is never read.
        complete = (past + new) // self.model.config.routing.block_size
        for row, count in enumerate(complete):
            if new[row]:
                self._computation(f"{label} block keys", shown[1][row, :, :count], expected[1][row, :, :count])
                self._computation(f"{label} query", shown[0][row, :, : new[row]], expected[0][row, :, : new[row]])

    def _compare_experts(self, got: Arrays, trace: Trace, step: RoutedStep, new: Array, where: str) -> None:
        node, label = step.node, step.label
        logits, groups = trace.expert_logits[step.index].numpy(), trace.group_logits[step.index].numpy()
        ids, weights = (tensor.numpy() for tensor in chosen(step, trace))
        valid = (np.arange(len(ids) // len(new)) < new[:, None]).reshape(-1)
        layer = sorted(self.model.config.experts.layers)[step.index] if self.model.config.experts else 0
        gate: Any = self.model.model.layers[layer].get_submodule("mlp.gate")
        bias = gate.e_score_correction_bias.numpy() if gate.experts.select_bias else np.zeros(gate.experts.num_experts)
        shown_ids, shown_weights = (got[name] for name in node.selected)
        shown = got[node.operands[0]][valid], got[node.operands[1]][valid]
        reference = expert_choices(logits[valid], groups[valid], bias, ids[valid], node.attributes)
        device = expert_choices(*shown, bias, shown_ids[valid], node.attributes)
        self._computation(f"{label} logits", shown[0], logits[valid])
        loosen(reference[1], reference[0], device[0])
        judge_selection(self.selections.setdefault(label, Selection(label)), reference[1], device[1], where)
        if ids.shape == shown_ids.shape:  # else the selection has failed already
            same = (ids == shown_ids).all(1) & valid
            self._computation(f"{label} weights", shown_weights[same], weights[same])


def _calls(cuts: list[int], total: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each call: the given sizes one after the other, the rest in one."""
    first = 0
    for size in [*cuts, total]:
        last = min(first + size, total)
        if last > first:
            yield first, last
        first = last
