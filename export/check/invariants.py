"""What must hold of the graph whatever the weights are (design section 9): no reference can excuse a violation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from bilevel.config import ModelConfig, Routing
from bilevel.export.check.end_to_end import divergence
from bilevel.export.check.judge import COMPUTATION_LIMIT, Array, relative_error
from bilevel.export.check.layered import LayeredModel, Text
from bilevel.export.check.shipped import ShippedGraph
from bilevel.export.report.judgements import Invariant


def _close(got: Array, expected: Array, precision: str, kl_limit: float) -> tuple[bool, str]:
    """Whether two sides' logits [vocab] agree: in fp32 to the limit of computations, in a lower precision and over packed
    caches by their distributions, because another order of sums may turn a choice, or a code, over."""
    if precision == "float32":
        error = relative_error(got, expected)
        return error <= COMPUTATION_LIMIT, f"logits differ by {error:.1e} of the largest, {COMPUTATION_LIMIT:.0e} allowed"
    kl = float(divergence(expected[None], got[None])[0])
    return kl <= 10 * kl_limit, f"KL {kl:.1e} nats at the last token, {10 * kl_limit:.1e} allowed"


def any_cut(device: ShippedGraph, ids: Array, precision: str, kl_limit: float) -> Invariant:
    """Decode equals prefill: one call against calls that end inside, at and across block borders."""
    size = device.config.routing.block_size
    whole = device.last_logits(ids, [])
    cuts = (1, size, size + 1, 3, 2 * size, 1, 1)
    passed, detail = _close(device.last_logits(ids, cuts), whole, precision, kl_limit)
    return Invariant(
        "any cut into calls",
        passed,
        f"{len(ids)} tokens in one call and in calls of {', '.join(map(str, cuts))}, ...: {detail}",
    )


def dense_model(model: LayeredModel) -> LayeredModel:
    """The same weights with ordinary attention over every earlier token."""
    config: ModelConfig = model.config
    routing = Routing(preset="dense", block_size=config.routing.block_size)
    return model.with_config(dataclasses.replace(config, routing=routing))


def all_kept(device: ShippedGraph, model: LayeredModel, ids: Array, precision: str, kl_limit: float) -> Invariant | None:
    """Where the routes hold every block, the graph equals ordinary attention in PyTorch. None for a dense model."""
    routing = device.config.routing
    if routing.is_dense:
        return None
    ids = ids[: routing.topk * routing.block_size]
    text = Text.cut(ids[None], np.array([len(ids)]), [], routing.block_size)
    dense = dense_model(model)
    hidden = dense.hidden(text)[0][0, -1:]
    expected = dense.head(hidden)[0].double().numpy()
    passed, detail = _close(device.last_logits(ids, []), expected, precision, kl_limit)
    return Invariant("all blocks kept equals dense", passed, f"{len(ids)} tokens against ordinary attention: {detail}")


def no_future(device: ShippedGraph, ids: Array) -> Invariant | None:
    """A changed later token moves no earlier route. None for a model without routers."""
    half = len(ids) * 2 // 3
    other = ids.copy()
    other[half:] = (other[half:] + 1) % device.config.vocab_size
    routes = []
    for tokens in (ids, other):
        text = Text.cut(tokens[None], np.array([len(ids)]), [], device.config.routing.block_size)
        routes.append({name: calls[0] for name, calls in device.read(text)[1].items()})
    if not routes[0]:
        return None
    moved = {}
    for name, before in routes[0].items():
        after = routes[1][name]
        early = (lambda x: x[..., :half, :]) if before.ndim == 4 else (lambda x: x[:half])
        count = int((early(before) != early(after)).any(-1).sum())
        if count:
            moved[name] = count
    detail = f"{len(ids) - half} of {len(ids)} tokens changed, {sum(moved.values())} earlier choices moved"
    return Invariant(
        "the future moves no earlier route", not moved, detail + (f" (first at {next(iter(moved))})" if moved else "")
    )


def check_invariants(
    device: ShippedGraph,
    model: LayeredModel,
    ids: Array,
    precision: str,
    kl_limit: float,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[Invariant]:
    """Every invariant of the graph on its own; that of order and repetition comes from the replay."""
    on_stage("invariants")
    with torch.no_grad():
        invariants = [
            any_cut(device, ids, precision, kl_limit),
            all_kept(device, model, ids, precision, kl_limit),
            no_future(device, ids),
        ]
    return [invariant for invariant in invariants if invariant is not None]
