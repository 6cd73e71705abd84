"""End to end: the shipped graph as a device runs it, against PyTorch, on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bilevel.export.decoder import state_tensors
from bilevel.export.judge import Array
from bilevel.export.probe import Arrays, run_session
from bilevel.model import CausalLM
from bilevel.state import DecoderState

KL_LIMIT = 1e-4  # nats a token, mean; fp32 without a differing route stays below 1e-9
TOP1_LIMIT = 0.99


class Device:
    """The shipped graph with its caches, one row. show: further outputs, kept in ``shown`` after each call."""

    def __init__(self, session: Any, model: CausalLM, capacity: int, show: Sequence[str] = ()) -> None:
        self.session, self.show = session, list(show)
        self.shown: Arrays = {}
        self.tensors = state_tensors(model.config)
        sizes = {"batch": 1, "capacity": capacity, "num_blocks": capacity // model.config.routing.block_size}
        self.caches = {
            f"past.{t.name}": np.zeros(
                [sizes[s] if isinstance(s, str) else s for s in t.shape], np.int64 if t.dtype == torch.int64 else np.float32
            )
            for t in self.tensors
        }
        self.past = 0

    def feed(self, ids: Array) -> Array:
        """Logits [vocab] after ``ids`` [L]."""
        lengths = {"past_len": np.array([self.past], np.int32), "new_len": np.array([len(ids)], np.int32)}
        feeds: Arrays = {"input_ids": ids[None].astype(np.int64), **lengths, **self.caches}
        outputs = ["logits", *(f"present.{t.name}" for t in self.tensors), *self.show]
        logits, *rest = run_session(self.session, outputs, feeds)
        self.caches = {f"past.{t.name}": cache for t, cache in zip(self.tensors, rest, strict=False)}
        self.shown = dict(zip(self.show, rest[len(self.tensors) :], strict=True))
        self.past += len(ids)
        return np.asarray(logits[0])


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def divergence(expected: Array, got: Array) -> Array:
    """KL(expected || got) of every row of logits [rows, vocab], in nats."""
    p, q = _log_softmax(expected), _log_softmax(got)
    return np.asarray(np.maximum((np.exp(p) * (p - q)).sum(-1), 0))


def teacher_forced(session: Any, model: CausalLM, ids: Array, prompt: int) -> dict[str, Any]:
    """Prefill ``prompt`` tokens, then feed the rest one by one; compare every step's distribution with PyTorch's."""
    size = model.config.routing.block_size
    device = Device(session, model, -(-len(ids) // size) * size)
    got = np.stack([device.feed(ids[:prompt]), *(device.feed(ids[i : i + 1]) for i in range(prompt, len(ids)))])
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None].astype(np.int64)))[0, prompt - 1 :].numpy()
    kl = divergence(expected, got)
    top1 = float((expected.argmax(-1) == got.argmax(-1)).mean())
    return {
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": top1,
        "passed": bool(kl.mean() <= KL_LIMIT and top1 >= TOP1_LIMIT),
    }


def greedy(session: Any, model: CausalLM, prompt: Array, count: int) -> dict[str, Any]:
    """Generate ``count`` tokens greedily on both sides. A first difference passes only at a near-tie of PyTorch's logits."""
    size = model.config.routing.block_size
    capacity = -(-(len(prompt) + count) // size) * size
    device, state = Device(session, model, capacity), DecoderState.empty(model.config, 1, capacity)
    ids, past, agreed = prompt, 0, 0
    for _ in range(count):
        past_len, new_len = (torch.tensor([n], dtype=torch.int32) for n in (past, len(ids)))
        with torch.no_grad():
            logits, state = model.step(torch.from_numpy(ids[None].astype(np.int64)), past_len, new_len, state)
        got, expected = device.feed(ids), logits[0].numpy()
        past += len(ids)
        if got.argmax() != expected.argmax():
            best = np.sort(expected)[-2:]
            gap = float(best[1] - best[0])
            passed = gap <= 1e-4 * float(np.abs(expected).max())
            return {"tokens": count, "agreed": agreed, "gap_at_difference": gap, "passed": passed}
        agreed += 1
        ids = np.array([expected.argmax()])
    return {"tokens": count, "agreed": agreed, "passed": True}


def chunking(session: Any, model: CausalLM, ids: Array, cuts: tuple[int, ...], limit: float) -> dict[str, Any]:
    """Decode equals prefill for any cut: the last logits after one call against those after many calls."""
    size = model.config.routing.block_size
    capacity = -(-len(ids) // size) * size
    whole = Device(session, model, capacity).feed(ids)
    device, first, last = Device(session, model, capacity), 0, whole
    for size in [*cuts, len(ids)]:
        if first < len(ids):
            last = device.feed(ids[first : first + size])
            first += size
    error = float(np.abs(last - whole).max()) / (float(np.abs(whole).max()) or 1.0)
    return {"tokens": len(ids), "error": error, "limit": limit, "passed": error <= limit}
