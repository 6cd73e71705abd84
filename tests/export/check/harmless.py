"""Harmless changes: what another exporter, optimiser, kernel or machine may rightly do otherwise. ``bilevel check`` must pass
them.

Each is made alone in a copy of a tiny model's bundle. What moves a choice moves it at an exact tie or inside the derived
tolerance.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from onnxscript import optimizer

from bilevel.export.graph.bodies import attention, routes
from bilevel.export.graph.functions import attach_functions
from tests.doubles.bundle import edit_manifest
from tests.export.check.both_sides import zero_query
from tests.export.check.faults import ATTENTION, EXPERT_ROUTE, EXPERTS, GATED, KEY, LEVEL_1, LEVEL_2, QUERY, pooling
from tests.export.check.inserts import (
    few_ulp,
    half_ulp_of_fp16,
    identity,
    later_a_little_longer,
    mean_as_sum,
    once,
    rms_norm,
    rotation,
    sigmoid,
    split_product,
    transposed,
    turned_twice,
)
from tests.export.check.surgery import (
    Edit,
    Kernel,
    Name,
    after,
    all_of,
    before,
    body,
    change_weight,
    feeding,
    nth,
    read,
    replace_by,
    update_hashes,
    using,
    writer,
)


class Harmless(NamedTuple):
    """What is changed: the graph (edit), with weights or not; anything in the folders (files); the library (kernel); the
    surroundings of the check (around).

    arguments: further ones of ``check_bundle``. periodic: on a text whose blocks are all equal. excused: the router whose
    choice must differ, and be excused.
    """

    edit: Edit | None = None
    weights: bool = False
    files: Callable[[Path, Path], None] | None = None
    kernel: Kernel | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    arguments: Mapping[str, Any] = MappingProxyType({})
    model: str = "two_level"
    precision: str = "fp32"
    periodic: bool = False
    excused: str = ""


PROJECTION = feeding(feeding(feeding(feeding(feeding(QUERY[1], 0), 0), 0), 0), 0)
OUTPUT_PROJECTION = using(using(using(ATTENTION[1])))
GATE, UP, DOWN = feeding(nth("Sigmoid", 0), 0), feeding(GATED, 1), using(GATED)


def permuted(name: Name, axis: int, order: list[int]) -> Edit:
    return change_weight(name, lambda values: values.take(order, axis))


def in_another_order(model: onnx.ModelProto) -> None:
    """The nodes in another topological order; nodes and inner values under other names. Hidden states keep theirs."""
    graph, rng = model.graph, random.Random(0)
    given = {v.name for v in [*graph.input, *graph.initializer]}
    public = given | {v.name for v in graph.output}
    inner = [name for node in graph.node for name in node.output if name not in public and not name.startswith("hidden.")]
    names = {name: f"v{number}" for number, name in enumerate(rng.sample(inner, len(inner)))}
    waiting, ready, ordered = list(graph.node), {*given, ""}, []
    while waiting:
        node = rng.choice([node for node in waiting if ready.issuperset(node.input)])
        waiting.remove(node)
        ready.update(node.output)
        ordered.append(node)
    for number, node in enumerate(ordered):
        node.name = f"n{number}"
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copied)


def constants_as_nodes(model: onnx.ModelProto) -> None:
    """Small initializers become Constant nodes."""
    small = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    for tensor in small:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    constants_as_nodes(model)
    return optimizer.optimize(model, inline=False)


def weights_elsewhere(checkpoint: Path, bundle: Path) -> None:
    onnx.save_model(onnx.load(bundle / "model.onnx"), bundle / "model.onnx", save_as_external_data=True, location="weights.bin")
    edit_manifest(bundle, lambda manifest: manifest["files"].update({"weights.bin": {}}))
    update_hashes(bundle)


def periodic_text(bundle: Path) -> Path:
    """Every block holds the same four tokens: level 1's scores tie exactly, all of them."""
    path = bundle.parent / "periodic.txt"
    path.write_text("0123" * 40, encoding="utf-8")
    return path


def unoptimised() -> AbstractContextManager[Any]:
    """ONNX Runtime's graph optimisations off."""
    original = ort.SessionOptions

    def options() -> ort.SessionOptions:
        wanted = original()
        wanted.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return wanted

    return patch.object(ort, "SessionOptions", options)


def baseline() -> AbstractContextManager[Any]:
    return patch.dict(os.environ, BILEVEL_CPU_ISA="baseline")


HARMLESS = {
    "ties: level 1's go to later blocks": Harmless(before(LEVEL_1, 1, later_a_little_longer), periodic=True, excused="level 1"),
    "ties: all of level 2's go to later blocks": Harmless(
        body("FineRoute", routes, ("allowed, scores, lowest)", "allowed, scores + op.Cast(choices, to=1) * 1e-30, lowest)")),
        files=zero_query,
        excused="layer 1 level 2",
    ),
    "ties: the kernels' go to later blocks": Harmless(
        kernel=Kernel(
            "route.h",
            (
                ("| (0xffffffffu - static_cast<uint32_t>(block))", "| static_cast<uint32_t>(block)"),
                ("static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank))", "static_cast<int32_t>(rank)"),
            ),
        ),
        periodic=True,
        excused="level 1",
    ),
    "noise: few units in the last place of queries and block keys": Harmless(
        all_of(*(before(router, port, few_ulp) for router in (LEVEL_1, *LEVEL_2) for port in range(2)))
    ),
    "noise: half a unit in the last place of fp16": Harmless(
        all_of(*(before(router, 1, half_ulp_of_fp16) for router in LEVEL_2), before(ATTENTION[1], 2, half_ulp_of_fp16)),
        precision="fp16",
    ),
    "calls: another cut": Harmless(arguments={"cuts": (1, 2, 3, 14)}),
    "calls: the rows in another order": Harmless(arguments={"row_order": (1, 0)}),
    "sums: the MLP's neurons in another order": Harmless(
        all_of(
            *(permuted(read(find, 1), 1, [*range(19, -1, -1)]) for find in (GATE, UP)),
            permuted(read(DOWN, 1), 0, [*range(19, -1, -1)]),
        ),
        weights=True,
    ),
    "sums: the experts' neurons in another order": Harmless(
        all_of(permuted(read(EXPERTS, 3), 1, [4, 2, 0, 1, 3, 9, 7, 5, 6, 8]), permuted(read(EXPERTS, 4), 2, [4, 2, 0, 1, 3])),
        weights=True,
    ),
    "sums: one product as two": Harmless(
        replace_by(OUTPUT_PROJECTION, split_product, read(OUTPUT_PROJECTION, 0), read(OUTPUT_PROJECTION, 1))
    ),
    "sums: attention in tiles of 8 rows": Harmless(
        body("RoutedAttention", attention, ("tile = op.Constant(value_ints=[16])", "tile = op.Constant(value_ints=[8])"))
    ),
    "sums: every call of attention by tiles": Harmless(
        body("RoutedAttention", attention, ("if op.Squeeze(length) <= 8:", "if op.Squeeze(length) <= 0:"))
    ),
    "sums: a block's mean as its sum times a quarter": Harmless(
        all_of(*(replace_by(pooling(layer), mean_as_sum, read(pooling(layer), 0)) for layer in range(2)))
    ),
    "kernels: every call by tiles": Harmless(kernel=Kernel("attention.h", (("kDirectTokens = 4;", "kDirectTokens = 0;"),))),
    "kernels: the baseline instruction set": Harmless(around=baseline),
    "graph: a weight stored transposed": Harmless(
        all_of(change_weight(read(DOWN, 1), np.transpose), before(DOWN, 1, transposed)), weights=True
    ),
    "graph: norm, rotation and sigmoid written out": Harmless(
        all_of(
            replace_by(nth("RMSNormalization", 4), rms_norm, *(read(nth("RMSNormalization", 4), port) for port in range(2))),
            replace_by(KEY[1], rotation, *(read(KEY[1], port) for port in range(3))),
            replace_by(nth("Sigmoid", 0), sigmoid, read(nth("Sigmoid", 0), 0)),
        )
    ),
    "graph: times 1, Identity, transposed twice": Harmless(
        all_of(
            before(ATTENTION[0], 0, once),
            before(ATTENTION[1], 2, turned_twice),
            before(EXPERT_ROUTE, 0, identity),
            after(QUERY[1], turned_twice),
            after(writer("present.key.0"), identity),
            before(LEVEL_2[1], 2, identity),
        )
    ),
    "graph: nodes in another order, under other names": Harmless(in_another_order),
    "graph: constants as nodes": Harmless(constants_as_nodes),
    "graph: constants folded": Harmless(folded, weights=True),
    "graph: bodies not folded for the model": Harmless(attach_functions),
    "graph: weights in another file": Harmless(files=weights_elsewhere),
    "runtime: no graph optimisation": Harmless(around=unoptimised),
}
