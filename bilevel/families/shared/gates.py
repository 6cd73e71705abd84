"""Expert gates as ``config.json`` describes them, shared by the families with experts."""

from __future__ import annotations

from typing import Any

from bilevel.config import Experts
from bilevel.errors import ConfigError
from bilevel.families.shared.family import Raw, flag, number, whole


def softmax_gate(
    raw: Raw,
    layers: tuple[int, ...],
    *,
    num_experts: int,
    width: int,
    normalize: bool,
    top_k: str = "num_experts_per_tok",
    **more: Any,
) -> Experts | None:
    """The best experts by softmax over all of them; no groups. None where no layer has experts. top_k: the key that says how
    many a word has. more: what else the gate has."""
    if not num_experts or not layers:
        return None
    return Experts(
        num_experts=num_experts,
        top_k=whole(raw, top_k, 0),
        intermediate_size=width,
        layers=layers,
        score_func="softmax",
        group_score="max",  # one group: nothing to score
        normalize=normalize,
        **more,
    )


def grouped_gate(raw: Raw, num_experts: int, shared: int, **changes: Any) -> Experts | None:
    """DeepSeek-V3's gate: sigmoid scores with a bias that moves the choice, groups kept by their two best experts.

    shared: width of the shared expert, 0 for none. The first ``first_k_dense_replace`` layers have no experts.
    """
    layers = tuple(range(whole(raw, "first_k_dense_replace", 0), whole(raw, "num_hidden_layers", 0)))
    if not num_experts or not layers:
        return None
    groups = whole(raw, "n_group", 1) or 1
    if groups > 1 and num_experts // groups < 2:
        raise ConfigError(f"config.json sets n_group={groups}, which leaves fewer than the two experts that score a group")
    return Experts(
        num_experts=num_experts,
        top_k=whole(raw, "num_experts_per_tok", 0),
        intermediate_size=whole(raw, "moe_intermediate_size", 0),
        layers=layers,
        n_group=groups,
        topk_group=whole(raw, "topk_group", 1) or 1,
        score_func="sigmoid",
        group_score="top2_sum" if groups > 1 else "max",  # one group: nothing to score
        normalize=flag(raw, "norm_topk_prob", True),
        scale=number(raw, "routed_scaling_factor", 1.0),
        select_bias=flag(changes, "select_bias", True),
        shared_intermediate_size=shared,
    )
