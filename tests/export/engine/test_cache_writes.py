"""Caches written in place: an engine's graph gives what the bundle's own gives, by the layer and by the plugin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from bilevel.export.engine.cache_writes import check_caches, choose_writer, find_writes, write_in_place
from bilevel.export.engine.versions import Flavour
from tests.doubles.tensorrt import drop_whole_updates

Exported = Callable[..., tuple[Path, Path]]
CAPACITY = 48


def read(folder: Path) -> tuple[onnx.ModelProto, Bundle]:
    return onnx.load(str(folder / "model.onnx")), read_manifest(folder)


NEW, RTX, JETPACK = (
    Flavour(*each) for each in (("tensorrt", None, (11,)), ("tensorrt-rtx", None, (1, 7)), ("tensorrt", None, (10, 3)))
)
FLAVOURS = [
    (NEW, True, ("TensorScatter", "TensorScatter")),
    (NEW, False, ("TensorScatter", "TensorScatter")),
    (RTX, True, ("WriteCache", "TensorScatter")),
    (RTX, False, ("ScatterND", "TensorScatter")),
    (JETPACK, True, ("WriteCache", "WriteCache")),
]


def rewrite(bundle: Path, flavour: Flavour = NEW, with_plugins: bool = True, capacity: int = CAPACITY) -> onnx.ModelProto:
    model, manifest = read(bundle)
    sizes = {"capacity": capacity, "num_blocks": capacity // manifest.block_size}
    write_in_place(model, manifest.graph.state, sizes, lambda write: choose_writer(flavour, write, with_plugins))
    return model


def as_function() -> onnx.FunctionProto:
    """WriteCache for ONNX Runtime, which has no such plugin."""
    nodes = [
        helper.make_node("Cast", ["start"], ["at"], to=TensorProto.INT64),
        helper.make_node("TensorScatter", ["cache", "update", "at"], ["out"], axis=-2),
    ]
    opsets = [helper.make_opsetid("", 24)]
    return helper.make_function(DOMAIN, "WriteCache", ["cache", "update", "start"], ["out"], nodes, opsets)


CALLS = ((7, 4), (5, 5), (1, 1), (1, 0), (1, 1), (1, 1))


def run_calls(
    model: onnx.ModelProto, capacity: int, block_size: int, tokens_are_written: bool, calls: Sequence[tuple[int, int]] = CALLS
) -> list[np.ndarray[Any, Any]]:
    """Logits of a prompt in pieces and of single tokens, rows of different lengths, as a runtime would call."""
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
    for call, lengths in enumerate(calls):
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


@pytest.mark.parametrize("flavour, with_plugins, writers", FLAVOURS)
def test_the_same_logits(flavour: Flavour, with_plugins: bool, writers: tuple[str, str], exported: Exported) -> None:
    """writers: of keys of blocks, and of every other cache of floats."""
    bundle = exported("two_level")[1]
    original, manifest = read(bundle)
    model = rewrite(bundle, flavour, with_plugins)
    made = {name: node for node in model.graph.node for name in node.output}
    found = {
        ("num_blocks" in past.shape, made[present].op_type)
        for past, present in manifest.graph.state
        if past.name != "past.token_ids"
    }
    assert found == {(True, writers[0]), (False, writers[1])}
    assert all(made[present].input[0] == past.name for past, present in manifest.graph.state if present in made)
    assert "present.token_ids" not in {value.name for value in model.graph.output}
    if "WriteCache" in writers:
        assert all(node.domain == DOMAIN for node in model.graph.node if node.op_type == "WriteCache")
        assert model.opset_import[0].version == (24 if "TensorScatter" in writers else 23)
        model.functions.append(as_function())
        model.opset_import[0].version = 24
    drop_whole_updates(model)
    expected = run_calls(original, CAPACITY, manifest.block_size, tokens_are_written=False)
    for got, want in zip(run_calls(model, CAPACITY, manifest.block_size, tokens_are_written=True), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flavour, with_plugins, writers", FLAVOURS)
def test_caches_that_are_filled_to_the_end(
    flavour: Flavour, with_plugins: bool, writers: tuple[str, str], exported: Exported
) -> None:
    """Whatever writes them: no update goes beyond the end of a cache, where TensorRT would drop the whole of it."""
    bundle = exported("two_level")[1]
    original, manifest = read(bundle)
    capacity, size = CAPACITY, manifest.block_size
    model = rewrite(bundle, flavour, with_plugins)
    if "WriteCache" in writers:
        model.functions.append(as_function())
        model.opset_import[0].version = 24
    drop_whole_updates(model)
    left = capacity - 16 - 2 * size
    for calls in (
        ((16, 16), (left, left), (size, size), (size, size)),
        ((16, 16), (left, left), (2 * size, 2 * size)),
        ((16, 16), (left + 1, left), (2 * size - 2, 2 * size - 2), (1, 1)),
    ):
        want = run_calls(original, capacity, size, tokens_are_written=False, calls=calls)
        for got, expected in zip(run_calls(model, capacity, size, True, calls), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", [pytest.param("moba", marks=pytest.mark.thorough), "dense"])
def test_other_presets(preset: str, exported: Exported) -> None:
    """No level 1, so no cache of token ids."""
    bundle = exported(preset)[1]
    original, manifest = read(bundle)
    model = rewrite(bundle)
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
    model = rewrite(exported("two_level")[1], JETPACK)
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
