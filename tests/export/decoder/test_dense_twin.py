"""The dense twin: ordinary attention with a routed model's weights, and weights that two graphs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.config import ModelConfig, RopeScaling, Routing
from bilevel.errors import BundleError, ExportError
from bilevel.export.check.rounding import round_weights
from bilevel.export.decoder.dense_twin import dense_twin, save_dense_twin
from bilevel.export.graph.shared_weights import ALIGNMENT, DATA_FILE, share_weights
from bilevel.model import CausalLM
from bilevel.runtime.backend.onnx import OnnxSession
from tests.doubles.bundle import edit_manifest, write_bundle

Exported = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("preset", ["two_level", "moba"])
def test_twin_equals_dense_pytorch(exported: Exported, preset: str) -> None:
    """Prefill in several chunks, one of them padded, and decode: PyTorch's logits with the same weights, densely."""
    checkpoint, folder = exported(preset)
    twin = dense_twin(load_model(checkpoint))
    assert twin.config.routing.is_dense
    bundle = load_bundle(folder).dense_twin()
    caches = OnnxSession(bundle).allocate(1, 64)
    ids = torch.randint(0, bundle.vocab_size, (1, 40))
    with torch.no_grad():
        expected = twin(ids)[0].numpy()
    past = 0
    for valid, padding in ((7, 0), (9, 0), (12, 3), (1, 0), (1, 0), (10, 1)):
        call = np.zeros((1, valid + padding), np.int64)
        call[0, :valid] = ids[0, past : past + valid]
        logits = caches.run(call, np.array([past], np.int32), np.array([valid], np.int32))
        past += valid
        np.testing.assert_allclose(logits[0], expected[past - 1], atol=1e-4, rtol=1e-4)
    assert past == 40


def heads_of_sixteen(model_type: str) -> ModelConfig:
    """Heads whose width the operator can turn itself, with scaled frequencies."""
    return ModelConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=30,  # not whole blocks
        model_type=model_type,
        rope_scaling=RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=8),
        routing=Routing(block_size=4, coarse_topk=4, topk=3),
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_operator_rotates_heads_of_sixteen(tmp_path: Path, model_type: str) -> None:
    """Packed (llama) and normalised before (qwen3)."""
    model = CausalLM(heads_of_sixteen(model_type)).eval()
    graph = save_dense_twin(model, tmp_path / "dense.onnx").graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [{a.name: a.i for a in node.attribute}["do_rotary"] for node in nodes] == [1, 1]
    assert not any(node.op_type == "RotaryEmbedding" for node in graph.node)
    session = onnxruntime.InferenceSession(tmp_path / "dense.onnx")
    feeds = {p.name: np.zeros((1, 2, 32, 16), np.float32) for p in session.get_inputs() if p.name.startswith("past.")}
    ids = torch.randint(0, 50, (1, 30))
    with torch.no_grad():
        expected = dense_twin(model)(ids)[0].numpy()
    names = [port.name for port in session.get_outputs()]
    for first, last in ((0, 11), (11, 28), (28, 29), (29, 30)):
        call = {
            "input_ids": ids[:, first:last].numpy(),
            "past_len": np.array([first], np.int32),
            "new_len": np.array([last - first], np.int32),
        }
        results = dict(zip(names, session.run(None, {**call, **feeds}), strict=True))
        np.testing.assert_allclose(results.pop("logits")[0], expected[last - 1], atol=1e-4, rtol=1e-4)
        feeds = {name.replace("present.", "past."): cache for name, cache in results.items()}


def test_operator_does_not_rotate_in_fp16(tmp_path: Path) -> None:
    """Its tables would be fp16, the model's are fp32 in every precision."""
    graph = save_dense_twin(CausalLM(heads_of_sixteen("llama")).half().eval(), tmp_path / "dense.onnx").graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [{a.name: a.i for a in node.attribute}["do_rotary"] for node in nodes] == [0, 0]
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    rotations = [kinds[name] for node in graph.node if node.op_type == "RotaryEmbedding" for name in node.input]
    assert rotations and set(rotations) == {onnx.TensorProto.FLOAT}


def test_twin_in_fp16_equals_dense_pytorch(exported: Exported) -> None:
    """At most twice as far from fp64 as PyTorch in fp16, prefill in chunks and decode; its caches are fp16."""
    checkpoint, folder = exported("two_level", precision="fp16")
    bundle = load_bundle(folder).dense_twin()
    assert {spec.dtype for spec, _ in bundle.graph.state} == {"float16"}
    twin = dense_twin(load_model(checkpoint, dtype=torch.float16))
    ids, ends = torch.randint(0, bundle.vocab_size, (1, 40)), [9, 23, 24, 40]
    last = torch.tensor(ends) - 1
    with torch.no_grad():
        plain = twin(ids)[0, last].double().numpy()
        exact = twin.double()(ids)[0, last].numpy()
    caches, logits = OnnxSession(bundle).allocate(1, 64), []
    for first, end in zip([0, *ends], ends, strict=False):
        call = ids[:, first:end].numpy(), np.array([first], np.int32), np.array([end - first], np.int32)
        logits.append(caches.run(*call)[0].copy())
    assert 0 < np.linalg.norm(np.stack(logits) - exact) < 2 * np.linalg.norm(plain - exact)


def test_twin_of_a_quantised_bundle_has_small_caches(exported: Exported) -> None:
    """Its weights are the routed graph's codes, its caches int8, its logits those of PyTorch's twin over the same rounded
    weights up to the rounding of caches and activations."""
    checkpoint, folder = exported("moba", "int8")
    bundle = load_bundle(folder).dense_twin()
    assert {spec.dtype for spec, _ in bundle.graph.state} == {"int8"}
    kinds = [node.op_type for node in onnx.load(bundle.graph_path, load_external_data=False).graph.node]
    assert "MatMulNBits" in kinds
    ids = torch.randint(0, bundle.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    caches, model = OnnxSession(bundle).allocate(1, 32), load_model(checkpoint)
    round_weights(model, "int8", model.config)
    with torch.no_grad():
        expected = dense_twin(model)(ids)[0].numpy()
    for first, last in ((0, 9), (9, 23), (23, 24)):
        logits = caches.run(ids[:, first:last].numpy(), np.array([first], np.int32), np.array([last - first], np.int32))
        error = np.linalg.norm(logits[0] - expected[last - 1]) / np.linalg.norm(expected[last - 1])
        assert 1e-5 < error < 0.05


def test_twin_decodes_a_batch_and_refuses_to_chunk_one(exported: Exported) -> None:
    checkpoint, folder = exported("moba")
    bundle = load_bundle(folder).dense_twin()
    caches = OnnxSession(bundle).allocate(2, 32)
    ids = torch.randint(0, bundle.vocab_size, (2, 9))
    with torch.no_grad():
        expected = dense_twin(load_model(checkpoint))(ids).numpy()
    lengths = np.zeros(2, np.int32)
    caches.run(ids[:, :8].numpy(), lengths, lengths + 8)
    logits = caches.run(ids[:, 8:].numpy(), lengths + 8, lengths + 1)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-4, rtol=1e-4)
    with pytest.raises(BundleError, match="batch_size must be 1"):
        caches.run(ids[:, :4].numpy(), lengths + 9, lengths + 4)


def test_twin_has_the_same_weights_once(exported: Exported) -> None:
    """Both graphs name the same places of one file, which is hardly larger than the routed graph's own weights."""
    _, folder = exported("moba")
    places = {}
    for name in ("model.onnx", "dense.onnx"):
        graph = onnx.load(folder / name, load_external_data=False).graph
        external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        places[name] = {tuple(sorted((e.key, e.value) for e in t.external_data)) for t in external}
    assert len(places["model.onnx"]) > 5
    assert places["model.onnx"] <= places["dense.onnx"], "the twin has nothing of its own but the table of rotations"
    assert len(places["dense.onnx"] - places["model.onnx"]) <= 2


def test_twin_is_dense(exported: Exported) -> None:
    _, folder = exported("two_level")
    bundle = load_bundle(folder)
    twin = bundle.dense_twin()
    graph = onnx.load(twin.graph_path, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 2
    assert {node.op_type for node in graph.node if node.domain == "bilevel"} == set(twin.graph.operators)
    assert set(twin.graph.operators) == {"ExpertRoute", "RoutedExperts"}
    assert {spec.name for spec, _ in twin.graph.state} == {f"past.{kind}.{i}" for kind in ("key", "value") for i in (0, 1)}
    assert (twin.config, twin.vocab_size, twin.block_size) == (bundle.config, bundle.vocab_size, bundle.block_size)


def test_dense_model_needs_no_twin(exported: Exported) -> None:
    _, folder = exported("dense")
    assert not (folder / "dense.onnx").exists()
    with pytest.raises(BundleError, match="has no dense twin .* make the bundle anew: bilevel export"):
        load_bundle(folder).dense_twin()


def test_bundle_of_before_has_no_twin(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no dense twin"):
        load_bundle(write_bundle(tmp_path)).dense_twin()


def test_manifest_that_lists_no_twin_file_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    edit_manifest(tmp_path, lambda m: m.update(dense_twin={**m["graph"], "file": "dense.onnx", "operators": {}}))
    with pytest.raises(BundleError, match="does not list dense.onnx among its files"):
        load_bundle(tmp_path)


def _save(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    """A graph that returns every weight, with all of them in a data file of its own."""
    outputs = [
        helper.make_tensor_value_info(f"{n}_out", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in arrays.items()
    ]
    nodes = [helper.make_node("Identity", [n], [f"{n}_out"]) for n in arrays]
    graph = helper.make_graph(nodes, "weights", [], outputs, [numpy_helper.from_array(a, n) for n, a in arrays.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    data = Path(name).with_suffix(".data").name
    onnx.save_model(model, folder / name, save_as_external_data=True, location=data, size_threshold=64)


def test_share_weights(tmp_path: Path) -> None:
    """Equal contents are stored once whatever their names and types, on page boundaries, and both graphs read what they had."""
    rng = np.random.default_rng(0)
    common, packed = rng.normal(size=(300, 5)).astype(np.float32), rng.integers(0, 256, (40, 7), np.uint8)
    graphs = {
        "model.onnx": {"a": common, "q": packed, "small": np.ones(2, np.float32)},
        "dense.onnx": {"b": common, "q": packed, "own": rng.normal(size=100), "transposed": np.ascontiguousarray(common.T)},
    }
    for name, arrays in graphs.items():
        _save(tmp_path, name, arrays)
    size = share_weights(tmp_path, list(graphs))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.onnx", DATA_FILE, "model.onnx"]
    assert size == (tmp_path / DATA_FILE).stat().st_size < 2 * common.nbytes + packed.nbytes + 800 + 4 * ALIGNMENT
    offsets = set()
    for name, arrays in graphs.items():
        results = onnxruntime.InferenceSession(tmp_path / name).run(None, {})
        for result, array in zip(results, arrays.values(), strict=True):
            np.testing.assert_array_equal(result, array)
        for tensor in onnx.load(tmp_path / name, load_external_data=False).graph.initializer:
            if onnx.external_data_helper.uses_external_data(tensor):
                offsets.add(onnx.external_data_helper.ExternalDataInfo(tensor).offset)
    assert len(offsets) == 4 and all(offset % ALIGNMENT == 0 for offset in offsets)


def test_share_weights_refuses_a_truncated_file(tmp_path: Path) -> None:
    _save(tmp_path, "model.onnx", {"a": np.zeros((300, 5), np.float32)})
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ExportError, match="model.data ends before the weights"):
        share_weights(tmp_path, ["model.onnx"])


def test_twin_shares_tensors_with_the_model(exported: Exported) -> None:
    """The twin is no second copy in memory, and a tied head stays tied."""
    checkpoint, _ = exported("moba")
    model = load_model(checkpoint)
    twin = dense_twin(model)
    assert twin.config == dataclasses.replace(model.config, routing=twin.config.routing)
    for name, parameter in twin.named_parameters():
        assert parameter.data_ptr() == model.get_parameter(name).data_ptr(), name
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
