"""``bilevel check`` finds planted faults and names the right router or layer, excuses only what rounding explains, and records.

A fault is planted by surgery on a copy of an exported graph; the hash in bundle.json is updated, so that the check runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from bilevel.export.bundle import describe_file
from bilevel.export.check import check_bundle
from bilevel.export.functions import attach_functions
from bilevel.plugins.errors import BundleError, RequestError
from tests.fake_bundle import edit_manifest

TOKENS = 40  # whole blocks of 4 and of 5 tokens
Pair = tuple[Path, Path]
Exported = Callable[[str], Pair]
Graph = onnx.GraphProto


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Callable[[str], Pair]:
    """preset -> (checkpoint, bundle), free to be changed."""

    def copy(preset: str) -> Pair:
        pair = exported(preset)
        targets = tuple(tmp_path / path.name for path in pair)
        for source, target in zip(pair, targets, strict=True):
            shutil.copytree(source, target)
        return targets[0], targets[1]

    return copy


def update_hashes(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: m.update(files={name: describe_file(bundle / name) for name in m["files"]}))


def edit_model(bundle: Path, edit: Callable[[onnx.ModelProto], onnx.ModelProto | None], weights: bool = False) -> None:
    """Change model.onnx (and with ``weights`` model.data) and the hashes."""
    path = bundle / "model.onnx"
    model = onnx.load(path, load_external_data=weights)
    model = edit(model) or model
    del model.graph.value_info[:]  # annotations of what was there before
    if weights:
        (bundle / "model.data").unlink()
        onnx.save_model(model, path, save_as_external_data=True, location="model.data")
    else:
        onnx.save_model(model, path)
    update_hashes(bundle)


def nth(graph: Graph, op_type: str, index: int) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type == op_type][index]


def set_attribute(op_type: str, index: int, name: str, value: Any) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def edit(model: onnx.ModelProto) -> onnx.ModelProto:
        node = nth(model.graph, op_type, index)
        (attribute,) = (a for a in node.attribute if a.name == name)
        attribute.CopyFrom(helper.make_attribute(name, value))
        return attach_functions(model)  # bodies that read the attributes of their node

    return edit


def constant(graph: Graph, name: str, value: Any) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def insert(op_type: str, index: int, port: int, make: Callable[[Graph, str, str], list[onnx.NodeProto]]) -> Any:
    """Put nodes in front of one input of one routed node; ``make(graph, old, new)`` writes them."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        node = nth(graph, op_type, index)
        old = node.input[port]
        nodes = make(graph, old, "planted")
        node.input[port] = "planted"
        place = list(graph.node).index(node)
        for offset, new in enumerate(nodes):
            graph.node.insert(place + offset, new)

    return edit


def take(axis: int, order: list[int]) -> Callable[[Graph, str, str], list[onnx.NodeProto]]:
    """The tensor with the entries of one axis in another order."""

    def make(graph: Graph, old: str, new: str) -> list[onnx.NodeProto]:
        return [helper.make_node("Gather", [old, constant(graph, "planted_order", np.array(order))], [new], axis=axis)]

    return make


def roll_blocks(graph: Graph, old: str, new: str) -> list[onnx.NodeProto]:
    """Every block reads the key of the block before it."""
    pads = constant(graph, "planted_pads", np.array([0, 0, 1, 0, 0, 0, -1, 0]))
    return [helper.make_node("Pad", [old, pads], [new])]


def scale_blocks(step: float) -> Callable[[Graph, str, str], list[onnx.NodeProto]]:
    """The key of block j times 1 + step * (j + 1)."""

    def make(graph: Graph, old: str, new: str) -> list[onnx.NodeProto]:
        zero, one = constant(graph, "planted_zero", np.float32(0)), constant(graph, "planted_one", np.float32(1))
        axis, factor = constant(graph, "planted_axis", np.int64(2)), constant(graph, "planted_step", np.float32(step))
        return [
            helper.make_node("Mul", [old, zero], ["planted_zeros"]),
            helper.make_node("Add", ["planted_zeros", one], ["planted_ones"]),
            helper.make_node("CumSum", ["planted_ones", axis], ["planted_number"]),
            helper.make_node("Mul", ["planted_number", factor], ["planted_growth"]),
            helper.make_node("Add", ["planted_growth", one], ["planted_factor"]),
            helper.make_node("Mul", [old, "planted_factor"], [new]),
        ]

    return make


def next_expert(graph: Graph, old: str, new: str) -> list[onnx.NodeProto]:
    one, count = constant(graph, "planted_one", np.int32(1)), constant(graph, "planted_count", np.int32(6))
    return [
        helper.make_node("Add", [old, one], ["planted_next"]),
        helper.make_node("Mod", ["planted_next", count], [new]),
    ]


def change_weight(shape: list[int], index: int, column: int) -> Callable[[onnx.ModelProto], None]:
    """A hundredth of the largest more in one entry of the first row of the index-th weight of this shape."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = [t for t in model.graph.initializer if list(t.dims) == shape][index]
        values = numpy_helper.to_array(tensor).copy()
        values[0, column] += 0.01 * np.abs(values).max()
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit


def failing(report: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in [*report["selection"], *report["computation"]] if not entry["passed"]]


# fault -> (how it is planted, the first entry that must fail)
FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "level 1 block_size": (set_attribute("CoarseRoute", 0, "block_size", 5), "level 1"),
    "level 1 topk": (set_attribute("CoarseRoute", 0, "topk", 5), "level 1"),
    "level 1 init_blocks": (set_attribute("CoarseRoute", 0, "init_blocks", 0), "level 1"),
    "level 1 causal": (set_attribute("CoarseRoute", 0, "causal", 0), "level 1"),
    "level 1 key of another block": (insert("CoarseRoute", 0, 1, roll_blocks), "level 1 block keys"),
    "level 2 topk": (set_attribute("FineRoute", 0, "topk", 2), "layer 0 level 2"),
    "level 2 local_blocks": (set_attribute("FineRoute", 1, "local_blocks", 2), "layer 1 level 2"),
    "level 2 num_selection_heads": (set_attribute("FineRoute", 0, "num_selection_heads", 1), "layer 0 level 2"),
    "level 2 key of another block": (insert("FineRoute", 1, 1, roll_blocks), "layer 1 level 2 block keys"),
    "level 2 keys a little longer": (insert("FineRoute", 0, 1, scale_blocks(1e-3)), "layer 0 level 2 block keys"),
    "level 2 query heads swapped": (insert("FineRoute", 0, 0, take(1, [1, 0, 3, 2])), "layer 0 level 2 query"),
    "attention block_size": (set_attribute("RoutedAttention", 1, "block_size", 5), "layer 1 attention"),
    "attention scale": (set_attribute("RoutedAttention", 0, "scale", 0.354), "layer 0 attention"),
    "attention causal": (set_attribute("RoutedAttention", 1, "causal", 0), "layer 1 attention"),
    "attention kv heads swapped": (insert("RoutedAttention", 0, 1, take(1, [1, 0])), "layer 0 attention"),
    "attention value heads swapped": (insert("RoutedAttention", 1, 2, take(1, [1, 0])), "layer 1 attention"),
    "attention routes swapped": (insert("RoutedAttention", 1, 3, take(1, [1, 0])), "layer 1 attention"),
    "experts score_func": (set_attribute("ExpertRoute", 0, "score_func", "softmax"), "layer 1 experts"),
    "experts top_k": (set_attribute("ExpertRoute", 0, "top_k", 1), "layer 1 experts"),
    "experts topk_group": (set_attribute("ExpertRoute", 0, "topk_group", 1), "layer 1 experts"),
    "experts normalize": (set_attribute("ExpertRoute", 0, "normalize", 0), "layer 1 experts weights"),
    "experts scale": (set_attribute("ExpertRoute", 0, "scale", 1.501), "layer 1 experts weights"),
    "experts another id": (insert("RoutedExperts", 0, 1, next_expert), "layer 1 expert output"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_bundle_names_planted_fault(copied: Exported, fault: str) -> None:
    checkpoint, bundle = copied("two_level")
    edit, first = FAULTS[fault]
    edit_model(bundle, edit)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report["passed"]
    assert failing(report)[:1] == [first]


@pytest.mark.parametrize(
    ("shape", "index", "column", "first"),
    [
        ([24, 64], 1, 0, "layer 1 level 2 query"),
        ([24, 64], 0, 32, "layer 0 level 2 block keys"),
        ([293, 24], 0, 0, "level 1 block keys"),
    ],
    ids=["queries of layer 1", "keys of layer 0", "embedding"],
)
def test_check_bundle_names_perturbed_weight(copied: Exported, shape: list[int], index: int, column: int, first: str) -> None:
    checkpoint, bundle = copied("two_level")
    edit_model(bundle, change_weight(shape, index, column), weights=True)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report["passed"]
    assert failing(report)[:1] == [first]


@pytest.mark.parametrize(
    ("op_type", "name", "value", "first"),
    [("CoarseRoute", "local_blocks", 2, "layer 1 level 2"), ("RoutedAttention", "scale", 0.36, "layer 1 attention")],
    ids=["router", "attention"],
)
def test_check_bundle_names_planted_fault_moba(copied: Exported, op_type: str, name: str, value: Any, first: str) -> None:
    checkpoint, bundle = copied("moba")
    edit_model(bundle, set_attribute(op_type, 1, name, value))
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report["passed"] and failing(report)[:1] == [first]


@pytest.mark.parametrize(
    ("op_type", "label", "name", "value"),
    [
        ("CoarseRoute", "level 1", "topk", 4),
        ("FineRoute", "layer 0 level 2", "local_blocks", 2),
        ("RoutedAttention", "layer 0 attention", "scale", 0.354),
        ("ExpertRoute", "layer 1 experts", "group_score", "max"),
    ],
)
def test_check_bundle_names_attribute_that_only_a_plugin_reads(
    copied: Exported, op_type: str, label: str, name: str, value: Any
) -> None:
    """The folded body computes the right thing all the same, so only the node's own words can show the fault."""
    checkpoint, bundle = copied("two_level")

    def edit(model: onnx.ModelProto) -> None:
        (attribute,) = (a for a in nth(model.graph, op_type, 0).attribute if a.name == name)
        attribute.CopyFrom(helper.make_attribute(name, value))

    edit_model(bundle, edit)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report["passed"]
    assert [(entry["name"], entry["attribute"]) for entry in report["attributes"]] == [(label, name)]


# What must pass


def periodic_text(bundle: Path) -> Path:
    """Every block holds the same four tokens: level 1's scores tie exactly, all of them."""
    path = bundle.parent / "periodic.txt"
    path.write_text("0123" * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_check_bundle_passes_and_is_recorded(copied: Exported, preset: str) -> None:
    checkpoint, bundle = copied(preset)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report["passed"] and not failing(report)
    routers = {"two_level": ["level 1", "layer 0 level 2", "layer 1 level 2", "layer 1 experts"], "dense": []}
    names = [entry["name"] for entry in report["selection"]]
    assert names == routers.get(preset, ["layer 0 level 2", "layer 1 level 2"])
    assert all(entry["rows"] and entry["exact_rate"] == 1 for entry in report["selection"])
    assert json.loads(json.dumps(report)) == report
    (verdict,) = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checks"]
    assert verdict["passed"] and verdict["model_sha256"] == describe_file(bundle / "model.onnx")["sha256"]
    assert verdict["checkpoint_sha256"] == describe_file(checkpoint / "model.safetensors")["sha256"]
    assert verdict["data"] == {"source": "random token ids (seed 0)", "tokens": TOKENS}


def test_check_bundle_records_a_failure_after_a_success(copied: Exported) -> None:
    checkpoint, bundle = copied("moba")
    check_bundle(bundle, checkpoint, tokens=TOKENS)
    edit_model(bundle, set_attribute("RoutedAttention", 0, "scale", 0.4))
    check_bundle(bundle, checkpoint, tokens=TOKENS)
    checks = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checks"]
    assert [verdict["passed"] for verdict in checks] == [True, False]
    assert checks[1]["largest_error"] > 1e-3
    assert not list(bundle.glob(".*")), "nothing is left of writing the verdict"


def test_check_bundle_passes_exact_ties(copied: Exported) -> None:
    """Periodic text ties level 1, and a layer whose query is zero ties level 2."""
    checkpoint, bundle = copied("two_level")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"].zero_()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

    def zero_query(model: onnx.ModelProto) -> None:
        tensor = [t for t in model.graph.initializer if list(t.dims) == [24, 64]][1]
        values = numpy_helper.to_array(tensor).copy()
        values[:, :32] = 0  # queries come first
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    edit_model(bundle, zero_query, weights=True)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS, data=periodic_text(bundle))
    assert report["passed"]
    entries = {entry["name"]: entry for entry in report["selection"]}
    assert entries["level 1"]["smallest_margin"] < 1e-6
    assert entries["layer 1 level 2"]["exact_rate"] == 1


@pytest.mark.parametrize(
    ("op_type", "name"), [("CoarseRoute", "level 1"), ("FineRoute", "layer 0 level 2")], ids=["level 1", "level 2"]
)
def test_check_bundle_excuses_ties_resolved_the_other_way(copied: Exported, op_type: str, name: str) -> None:
    """Later blocks' keys are longer by parts of 1e-7: exact ties now go to them."""
    checkpoint, bundle = copied("two_level")
    edit_model(bundle, insert(op_type, 0, 1, scale_blocks(1.2e-7)))
    report = check_bundle(bundle, checkpoint, tokens=TOKENS, data=periodic_text(bundle))
    entries = {entry["name"]: entry for entry in report["selection"]}
    assert not failing(report)
    assert entries[name]["unexcused"] == 0
    if op_type == "CoarseRoute":
        assert entries[name]["excused"] > 0 and entries[name]["exact_rate"] < 1


# What cannot be checked


def test_check_bundle_graph_without_a_routed_node(copied: Exported) -> None:
    """A graph that lost a routed node is refused, not compared in part."""
    checkpoint, bundle = copied("two_level")

    def drop(model: onnx.ModelProto) -> None:
        node = nth(model.graph, "RoutedAttention", 1)
        node.CopyFrom(helper.make_node("Identity", [node.input[0]], list(node.output)))

    edit_model(bundle, drop)
    with pytest.raises(BundleError, match=r"1 RoutedAttention nodes.* has 2; export it again"):
        check_bundle(bundle, checkpoint, tokens=TOKENS)


def test_check_bundle_graph_that_cannot_run(copied: Exported) -> None:
    checkpoint, bundle = copied("two_level")

    def break_shape(model: onnx.ModelProto) -> None:
        insert("RoutedAttention", 0, 1, take(1, [7]))(model)

    edit_model(bundle, break_shape)
    with pytest.raises(BundleError, match="cannot run.*export it again"):
        check_bundle(bundle, checkpoint, tokens=TOKENS)


@pytest.mark.parametrize("tokens", [19, 97], ids=["fewer than a few blocks", "more than the model's positions"])
def test_check_bundle_token_count(exported: Exported, tokens: int) -> None:
    checkpoint, bundle = exported("two_level")
    with pytest.raises(RequestError, match=f"tokens={tokens} must lie between 20 .* and 96"):
        check_bundle(bundle, checkpoint, tokens=tokens)


@pytest.mark.parametrize("tokens", [20, 32, 33, 96])
def test_check_bundle_smallest_and_largest_token_count(copied: Exported, tokens: int) -> None:
    checkpoint, bundle = copied("moba")
    report = check_bundle(bundle, checkpoint, tokens=tokens)
    assert report["passed"] and report["data"]["tokens"] == tokens
    assert report["end_to_end"]["greedy"]["agreed"] == report["end_to_end"]["greedy"]["tokens"]


def test_check_bundle_heldout_text_is_the_default(copied: Exported) -> None:
    checkpoint, bundle = copied("moba")
    (checkpoint / "heldout.txt").write_text("the quick brown fox " * 30, encoding="utf-8")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report["data"]["source"] == str(checkpoint / "heldout.txt") and report["passed"]


def test_check_bundle_verdict_on_a_full_disk(copied: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, bundle = copied("moba")
    before = (bundle / "bundle.json").read_bytes()

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BundleError, match="verdict could not be recorded.*No space left"):
        check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert (bundle / "bundle.json").read_bytes() == before
