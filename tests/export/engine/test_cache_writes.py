"""Caches written in place: an engine's graph gives what the bundle's own gives, by the layer and by the plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from bilevel.bundle.format import Bundle, read_manifest
from bilevel.contract import DOMAIN
from bilevel.errors import EngineError, ExportError
from bilevel.export.engine.cache_writes import check_caches, find_writes, write_in_place
from bilevel.export.engine.versions import Flavour

Exported = Callable[..., tuple[Path, Path]]
CAPACITY = 48


def read(folder: Path) -> tuple[onnx.ModelProto, Bundle]:
    return onnx.load(str(folder / "model.onnx")), read_manifest(folder)


def rewrite(bundle: Path, **options: Any) -> onnx.ModelProto:
    model, manifest = read(bundle)
    sizes = {"capacity": CAPACITY, "num_blocks": CAPACITY // manifest.block_size}
    write_in_place(model, manifest.graph.state, sizes, **options)
    return model


def as_function() -> onnx.FunctionProto:
    """WriteCache for ONNX Runtime, which has no such plugin."""
    nodes = [
        helper.make_node("Cast", ["start"], ["at"], to=TensorProto.INT64),
        helper.make_node("TensorScatter", ["cache", "update", "at"], ["out"], axis=-2),
    ]
    opsets = [helper.make_opsetid("", 24)]
    return helper.make_function(DOMAIN, "WriteCache", ["cache", "update", "start"], ["out"], nodes, opsets)


def run_calls(model: onnx.ModelProto, capacity: int, block_size: int, tokens_are_written: bool) -> list[np.ndarray[Any, Any]]:
    """Logits of a prompt in two pieces and of single tokens, rows of different lengths, as a runtime would call."""
    session = ort.InferenceSession(model.SerializeToString())
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
    sizes = {"batch": 2, "capacity": capacity, "num_blocks": capacity // block_size}
    state = {
        port.name: np.zeros([sizes.get(size, size) for size in port.shape], kinds[port.type])
        for port in session.get_inputs()
        if port.name.startswith("past.")
    }
    names = [port.name for port in session.get_outputs()]
    past, found = np.zeros(2, np.int32), []
    for call, lengths in enumerate([(7, 4), (5, 5), (1, 1), (1, 0), (1, 1), (1, 1)]):
        new = np.array(lengths, np.int32)
        ids = (np.arange(2 * new.max()).reshape(2, -1) * 3 + call) % 7
        if tokens_are_written:
            for row in range(2):
                state["past.token_ids"][row, past[row] : past[row] + ids.shape[1]] = ids[row]
        out = dict(zip(names, session.run(None, {**state, "input_ids": ids, "past_len": past, "new_len": new}), strict=True))
        state = {name: out.get(name.replace("past.", "present."), value) for name, value in state.items()}
        found.append(out["logits"])
        past += new
    return found


@pytest.mark.parametrize(
    "options", [{"by_plugin": False}, {"by_plugin": False, "with_long_updates": True}, {"by_plugin": True}]
)
def test_the_same_logits(options: dict[str, Any], exported: Exported) -> None:
    bundle = exported("two_level")[1]
    original, manifest = read(bundle)
    model = rewrite(bundle, **options)
    written = [node for node in model.graph.node if node.op_type in ("TensorScatter", "WriteCache")]
    assert len(written) == len(manifest.graph.state) - 1 and all(node.op_type != "ScatterND" for node in model.graph.node)
    assert {node.op_type for node in written} == {"WriteCache" if options["by_plugin"] else "TensorScatter"}
    assert "present.token_ids" not in {value.name for value in model.graph.output}
    if options["by_plugin"]:
        assert all(node.domain == DOMAIN for node in written) and model.opset_import[0].version == 23
        model.functions.append(as_function())
        model.opset_import[0].version = 24
    expected = run_calls(original, CAPACITY, manifest.block_size, tokens_are_written=False)
    for got, want in zip(run_calls(model, CAPACITY, manifest.block_size, tokens_are_written=True), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["moba", "dense"])
def test_other_presets(preset: str, exported: Exported) -> None:
    """No level 1, so no cache of token ids."""
    bundle = exported(preset)[1]
    original, manifest = read(bundle)
    model = rewrite(bundle, by_plugin=False)
    pairs = zip(*(run_calls(each, CAPACITY, manifest.block_size, False) for each in (original, model)), strict=True)
    for want, got in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_where_each_cache_is_written(exported: Exported) -> None:
    model, manifest = read(exported("two_level")[1])
    writes = {write.past: write for write in find_writes(model.graph, manifest.graph.state)}
    assert [name for name, write in writes.items() if not write.is_float] == ["past.token_ids"]
    starts = {name.split(".")[1]: write.start for name, write in writes.items()}
    assert starts["key"] == starts["value"] == starts["token_ids"] != starts["block_key"] == starts["word_block_key"]


def test_capacity_is_a_number(exported: Exported) -> None:
    model = rewrite(exported("two_level")[1], by_plugin=True)
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    left = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim} - {""}
    assert not left & {"capacity", "num_blocks"} and {"batch", "new_tokens"} <= left


def test_a_graph_that_is_not_ours_is_refused(exported: Exported) -> None:
    for damage in ("ScatterND", "Add"):
        model, manifest = read(exported("moba")[1])
        for node in model.graph.node:
            if node.op_type == damage:
                node.op_type = "Identity"
        with pytest.raises(ExportError, match="the graph .*; export the bundle anew with this bilevel"):
            find_writes(model.graph, manifest.graph.state)


def test_an_old_tensorrt_needs_the_plugin(exported: Exported) -> None:
    _, manifest = read(exported("moba")[1])
    with pytest.raises(
        EngineError, match=r"tensorrt 10\.3 has no layer that writes caches in place .*WriteCache.*kernels build"
    ):
        check_caches(Flavour("tensorrt", None, (10, 3)), manifest.graph.state)
    check_caches(Flavour("tensorrt", None, (10, 15)), manifest.graph.state)
    check_caches(Flavour("tensorrt-rtx", None, (1, 7)), manifest.graph.state)
    check_caches(Flavour("tensorrt", None, (10, 3)), ())
