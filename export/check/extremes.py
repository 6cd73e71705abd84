"""Expert gates at logits that the text at hand need not hold: very negative ones, large ones, ties, infinities, NaN.

A gate over many experts gives most of them a logit far below 0, so that their scores are tiny and still have an order. What a
text shows of that depends on the text; here every gate of the graph is given logits of its own, and its choice and weights are
held against the definition in fp64.
"""

from __future__ import annotations

import numpy as np
import torch

from bilevel.config import Experts
from bilevel.export.check.choices import expert_choices, expert_weights
from bilevel.export.check.graph_parts import GraphParts, RoutedNode
from bilevel.export.check.judge import COMPUTATION_LIMIT, SMALLEST_NORMAL, WRONG, Array, Selection, judge_selection, loosen
from bilevel.export.graph.sessions import open_session, run_session
from bilevel.export.report.judgements import Invariant
from bilevel.operators.experts import expert_route

NAME = "experts at extreme logits"
_ROWS = 8  # of each span
_SPANS = ((-4, 4), (-12, -10), (-20, -19), (-40, -30), (-86, -70), (-100, 100), (-1e4, 1e4), (15, 25), (80, 100), (-110, -105))
_EPSILON = 1e-20  # of the normalising sum: what a score below the smallest normal number may be multiplied by


def expert_extremes(parts: GraphParts, experts: Experts) -> Invariant | None:
    """The law that every ExpertRoute of the graph keeps to its definition there; None where it has none."""
    gates = {tuple(sorted(node.attributes.items())): node for node in parts.nodes if node.op_type == "ExpertRoute"}
    if not gates:
        return None
    rows = 0
    for node in gates.values():
        calls = _calls(experts.num_experts, experts.num_groups(node.layer in experts.hash_layers))
        rows = sum(len(call["logits"]) for call in calls.values())
        for execution, library in parts.executions.items():
            session = open_session(parts.path, parts.alone(node), library)
            for name, call in calls.items():
                ids, weights = run_session(session, None, call)
                wrong = _wrong(call, ids, weights, node)
                if wrong:
                    return Invariant(NAME, False, f"{name} (layer {node.layer} ExpertRoute, {execution}): {wrong}")
    return Invariant(NAME, True, f"{rows} rows with logits of -1e4 to 1e4, ties, infinities, NaN: all as defined")


def _calls(num_experts: int, num_groups: int) -> dict[str, dict[str, Array]]:
    """{what is special about it: operands}."""
    random = np.random.default_rng(0)
    spans = {f"logits in {low:g}..{high:g}": random.uniform(low, high, (_ROWS, num_experts)) for low, high in _SPANS}
    spans["equal logits"] = np.repeat([[-200.0], [-20.0], [0.0], [200.0]], num_experts, axis=1)
    special = random.uniform(-20, 20, (_ROWS, num_experts))
    special[random.random(special.shape) < 0.3] = -np.inf
    special[0] = -np.inf
    spans["logits of -inf"] = special
    spans["logits of inf"] = np.where(random.random(special.shape) < 0.2, np.inf, special)
    spans["logits of NaN"] = np.where(random.random(special.shape) < 0.2, np.nan, special)
    bias = random.choice([-0.5, 0.0, 0.25], num_experts)
    calls = {}
    for name, logits in spans.items():
        for suffix, select_bias in (("", np.zeros(num_experts)), (" with biases", bias)):
            operands = (logits, random.uniform(-1, 1, (len(logits), num_groups)), select_bias)
            names = ("logits", "group_logits", "select_bias")
            calls[name + suffix] = {key: value.astype(np.float32) for key, value in zip(names, operands, strict=True)}
    return calls


def _wrong(call: dict[str, Array], ids: Array, weights: Array, node: RoutedNode) -> str:
    """What is wrong with a gate's answer, in words; empty where all is well."""
    operands = call["logits"], call["group_logits"], call["select_bias"]
    meant = expert_route(*map(torch.from_numpy, operands), **node.attributes)[0].numpy()
    if ids.shape != meant.shape or weights.shape != meant.shape:
        return f"{list(ids.shape)} experts and weights, {list(meant.shape)} meant"
    outer, reference = expert_choices(*operands, meant, node.attributes)
    device_outer, device = expert_choices(*operands, ids, node.attributes)
    loosen(reference, outer, device_outer)
    stats = Selection(NAME)
    if (judge_selection(stats, reference, device, "experts").state == WRONG).any():
        return stats.example
    exact = expert_weights(operands[0], ids, node.attributes)
    allowed = COMPUTATION_LIMIT * np.abs(exact) + abs(node.attributes["scale"]) * SMALLEST_NORMAL / _EPSILON
    with np.errstate(invalid="ignore"):  # an infinite score among those that normalise gives NaN on both sides
        right = (np.abs(weights - exact) <= allowed) | (weights == exact) | (np.isnan(weights) & np.isnan(exact))
    rows = np.nonzero(~right.all(1))[0]
    return f"row {rows[0]}: weights {weights[rows[0]].tolist()}, {exact[rows[0]].tolist()} meant" if rows.size else ""
