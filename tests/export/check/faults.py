"""Faults of exported graphs: what an export can get wrong, and where ``bilevel check`` must say that it starts.

Each is planted alone into a copy of a tiny model's bundle (``tests.support.tiny_models``). Faults of function bodies and of CPU
kernels: ``tests.export.check.faults_bodies``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.export.report.model import Report
from tests.export.check.inserts import (
    every_block,
    key_of_block_before,
    keys_not_rotated,
    longer_with_number,
    next_block,
    next_expert,
    not_pooled_again,
    of_first_row,
    of_next_row,
    one_key_late,
    one_less_later,
    one_position_late,
    one_token_late,
    ordinary_attention,
    previous,
    take,
    times,
    without_last,
    without_tail,
    without_third,
)
from tests.export.check.surgery import (
    Edit,
    Find,
    after,
    before,
    change_weight,
    feeding,
    nth,
    read,
    replace_by,
    replace_node,
    set_attribute,
    swap_outputs,
    swap_reads,
    using,
    writer,
)

TOKENS = 40  # whole blocks of 4 and of 5 tokens
LEVEL_1, EXPERT_ROUTE, EXPERTS = nth("CoarseRoute", 0), nth("ExpertRoute", 0), using(nth("ExpertRoute", 0))
LEVEL_2, ATTENTION = ([nth(name, layer) for layer in range(2)] for name in ("FineRoute", "RoutedAttention"))
QUERY, KEY = ([nth("RotaryEmbedding", 2 * layer + n) for layer in range(2)] for n in range(2))
GATED = using(using(nth("Sigmoid", 0)))  # silu(gate) * up of layer 0, whose MLP is dense


class Fault(NamedTuple):
    """How a fault is planted, the entry of the report that must fail first, and its operator.

    model, tokens: what it takes to show; weights: whether the edit changes weights; prepare: makes another model of checkpoint
    and bundle first.
    """

    plant: Edit
    at: str
    operator: str | None
    model: str = "two_level"
    tokens: int = TOKENS
    weights: bool = False
    prepare: Callable[[Path, Path], None] | None = None


# What is changed


def one_expert_permuted(down: np.ndarray) -> None:
    down[2] = down[2][:, ::-1].copy()


def add_to_first(column: int) -> Any:
    """A hundredth of the largest more in one entry of the first row."""

    def change(values: np.ndarray) -> None:
        values[0, column] += 0.01 * np.abs(values).max()

    return change


def projection(layer: int) -> Any:
    """The weight of a layer's fused queries, keys and values: [24, 64], queries first."""
    return read(feeding(feeding(feeding(feeding(feeding(QUERY[layer], 0), 0), 0), 0), 0), 1)


def pooling(layer: int) -> Find:
    """What averages the blocks that a call touched."""
    return feeding(writer(f"present.block_key.{layer}"), 2)


def written(cache: str) -> tuple[Any, Any]:
    """What the write of a cache reads: the cache as it was, and the indices."""
    return f"past.{cache}", read(writer(f"present.{cache}"), 1)


LEVEL_1_FAULTS = {
    "level 1: another block size": Fault(set_attribute("CoarseRoute", 0, "block_size", 5), "level 1", "CoarseRoute"),
    "level 1: a candidate lost": Fault(set_attribute("CoarseRoute", 0, "topk", 5), "level 1", "CoarseRoute"),
    "level 1: not causal": Fault(set_attribute("CoarseRoute", 0, "causal", 0), "level 1", "CoarseRoute"),
    "level 1: keys of the block before": Fault(before(LEVEL_1, 1, key_of_block_before), "level 1 block keys", "CoarseRoute"),
    "level 1: words not normalised before their mean": Fault(
        replace_node(feeding(nth("ReduceMean", 0), 0), "Identity", [0]), "level 1 block keys", "CoarseRoute"
    ),
    "level 1: stale block key after a chunk": Fault(
        before(writer("present.word_block_key"), 2, not_pooled_again, *written("word_block_key"), "past_len"),
        "level 1 block keys",
        "CoarseRoute",
    ),
    "level 1: the word alone, not its window": Fault(
        before(feeding(nth("GreaterOrEqual", 0), 0), 1, times(0)), "level 1 query", "CoarseRoute"
    ),
    "level 1: words handed to the next call one late": Fault(
        after(writer("present.token_ids"), one_token_late, state_only=True), "level 1 query", "CoarseRoute"
    ),
    "embedding: one number a little off": Fault(
        change_weight(read(nth("Gather", 0), 0), add_to_first(0)), "embedding", "Gather", weights=True
    ),
}

LEVEL_2_FAULTS = {
    "level 2: top-k off by one": Fault(set_attribute("FineRoute", 0, "topk", 2), "layer 0 level 2", "FineRoute"),
    "level 2: one route for both heads": Fault(
        set_attribute("FineRoute", 0, "num_selection_heads", 1), "layer 0 level 2", "FineRoute"
    ),
    "level 2: a candidate lost on the way": Fault(before(LEVEL_2[1], 2, without_third), "layer 1 level 2", "FineRoute"),
    "level 2: query heads swapped": Fault(before(LEVEL_2[0], 0, take([1, 0, 3, 2], 1)), "layer 0 level 2 query", "FineRoute"),
    "level 2: query norm skipped": Fault(
        replace_node(feeding(QUERY[1], 0), "Identity", [0]), "layer 1 level 2 query", "FineRoute"
    ),
    "level 2: positions off by one in later calls": Fault(
        before(feeding(nth("Cos", 0), 0), 0, one_less_later, "past_len"), "layer 0 level 2 query", "FineRoute"
    ),
    "level 2: keys of the block before": Fault(
        before(LEVEL_2[1], 1, key_of_block_before), "layer 1 level 2 block keys", "FineRoute"
    ),
    "level 2: keys a little longer": Fault(
        before(LEVEL_2[0], 1, longer_with_number), "layer 0 level 2 block keys", "FineRoute"
    ),
    "level 2: block keys before RoPE": Fault(
        before(feeding(feeding(pooling(1), 0), 0), 0, keys_not_rotated, *written("key.1"), read(KEY[1], 0)),
        "layer 1 level 2 block keys",
        "FineRoute",
    ),
    "level 2: a block's largest key, not its mean": Fault(
        replace_node(pooling(1), "ReduceMax", [0, 1], keepdims=0), "layer 1 level 2 block keys", "FineRoute"
    ),
    "level 2: blocks begin a token late": Fault(
        before(feeding(feeding(pooling(0), 0), 0), 0, one_key_late), "layer 0 level 2 block keys", "FineRoute"
    ),
    "level 2: stale block key after a chunk": Fault(
        before(writer("present.block_key.1"), 2, not_pooled_again, *written("block_key.1"), "past_len"),
        "layer 1 level 2 block keys",
        "FineRoute",
    ),
}

CACHE_FAULTS = {
    "keys: norm skipped": Fault(replace_node(feeding(KEY[1], 0), "Identity", [0]), "layer 1 keys", None),
    "keys: neighbouring channels rotated": Fault(
        replace_node(KEY[0], "RotaryEmbedding", [0, 1, 2], interleaved=1), "layer 0 keys", None
    ),
    "keys: written a position late": Fault(
        before(writer("present.key.1"), 1, one_position_late), "layer 1 keys", None, tokens=39
    ),
    "keys: the last of each call not handed on": Fault(
        after(writer("present.key.1"), without_last, *written("key.1"), state_only=True), "layer 1 keys", None
    ),
    "keys: two layers' handed on in each other's place": Fault(
        swap_outputs("present.key.0", "present.key.1"), "layer 0 keys", None
    ),
    "values: end of a chunk not written": Fault(
        after(writer("present.value.1"), without_tail, *written("value.1")), "layer 1 values", None
    ),
}

ATTENTION_FAULTS = {
    "attention: key heads swapped": Fault(before(ATTENTION[0], 1, take([1, 0], 1)), "layer 0 attention", "RoutedAttention"),
    "attention: value heads swapped": Fault(before(ATTENTION[1], 2, take([1, 0], 1)), "layer 1 attention", "RoutedAttention"),
    "attention: routes of the other head": Fault(
        before(ATTENTION[1], 3, take([1, 0], 1)), "layer 1 attention", "RoutedAttention"
    ),
    "attention: one head's route for both": Fault(
        before(ATTENTION[0], 3, take([0, 0], 1)), "layer 0 attention", "RoutedAttention"
    ),
    "attention: block index off by one": Fault(before(ATTENTION[1], 3, next_block), "layer 1 attention", "RoutedAttention"),
    "attention: reads every block": Fault(
        before(ATTENTION[1], 3, every_block, read(ATTENTION[1], 1)), "layer 1 attention", "RoutedAttention"
    ),
    "attention: an ordinary one in its place": Fault(
        replace_by(ATTENTION[1], ordinary_attention, *(read(ATTENTION[1], port) for port in (0, 1, 2, 4))),
        "layer 1 attention",
        "RoutedAttention",
    ),
    "attention: the first row's length for all rows": Fault(
        before(ATTENTION[1], 4, of_first_row), "layer 1 attention", "RoutedAttention"
    ),
    "attention: the length of the cache forgotten": Fault(
        before(ATTENTION[1], 4, times(0)), "layer 1 attention", "RoutedAttention"
    ),
}

EXPERT_FAULTS = {
    "experts: top-k off by one": Fault(set_attribute("ExpertRoute", 0, "top_k", 1), "layer 1 experts", "ExpertRoute"),
    "experts: bias forgotten": Fault(before(EXPERT_ROUTE, 2, times(0.0)), "layer 1 experts", "ExpertRoute"),
    "experts: groups in another order": Fault(
        before(EXPERT_ROUTE, 1, take([1, 2, 0], 1)), "layer 1 experts group logits", "ExpertRoute"
    ),
    "experts: logits of the next word": Fault(before(EXPERT_ROUTE, 0, of_next_row), "layer 1 experts logits", "ExpertRoute"),
    "experts: ids shifted": Fault(before(EXPERTS, 1, next_expert), "layer 1 expert output", "RoutedExperts"),
    "experts: another word's line of the table": Fault(
        change_weight("model.model.layers.0.mlp.gate.tid2eid", lambda table: np.roll(table, 1, 0)),
        "layer 0 experts group logits",
        "ExpertRoute",
        model="hashed",
        weights=True,
    ),
    "experts: gate and up swapped": Fault(
        before(EXPERTS, 3, take([5, 6, 7, 8, 9, 0, 1, 2, 3, 4], 1)), "layer 1 expert output", "RoutedExperts"
    ),
    "experts: one expert's weights permuted": Fault(
        change_weight(read(EXPERTS, 4), one_expert_permuted), "layer 1 expert output", "RoutedExperts", weights=True
    ),
}

OTHER_FAULTS = {
    "MLP: gate and up swapped": Fault(
        swap_reads(feeding(nth("Sigmoid", 0), 0), 1, feeding(GATED, 1), 1), "layer 0 output", "Add"
    ),
    "stream: what came before the MLP forgotten": Fault(
        replace_node(using(using(GATED)), "Identity", [1]), "layer 0 output", "Add"
    ),
    "head: norm skipped": Fault(replace_node(nth("RMSNormalization", 8), "Identity", [0]), "logits", None),
    "head: logits of the word before the last": Fault(before(feeding(writer("logits"), 0), 1, previous), "logits", None),
}

GRAPH_FAULTS = LEVEL_1_FAULTS | LEVEL_2_FAULTS | CACHE_FAULTS | ATTENTION_FAULTS | EXPERT_FAULTS | OTHER_FAULTS


def first_failure(report: Report) -> str | None:
    """Where the report says that a failure starts."""
    return None if report.failure is None else report.failure.name
