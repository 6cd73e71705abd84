"""One model that takes exams: texts in, and of every token that is scored how likely it was and whether it was the best.

A caches' row is taken back by reading on from an earlier token: what lies behind is written anew before anybody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle
from bilevel.errors import RequestError
from bilevel.runtime.backend.session import Caches, Routes, Session


@dataclass(frozen=True)
class Reading:
    """What the routes of one scored token held. share: tokens read, of those that there were, mean over layers and heads.

    free: whether the evidence lies in blocks that could be chosen or not: complete, not always kept, and more than the budget.
    candidates: share of the evidence's blocks among level 1's, None without a level 1. layers: {layer: share of the evidence's
    blocks that were read, mean over heads}; any_head: the same, read by at least one head.
    """

    tokens: float
    context: int
    free: bool
    candidates: float | None = None
    layers: dict[int, float] = field(default_factory=dict)
    any_head: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenScore:
    """nats: the negative logarithm of the token's probability. best: whether greedy decoding would have taken it."""

    nats: float
    best: bool
    reading: Reading | None = None


class Reader:
    """One row of an opened bundle. capacity: tokens that it must hold. Raises RequestError where the backend holds fewer."""

    def __init__(self, session: Session, capacity: int) -> None:
        self.session, self.bundle = session, session.bundle
        limits = session.limits
        if limits.capacity is not None and capacity > limits.capacity:
            raise RequestError(f"texts of {capacity} tokens are longer than {limits.builder or 'it'} holds; {limits.remedy}")
        self._longest = max(min(limits.longest_call, self.bundle.prefill_chunk), 1)
        self.caches: Caches = session.allocate(limits.fewest_rows, limits.capacity or self.bundle.round_up(capacity))
        self.past = 0
        self._last_column = 0

    def rewind(self, past: int) -> None:
        """Go back to where ``past`` tokens were read."""
        self.past = past

    def read(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens behind those read so far; logits [vocab] of what follows the last. ids: at least one."""
        logits: NDArray[np.float32] = np.zeros(0, np.float32)
        done = 0
        while done < len(ids):
            count = min(self._room(), len(ids) - done)
            logits = self._call(ids[done : done + count])
            done += count
        return logits

    def _room(self) -> int:
        """Most tokens of the next call."""
        return self._longest

    def _call(self, ids: Sequence[int]) -> NDArray[np.float32]:
        rows = self.caches.batch
        tokens = np.zeros((rows, len(ids)), np.int64)
        past_len, new_len = np.zeros((2, rows), np.int32)
        tokens[0], past_len[0], new_len[0] = ids, self.past, len(ids)
        logits = self.caches.run(tokens, past_len, new_len)[0]
        self.past += len(ids)
        self._last_column = len(ids) - 1
        return np.asarray(logits if isinstance(logits, np.ndarray) else logits.fetch(), np.float32)

    def score(self, suffix: Sequence[int], answer: Sequence[int], evidence: tuple[int, int] | None = None) -> list[TokenScore]:
        """Read ``suffix``, then score every token of ``answer`` given those before it. suffix: at least one token.

        The last one is scored, not read. Greedy decoding gives exactly ``answer`` where each token is the best one.
        evidence: where given, each score says what the routes held.
        """
        logits, scores = self.read(suffix), []
        for index, token in enumerate(answer):
            nats, best = surprise(logits, token)
            scores.append(TokenScore(nats, best, self._reading(evidence) if evidence is not None else None))
            if index + 1 < len(answer):
                logits = self.read([token])
        return scores

    def _reading(self, evidence: tuple[int, int]) -> Reading | None:
        routes = self.caches.routes
        if routes is None or self.bundle.graph.routes is None:
            return None
        return look_at_routes(self.bundle, routes, self._last_column, self.past, evidence)


def surprise(logits: NDArray[np.float32], token: int) -> tuple[float, bool]:
    """(negative log-probability of a token in nats, whether it is the best one; of equals the lowest id is).

    Logits that are no numbers give an infinite surprise.
    """
    values = logits.astype(np.float64)
    top = float(values.max())
    if not np.isfinite(top):
        return float("inf"), False
    return top + float(np.log(np.exp(values - top).sum())) - float(values[token]), int(values.argmax()) == token


def routed_layers(bundle: Bundle) -> list[int]:
    """Numbers of the layers whose routes the graph tells, in the order of ``Routes.blocks``."""
    assert bundle.graph.routes is not None
    return [int(name.rpartition(".")[2]) for name in bundle.graph.routes.blocks]


def look_at_routes(bundle: Bundle, routes: Routes, column: int, context: int, evidence: tuple[int, int]) -> Reading:
    """What row 0 read at ``column`` of a call, behind which ``context`` tokens lie in the caches."""
    routing: Any = bundle.config["routing"]
    size, own = bundle.block_size, (context - 1) // bundle.block_size
    blocks = np.asarray(routes.blocks)[:, 0, :, column]  # [layers, Hs, K]
    layers = routed_layers(bundle)
    tokens = np.where(blocks >= 0, np.minimum(size, context - blocks * size), 0).sum(-1)  # [layers, Hs]
    dense = int(bundle.config["num_hidden_layers"]) - len(layers)
    mean = (float(tokens.mean(1).sum()) + dense * context) / (len(layers) + dense)
    kept = set(range(int(routing["init_blocks"]))) | {own - index for index in range(max(int(routing["local_blocks"]), 1))}
    wanted = set(range(evidence[0] // size, (evidence[1] - 1) // size + 1)) if evidence[1] else set()
    if not wanted or wanted & kept or own + 1 <= int(routing["topk"]):
        return Reading(mean, context, False)
    held = np.stack([(blocks == block).any(-1) for block in sorted(wanted)], -1)  # [layers, Hs, wanted]
    candidates = None
    if routes.candidates is not None:
        chosen = set(np.asarray(routes.candidates)[0, :, column].ravel().tolist())
        candidates = len(wanted & chosen) / len(wanted)
    return Reading(
        mean,
        context,
        True,
        candidates,
        dict(zip(layers, held.mean((1, 2)).tolist(), strict=True)),
        dict(zip(layers, held.any(1).mean(1).tolist(), strict=True)),
    )
