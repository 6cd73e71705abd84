"""Smaller weights: what is rounded and by how much, what stays, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from bilevel.bundle.format import load_bundle
from bilevel.contract import DOMAIN
from bilevel.errors import BundleError, ExportError
from bilevel.export.check.adapt import load_adapted
from bilevel.export.decoder.bundle import export_bundle
from bilevel.export.graph.blocks import BITS, BLOCK, quantise_matrix
from bilevel.export.graph.quantise import describe, quantise_graph
from bilevel.export.graph.schemas import register_schemas
from bilevel.export.graph.sessions import open_session
from bilevel.runtime.cli.main import main
from tests.doubles.bundle import edit_manifest, write_bundle

Exported = Callable[..., tuple[Path, Path]]
FLOAT = onnx.TensorProto.FLOAT
ROUTED: dict[str, Any] = {"domain": DOMAIN, "plugin_namespace": DOMAIN, "block_size": 4, "causal": 1}
ROUTE = {**ROUTED, "topk": 3, "num_selection_heads": 1, "init_blocks": 1, "local_blocks": 1}
ATTENTION = {**ROUTED, "scale": 0.5}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# One matrix


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("depth", [20, 32, 96, 100])
def test_every_weight_lies_within_half_a_step(depth: int, bits: int) -> None:
    weight = random(depth, 7)
    matrix = quantise_matrix(weight, bits)
    rounded = matrix.dequantise()
    assert rounded.shape == weight.shape and rounded.dtype == np.float32
    step = np.repeat(np.abs(matrix.scales), BLOCK, axis=1)[:, :depth].T
    assert (np.abs(rounded - weight) <= 0.501 * step).all()
    assert np.ptp(weight) / step.max() > 2**bits / 2, "the steps are not wider than the weights need"


@pytest.mark.parametrize("bits", BITS.values())
def test_zero_and_constant_blocks_keep_their_value(bits: int) -> None:
    weight = np.zeros((64, 2), np.float32)
    weight[:, 1] = 3.0
    assert np.allclose(quantise_matrix(weight, bits).dequantise(), weight, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weight_that_is_not_finite(value: float) -> None:
    weight = random(32, 3)
    weight[5, 1] = value
    with pytest.raises(ExportError, match=r"shape \[32, 3\] holds values that are not finite.*--weights fp32"):
        quantise_matrix(weight, 4)


def test_the_quantiser_leaves_the_root_logger_alone() -> None:
    code = (
        "import logging, numpy\nfrom bilevel.export.graph.blocks import quantise_matrix\n"
        "quantise_matrix(numpy.ones((32, 2), numpy.float32), 4)\nprint(logging.root.handlers, logging.root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] 30" and not done.stderr


# One graph


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> Path:
    """A graph x [m, 40] -> logits, with its weights beside it."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["m", 40])],
        [helper.make_tensor_value_info("logits", FLOAT, ["m", None])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=0)
    return path


def op_types(path: Path) -> dict[str, str]:
    """{first output: operator} of every node."""
    return {node.output[0]: node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


PRODUCTS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "MatMul": ([helper.make_node("MatMul", ["x", "w"], ["logits"])], {"w": random(40, 9)}),
    "MatMul of a transpose": (
        [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["logits"])],
        {"w": random(9, 40)},
    ),
    "Gemm": ([helper.make_node("Gemm", ["x", "w"], ["logits"])], {"w": random(40, 9)}),
    "Gemm transposed, with a bias": (
        [helper.make_node("Gemm", ["x", "w", "b"], ["logits"], transB=1)],
        {"w": random(9, 40), "b": random(9, seed=1)},
    ),
    "one weight both ways": (
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Gemm", ["y", "w"], ["z"], transB=1),
            helper.make_node("MatMul", ["z", "w"], ["logits"]),
        ],
        {"w": random(40, 40) / 8},
    ),
}


@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_compute_with_the_rounded_weight(tmp_path: Path, product: str, weights: str) -> None:
    """With fp32 activations exactly, as shipped within the rounding of activations to 8 bits."""
    nodes, constants = PRODUCTS[product]
    path = save(tmp_path / "model.onnx", nodes, constants)
    before = ort.InferenceSession(path)
    x = random(5, 40, seed=2)
    (original,) = before.run(None, {"x": x})
    report = quantise_graph(path, weights)
    assert set(op_types(path).values()) == {"MatMulNBits"} and report["quantised"] == sum(
        n.op_type != "Transpose" for n in nodes
    )
    names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert "w" not in names, "the float weight is gone"
    (shipped,) = ort.InferenceSession(path).run(None, {"x": x})
    adapted = onnx_ir.to_proto(load_adapted(path)).SerializeToString()
    (exact,) = open_session(path, adapted).run(None, {"x": x})
    if product != "one weight both ways":
        weight = constants["w"] if constants["w"].shape[0] == 40 else constants["w"].T
        expected = x @ quantise_matrix(weight, BITS[weights]).dequantise() + constants.get("b", 0)
        assert np.abs(exact - expected).max() <= 1e-5 * np.abs(expected).max()
    scale = np.abs(original).max()
    assert 0 < np.abs(shipped - exact).max() <= 0.03 * scale
    assert np.abs(exact - original).max() <= {"int8": 0.02, "int4": 0.3}[weights] * scale


@pytest.mark.parametrize("table", [None, 8])
def test_a_routers_own_product_stays(tmp_path: Path, table: int | None) -> None:
    """What only a router reads stays fp32. A table that is also the head's weight has the head's codes, or 8 bits."""
    weights = {
        "table": random(50, 40),
        "proj": random(40, 8),
        "value": random(40, 40),
        "ids": np.arange(5),
        "n": np.zeros(1, np.int32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("MatMul", ["e", "proj"], ["q"]),
        helper.make_node("CoarseRoute", ["q", "q", "n", "n"], ["routes"], **ROUTE),
        helper.make_node("MatMul", ["x", "value"], ["v"]),
        helper.make_node("RoutedAttention", ["v", "v", "v", "routes", "n", "n"], ["a"], **ATTENTION),
        helper.make_node("Gemm", ["a", "table"], ["logits"], transB=1),
    ]
    register_schemas()  # as any export does: the checker then holds the nodes to the contract
    path = save(tmp_path / "model.onnx", nodes, weights)
    report = quantise_graph(path, "int4", table=table)
    kinds = op_types(path)
    assert (kinds["q"], kinds["v"], kinds["logits"]) == ("MatMul", "MatMulNBits", "MatMulNBits")
    assert (kinds["e.padded"], kinds["e"]) == ("GatherBlockQuantized", "Slice")
    assert report["quantised"] == 2 and report["table"] == (table or 4)
    assert report["kept_fp32"] == {"router projections": 40 * 8 * 4}
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert (kept["proj"] == weights["proj"]).all() and "table" not in kept
    rows = kept[f"table.rows.int{table or 4}.codes"]
    if table is None:
        assert rows.tobytes() == kept["table.transposed.int4.codes"].tobytes()
    unpacked = run_rows(path, np.arange(50))
    assert np.abs(unpacked - weights["table"]).max() <= (0.15 if table is None else 0.01) * np.abs(weights["table"]).max()


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Gemm", ["x", "w"], ["logits"], alpha=2.0),
        helper.make_node("MatMul", ["x", "c"], ["logits"]),
        helper.make_node("Relu", ["x"], ["logits"]),
    ],
    ids=["Gemm with a factor", "three axes", "no product"],
)
def test_nothing_to_quantise(tmp_path: Path, node: onnx.NodeProto) -> None:
    path = save(tmp_path / "model.onnx", [node], {"w": random(40, 9), "c": random(2, 40, 9)})
    before = path.read_bytes()
    with pytest.raises(ExportError, match="no matrix product with constant weights to store as int8; use --weights fp32"):
        quantise_graph(path, "int8")
    assert path.read_bytes() == before


def test_fp32_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", *PRODUCTS["MatMul"])
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    assert describe(quantise_graph(path, "fp32")) == "fp32"
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before


def test_equal_graphs_give_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = save(tmp_path / name / "model.onnx", *PRODUCTS["Gemm transposed, with a bias"])
        quantise_graph(path, "int4")
        contents.append({file.name: file.read_bytes() for file in sorted(path.parent.iterdir())})
    assert contents[0] == contents[1] and sorted(contents[0]) == ["model.data", "model.onnx"]


def run_rows(path: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the graph's table gives for ``ids``, by ONNX Runtime."""
    model = onnx.load(path)
    kept = [node for node in model.graph.node if node.output[0] in ("e", "e.padded")]
    out = helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, None)
    given = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    weights = [tensor for tensor in model.graph.initializer if tensor.name.startswith(("table", "e."))]
    graph = helper.make_graph(kept, "rows", [given], [out], weights)
    opsets = [opset for opset in model.opset_import if opset.domain in ("", "com.microsoft")]
    part = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    (rows,) = ort.InferenceSession(part.SerializeToString()).run(None, {"ids": ids})
    return np.asarray(rows)


# One bundle


@pytest.mark.parametrize("weights", BITS)
def test_export_bundle_with_smaller_weights(exported: Exported, weights: str) -> None:
    folder = exported("two_level", weights)[1]
    bundle, plain = load_bundle(folder), load_bundle(exported("two_level")[1])
    assert bundle.weights["format"] == weights and plain.weights == {"format": "fp32"}
    assert set(bundle.weights["kept_fp32"]) == {"norms and tables", "router projections"}
    assert bundle.weights["table"] == 8, "level 1 compares its rows"
    kinds = list(op_types(folder / "model.onnx").values())
    assert kinds.count("MatMulNBits") == bundle.weights["quantised"] > 0
    # The word router's projection (used twice), an expert gate and its group centroids.
    assert kinds.count("MatMul") + kinds.count("Gemm") == 4
    assert {"CoarseRoute", "FineRoute", "RoutedAttention", "ExpertRoute", "RoutedExpertsQuantized"} <= set(kinds)
    assert "RoutedExperts" not in kinds and bundle.weights["experts"] == 1
    functions = {f.name for f in onnx.load(folder / "model.onnx", load_external_data=False).functions}
    assert set(bundle.graph.operators) == functions
    assert main(["run", str(folder), "hello", "--max-tokens", "3", "--temperature", "0"]) == 0


def test_inspect_shows_the_weights(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported("two_level", "int4")[1]
    assert main(["inspect", str(folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "format int4" in lines and "block 32" in lines and "table 8" in lines
    assert main(["inspect", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == load_bundle(folder).weights


@pytest.mark.parametrize("weights", ["int2", "INT4", ""])
def test_unknown_format_is_refused_before_any_work(exported: Exported, tmp_path: Path, weights: str) -> None:
    stages: list[str] = []
    with pytest.raises(ExportError, match=f"weights='{weights}' is no format of weights; use one of fp32, int8, int4"):
        export_bundle(exported("moba")[0], tmp_path / "new", weights=weights, on_stage=stages.append)
    assert not stages and not list(tmp_path.iterdir())


def test_runtime_reads_bundles_without_and_refuses_unknown_formats(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    assert load_bundle(folder).weights == {"format": "fp32"}
    changes: list[tuple[Any, str]] = [
        ({"format": "int3"}, "weights.format='int3', which must be one of fp32, int8, int4"),
        ({}, "weights.format"),
    ]
    for entry, message in changes:
        edit_manifest(folder, lambda manifest, entry=entry: manifest.update(weights=entry))
        with pytest.raises(BundleError, match=message):
            load_bundle(folder)
