"""Bundles in fp16 and bf16: which types a graph has where, what is refused, and what a CPU does with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.contract import BY_NAME
from bilevel.errors import BundleError, CheckpointError, ExportError
from bilevel.export.decoder.bundle import export_bundle
from bilevel.export.graph.emulate import to_numpy
from bilevel.export.graph.precision import PRECISIONS, check_precision
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.cli.main import main
from tests.support.tiny_models import save_checkpoint

Exported = Callable[..., tuple[Path, Path]]
LOWER = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {name: getattr(torch, PRECISIONS[name]) for name in LOWER}


@pytest.fixture(params=LOWER)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bundle(exported: Exported, precision: str) -> Path:
    """A two_level model with experts in that precision."""
    return exported("two_level", precision=precision)[1]


def graph_of(bundle: Path) -> onnx.GraphProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False).graph


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types by name, those of graphs inside nodes too."""
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values} | {
        w.name: w.data_type for w in graph.initializer
    }
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        types |= types_of(attribute.g)
    return types


# What is refused


@pytest.mark.parametrize(
    ("precision", "weights", "message"),
    [
        ("fp8", "fp32", "precision='fp8' is no float type of a bundle; use one of fp32, fp16, bf16"),
        ("fp16", "int8", "--weights int8 and --precision fp16 exclude each other, because .*; leave one of them out"),
        ("bf16", "int4", "--weights int4 and --precision bf16 exclude each other"),
    ],
)
def test_check_precision(tmp_path: Path, precision: str, weights: str, message: str) -> None:
    """By the function, and by the command and the exporter before they look at anything else."""
    with pytest.raises(ExportError, match=message):
        check_precision(precision, weights)
    with pytest.raises(ExportError, match=message):
        export_bundle(tmp_path / "nowhere", tmp_path / "new", precision=precision, weights=weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("precision", "weights"), [("fp32", "int8"), ("fp32", "int4"), *((name, "fp32") for name in PRECISIONS)]
)
def test_check_precision_passes(precision: str, weights: str) -> None:
    check_precision(precision, weights)


def test_export_command_refuses_both_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--precision", "bf16", "--weights", "int8"]
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "new"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bilevel: error: --weights int8 and --precision bf16 exclude each other") and error.count("\n") == 1


def test_weight_that_overflows_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp16 only; what had the bundle's name before stays."""
    checkpoint, kept = save_checkpoint(tmp_path / "checkpoint", "moba"), tmp_path / "bundle"
    kept.mkdir()
    (kept / "bundle.json").write_text("an earlier one", encoding="utf-8")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 70000.0
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(checkpoint), str(kept), "--precision", "fp16", "--force"]) == 2
    message = "model.layers.1.mlp.up_proj.weight holds values too large for float16; load or export the model in float32"
    assert message in capsys.readouterr().err
    assert [path.name for path in kept.iterdir()] == ["bundle.json"]
    load_model(checkpoint, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="too large for float16"):
        load_model(checkpoint, dtype=torch.float16)


# What a bundle holds


def test_manifest(exported: Exported, precision: str) -> None:
    folder = exported("two_level", precision=precision)[1]
    bundle = load_bundle(folder)
    assert bundle.precision == PRECISIONS[precision] and bundle.weights == {"format": "fp32"}
    assert {spec.name: spec.dtype for spec, _ in bundle.graph.state if spec.dtype != bundle.precision} == {
        "past.token_ids": "int64"
    }
    assert next(spec for spec in bundle.graph.outputs if spec.name == "logits").dtype == "float32"
    whole = load_bundle(exported("two_level")[1])
    tokens = 8 * 96
    assert bundle.state_bytes(1, 96) - tokens == (whole.state_bytes(1, 96) - tokens) // 2
    assert (bundle.twin is not None) == ("dense.onnx" in bundle.files) == (precision == "fp16")
    if precision == "bf16":
        with pytest.raises(BundleError, match="has no dense twin"):
            bundle.dense_twin()


def test_operators_of_the_contract_have_its_types(bundle: Path, precision: str) -> None:
    """T is the lower type; what the contract declares float32 is: expert gates' logits, biases, weights."""
    graph, seen = graph_of(bundle), set()
    types = types_of(graph)
    expected = {"T": LOWER[precision], "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
    for node in (node for node in graph.node if node.domain == "bilevel"):
        op = BY_NAME[node.op_type]
        seen.add(op.name)
        for port, name in zip((*op.inputs, *op.outputs), (*node.input, *node.output), strict=True):
            assert types[name] == expected[port.dtype], f"{op.name}.{port.name}"
    assert seen == {"CoarseRoute", "FineRoute", "RoutedAttention", "ExpertRoute", "RoutedExperts"}  # the others: elsewhere


def test_activations_are_of_the_lower_type(bundle: Path, precision: str) -> None:
    """Projections, norms, caches and sums; rotations, router embeddings and means of blocks are computed in fp32."""
    graph = graph_of(bundle)
    types = types_of(graph)
    found: dict[str, set[int]] = {}
    for node in graph.node:
        floats = {types[name] for name in node.output if types[name] in (TensorProto.FLOAT, LOWER[precision])}
        found.setdefault(node.op_type, set()).update(floats)
    assert all(found[name] == {LOWER[precision]} for name in ("MatMul", "RMSNormalization", "ScatterND", "Add", "Sigmoid"))
    assert all(found[name] == {TensorProto.FLOAT} for name in ("RotaryEmbedding", "ReduceMean", "ReduceL2", "Cos", "Sin"))


def test_weights_are_pytorchs(exported: Exported, precision: str) -> None:
    """Bit for bit those of the model loaded in that type; fp32 remain a gate's, which only scores read, and constants."""
    checkpoint, bundle = exported("two_level", precision=precision)
    parameters = {name: to_numpy(p) for name, p in load_model(checkpoint, dtype=DTYPES[precision]).named_parameters()}
    graph = onnx.load(bundle / "model.onnx").graph
    compared = 0
    for weight in graph.initializer:
        name = weight.name.removeprefix("model.")
        if name in parameters:
            assert weight.data_type == LOWER[precision]
            assert np.array_equal(onnx.numpy_helper.to_array(weight), parameters[name])
            compared += 1
    assert compared >= 5
    sizes = {weight.name: int(np.prod(weight.dims)) for weight in graph.initializer if weight.data_type == TensorProto.FLOAT}
    assert sum(sizes.values()) < 0.02 * sum(p.size for p in parameters.values())


def test_strongly_typed(bundle: Path) -> None:
    """Every operator, those of the bodies included, has operands of exactly ONNX's types: no engine need convert."""
    model = onnx.load(bundle / "model.onnx")
    inlined = onnx.inliner.inline_local_functions(model)
    assert not any(node.domain == "bilevel" for node in inlined.graph.node)
    onnx.shape_inference.infer_shapes(inlined, check_type=True, strict_mode=True)
    onnx.checker.check_model(inlined, full_check=True)
    # The check notices: an fp32 operand beside a lower one.
    add = next(node for node in inlined.graph.node if node.op_type == "Add" and node.name.startswith("node_add"))
    cast = onnx.helper.make_node("Cast", [add.input[0]], ["widened"], to=TensorProto.FLOAT)
    add.input[0] = "widened"
    inlined.graph.node.insert(list(inlined.graph.node).index(add), cast)
    with pytest.raises(onnx.shape_inference.InferenceError, match="has inconsistent type"):
        onnx.shape_inference.infer_shapes(inlined, check_type=True, strict_mode=True)


def summands(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """What is multiplied, summed or put through a softmax in a body."""
    for node in nodes:
        if node.op_type in ("MatMul", "ReduceSum", "Softmax"):
            yield from node.input[: 2 if node.op_type == "MatMul" else 1]
        for attribute in node.attribute:
            yield from summands(attribute.g.node)


@pytest.mark.parametrize("name", ["CoarseRoute", "FineRoute", "RoutedAttention", "ExpertRoute"])
def test_bodies_accumulate_in_fp32(bundle: Path, name: str) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    types = types_of(model.graph)
    (function,) = (f for f in model.functions if f.name == name)
    call = next(node for node in model.graph.node if node.op_type == name)
    kinds = inferred(function, [types[value] for value in call.input])
    assert {kinds[value] for value in summands(function.node)} == {TensorProto.FLOAT}


def inferred(function: onnx.FunctionProto, inputs: list[int]) -> dict[str, int]:
    """Types of the values of a body whose inputs have the types given."""
    values = [onnx.helper.make_tensor_value_info(n, k, None) for n, k in zip(function.input, inputs, strict=True)]
    outputs = [onnx.ValueInfoProto(name=name) for name in function.output]
    graph = onnx.helper.make_graph(list(function.node), "body", values, outputs)
    model = onnx.helper.make_model(graph, opset_imports=list(function.opset_import), ir_version=10)
    return types_of(onnx.shape_inference.infer_shapes(model).graph)


# What a CPU does with it


def test_run_command(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fp16 runs; bf16 is refused with the remedy, a damaged bf16 graph for what it is."""
    assert main(["run", str(exported("two_level", precision="fp16")[1]), "the quick", "--max-tokens", "8"]) == 0
    capsys.readouterr()
    folder = exported("two_level", precision="bf16")[1]
    assert main(["run", str(folder), "the quick"]) == 2
    error = capsys.readouterr().err
    assert f"{folder} is in bfloat16, for which onnxruntime " in error and error.count("\n") == 1
    assert error.endswith("lacks kernels on a CPU; to run on a CPU, export with --precision fp16 or fp32\n")
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:5000])
    with pytest.raises(BundleError, match="cannot be opened by ONNX Runtime"):
        OnnxSession(load_bundle(damaged, verify=False))


def test_fp16_bundle_equals_pytorch(exported: Exported) -> None:
    """Through the runtime, rows of different lengths: at most twice as far from fp64 as PyTorch in fp16 is."""
    checkpoint, folder = exported("two_level", precision="fp16")
    model = load_model(checkpoint, dtype=torch.float16)
    session = OnnxSession.open(folder, threads=1)
    ids, lengths = torch.randint(0, model.config.vocab_size, (2, 12)), [12, 7]  # so few keep every block: no route can differ
    with torch.no_grad():
        plain = torch.stack([model(ids[b : b + 1, :n])[0, -1] for b, n in enumerate(lengths)]).double().numpy()
        exact = torch.stack([model.double()(ids[b : b + 1, :n])[0, -1] for b, n in enumerate(lengths)]).numpy()
    caches = session.allocate(2, 16)
    caches.run(ids[:, :7].numpy(), np.zeros(2, np.int32), np.full(2, 7, np.int32) - [0, 1])
    logits = caches.run(ids[:, 6:12].numpy(), np.array([6, 6], np.int32), np.array([6, 1], np.int32))
    assert caches.state["past.key.0"].dtype == np.float16
    assert 0 < np.linalg.norm(logits - exact) < 2 * np.linalg.norm(plain - exact) < 0.1 * np.linalg.norm(exact)
