"""The dense layers of a routed model in an engine's graph: the same numbers from ordinary attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bilevel.config import Routing
from bilevel.export.decoder.decoder import save_decoder
from bilevel.export.engine.dense_layers import say_as_attention
from bilevel.export.graph.nodes import dense_nodes, routed_nodes
from bilevel.export.graph.operator_geometry import read_requests
from bilevel.runtime.cli.main import main
from tests.export.decoder.test_layers import model_of
from tests.export.engine.test_cache_writes import CAPACITY, read, run_calls

Exported = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize(
    "preset, precision",
    [
        ("gate", "fp32"),
        pytest.param("bounds", "fp32", marks=pytest.mark.thorough),
        pytest.param("gate", "fp16", marks=pytest.mark.thorough),
    ],
)
def test_dense_layers_become_attention(preset: str, precision: str, exported: Exported) -> None:
    """Rows of different lengths, padding and idle rows included; the routed layers stay what they are."""
    model, manifest = read(exported(preset, "fp32", precision)[1])
    expected = run_calls(model, CAPACITY, manifest.block_size, False)
    before = [node.op_type for node in routed_nodes(model.graph)]
    assert len(dense_nodes(model.graph)) == 1 and before.count("RoutedAttention") == 2
    say_as_attention(model)
    onnx.checker.check_model(model, full_check=True)
    after = [node.op_type for node in routed_nodes(model.graph)]
    assert after.count("RoutedAttention") == 1 and len(after) == len(before) - 1
    assert [node.op_type for node in model.graph.node].count("Softmax") == 1
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for got, wanted in zip(run_calls(model, CAPACITY, manifest.block_size, False), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=tolerance, rtol=tolerance)


def test_routed_layers_are_left(exported: Exported) -> None:
    model, _ = read(exported("two_level")[1])
    before = model.SerializeToString()
    assert dense_nodes(model.graph) == []
    say_as_attention(model)
    assert model.SerializeToString() == before


def test_kernels_are_for_the_routed_layers_alone(exported: Exported) -> None:
    """The routes of a dense layer are as wide as the cache: no kernel could be compiled for them."""
    kept = [
        geometry["K"] for op, geometry, _ in read_requests(exported("gate")[1] / "model.onnx") if op.name == "RoutedAttention"
    ]
    assert kept == [3]


def test_two_dense_layers_share_one_mask(tmp_path: Path) -> None:
    routing = Routing(preset="moba_gqa", block_size=4, topk=3, dense_layers=(0, 2))
    torch.manual_seed(0)
    save_decoder(model_of(routing=routing, num_hidden_layers=3), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    expected = run_calls(model, CAPACITY, 4, False)
    say_as_attention(model)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Softmax") == 2 and kinds.count("Or") == 1 and kinds.count("RoutedAttention") == 1
    for got, wanted in zip(run_calls(model, CAPACITY, 4, False), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_is_built(precision: str, copied: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    """TensorRT-RTX takes the dense layer beside the routed one's plugins: its two operators and the write of its block keys."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("there is no TensorRT-RTX for this machine")
    bundle = copied("gate", "fp32", precision)[1]
    assert main(["build", str(bundle), "--sm", "89", "--capacity", str(CAPACITY), "--plugins", "python", "--yes"]) == 0
    assert "3 plugin layers" in capsys.readouterr().out
