"""Selection and computation: PyTorch and the probed graph side by side, call by call, with PyTorch's selections forced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bilevel.export.choices import block_choice, expert_choices
from bilevel.export.decoder import flatten_state, state_tensors
from bilevel.export.judge import Array, Choice, Computation, Selection, judge_selection, loosen
from bilevel.export.probe import Arrays, Probe, ProbedNode
from bilevel.model import CausalLM
from bilevel.state import DecoderState, Trace


class Replay:
    """Runs one batch through both sides and keeps the statistics.

    selections: one per router, in graph order. computations: by name, in the order in which they first appear.
    """

    def __init__(self, model: CausalLM, probe: Probe) -> None:
        self.model, self.probe = model, probe
        self.selections: dict[str, Selection] = {}
        self.computations: dict[str, Computation] = {}

    def run(self, token_ids: Array, lengths: Array, cuts: list[int]) -> None:
        """Feed right-padded rows [B, L] in calls of the given sizes; lengths: valid tokens of each row."""
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
                given = torch.from_numpy(chunk), torch.from_numpy(past), torch.from_numpy(new)
                logits, state = self.model.step(*given, state, trace)
            feeds = {"input_ids": chunk, "past_len": past, "new_len": new, **caches, **self._forced(trace)}
            got = self.probe.run(feeds)
            self._compare(got, trace, past, new, f"tokens {first}..{last - 1}")
            self._computation("logits", got["logits"][new > 0], logits.numpy()[new > 0])
            caches = {f"past.{name}": got[f"present.{name}"] for name in names}
            past = past + new
            # A finished row writes its padding at the front of its own cache, which nobody reads again.
            past = np.where(lengths <= last, 0, past).astype(np.int32)

    def _chosen(self, trace: Trace) -> Iterator[tuple[ProbedNode, str, tuple[torch.Tensor, ...]]]:
        """Each selecting node of the graph with its label and what PyTorch selected there."""
        routes, layer = iter(trace.routes), 0
        experts = iter(zip(trace.expert_ids, trace.expert_weights, strict=True))
        expert_layers = iter(self.model.config.experts.layers if self.model.config.experts else ())
        is_first = trace.candidates is not None
        for node in self.probe.of_type("CoarseRoute", "FineRoute", "ExpertRoute"):
            if node.op_type == "ExpertRoute":
                yield node, f"layer {next(expert_layers)} experts", next(experts)
            elif is_first and trace.candidates is not None:
                is_first = False
                yield node, "level 1", (trace.candidates,)
            else:
                yield node, f"layer {layer} level 2", (next(routes),)
                layer += 1

    def _forced(self, trace: Trace) -> Arrays:
        return {
            name: tensor.numpy()
            for node, _, tensors in self._chosen(trace)
            for name, tensor in zip(node.outputs, tensors, strict=True)
        }

    def _computation(self, name: str, got: Array, expected: Array) -> None:
        self.computations.setdefault(name, Computation(name)).add(got, expected)

    def _compare(self, got: Arrays, trace: Trace, past: Array, new: Array, where: str) -> None:
        layer = expert = 0
        for node, label, tensors in self._chosen(trace):
            if node.op_type == "ExpertRoute":
                self._compare_experts(got, trace, node, label, expert, new, where)
                expert += 1
                continue
            if label == "level 1":
                query, block_key = trace.word_query, trace.word_block_key
            else:
                query, block_key = trace.query[layer], trace.block_key[layer]
                layer += 1
            assert query is not None and block_key is not None
            candidates = trace.candidates.numpy() if node.op_type == "FineRoute" and trace.candidates is not None else None
            reference = query.numpy(), block_key.numpy(), tensors[0].numpy()
            self._compare_blocks(got, node, label, reference, candidates, past, new, where)
        for index, node in enumerate(self.probe.of_type("RoutedAttention")):
            self._computation(f"layer {index} attention", got[node.outputs[0]], trace.attention[index].numpy())
        for index, node in zip(self._expert_layers(), self.probe.of_type("RoutedExperts"), strict=True):
            position = self._expert_layers().index(index)
            self._computation(f"layer {index} expert output", got[node.outputs[0]], trace.expert_out[position].numpy())

    def _expert_layers(self) -> list[int]:
        return sorted(self.model.config.experts.layers) if self.model.config.experts else []

    def _compare_blocks(
        self,
        got: Arrays,
        node: ProbedNode,
        label: str,
        expected: tuple[Array, Array, Array],
        candidates: Array | None,
        past: Array,
        new: Array,
        where: str,
    ) -> None:
        query, block_key, routes = expected
        lengths = past.astype(np.int64), new.astype(np.int64)
        reference = block_choice(query, block_key, routes, candidates, *lengths, node.attributes)
        shown = got[node.operands[0]], got[node.operands[1]], got[node.selected[0]]
        device = block_choice(*shown, candidates, *lengths, node.attributes)
        judge_selection(self.selections.setdefault(label, Selection(label)), reference, device, where)
        # Only complete blocks count: what a cache holds for the others is never read.
        complete = (past + new) // node.attributes["block_size"]
        for row, count in enumerate(complete):
            if new[row]:
                self._computation(f"{label} block keys", shown[1][row, :, :count], block_key[row, :, :count])
                self._computation(f"{label} query", shown[0][row, :, : new[row]], query[row, :, : new[row]])

    def _compare_experts(
        self, got: Arrays, trace: Trace, node: ProbedNode, label: str, index: int, new: Array, where: str
    ) -> None:
        width = trace.expert_ids[index].shape[0] // len(new)
        valid = (np.arange(width) < new[:, None]).reshape(-1)

        gate: Any = self.model.get_submodule(f"model.layers.{self._expert_layers()[index]}.mlp.gate")
        bias = gate.e_score_correction_bias.numpy() if gate.experts.select_bias else np.zeros(gate.experts.num_experts)

        def choices(logits: Array, group_logits: Array, ids: Array) -> tuple[Choice, Choice]:
            return expert_choices(logits[valid], group_logits[valid], bias, ids[valid], node.attributes)

        expected = trace.expert_logits[index], trace.group_logits[index], trace.expert_ids[index]
        reference = choices(*(tensor.numpy() for tensor in expected))
        device = choices(got[node.operands[0]], got[node.operands[1]], got[node.selected[0]])
        loosen(reference[1], reference[0], device[0])
        judge_selection(self.selections.setdefault(label, Selection(label)), reference[1], device[1], where)
        same = (trace.expert_ids[index].numpy() == got[node.selected[0]]).all(1) & valid
        weights = trace.expert_weights[index].numpy()
        self._computation(f"{label} weights", got[node.selected[1]][same], weights[same])
        self._computation(f"{label} logits", got[node.operands[0]][valid], trace.expert_logits[index].numpy()[valid])


def _calls(cuts: list[int], total: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each call: the given sizes one after the other, the rest in one."""
    first = 0
    for size in [*cuts, total]:
        last = min(first + size, total)
        if last > first:
            yield first, last
        first = last
