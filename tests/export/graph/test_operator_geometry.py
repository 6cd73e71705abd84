"""What a graph's routed nodes need kernels for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from bilevel.errors import ExportError
from bilevel.export.graph.operator_geometry import read_requests
from bilevel.plugins.library.build import plan_variants
from tests.support.operator_calls import SWIGLU

Exported = Callable[..., tuple[Path, Path]]


def test_geometries_of_a_bundle(exported: Exported) -> None:
    """Two layers of one geometry are one request."""
    requests = read_requests(exported("two_level")[1] / "model.onnx")
    found = {op.name: (geometry, dtype) for op, geometry, dtype in requests}
    assert len(found) == 6 and len(requests) == 7 and {dtype for _, dtype in found.values()} == {"float32"}
    route = {"block_size": 4, "causal": 1, "init_blocks": 1, "local_blocks": 1}
    assert found["CoarseRoute"][0] == {**route, "Hr": 1, "Hk": 1, "Dr": 6, "topk": 6, "num_selection_heads": 1}
    assert found["FineRoute"][0] == {**route, "Hr": 4, "Hk": 2, "Dr": 8, "Hc": 1, "K1": 6, "topk": 3, "num_selection_heads": 2}
    attention = found["RoutedAttention"][0]
    sizes = {"Hq": 4, "Hkv": 2, "D": 8, "Dv": 8, "Hs": 2, "K": 3}
    assert {**attention, "scale": 0} == {**sizes, "block_size": 4, "causal": 1, "scale": 0}
    assert attention["scale"] == pytest.approx(8**-0.5)
    assert found["RoutedExperts"][0] == {"d": 24, "k": 2, "E": 6, "f": 5, **SWIGLU}
    caches = [geometry for op, geometry, _ in requests if op.name == "WriteCache"]
    assert caches == [{"H": 1, "W": 6}, {"H": 2, "W": 8}], "level 1's keys; keys, values and their blocks' keys"
    assert found["ExpertRoute"][0]["score_func"] == "sigmoid" and found["ExpertRoute"][0]["Gp"] == 3


def test_the_data_type_is_the_nodes_own(exported: Exported) -> None:
    requests = read_requests(exported("two_level", "fp32", "fp16")[1] / "model.onnx")
    kinds = {op.name: dtype for op, _, dtype in requests}
    assert kinds["RoutedAttention"] == "float16" and kinds["ExpertRoute"] == "float32"


def test_every_request_can_be_planned(exported: Exported) -> None:
    for preset in ("two_level", "moba"):
        assert plan_variants(read_requests(exported(preset)[1] / "model.onnx"), [87, 120])


def test_a_dense_model_needs_none(exported: Exported) -> None:
    """But for its caches."""
    requests = read_requests(exported("dense")[1] / "model.onnx")
    assert [(op.name, geometry) for op, geometry, _ in requests] == [("WriteCache", {"H": 2, "W": 8})]


def test_free_and_unknown_sizes_are_refused(exported: Exported, tmp_path: Path) -> None:
    graph = onnx.load(str(exported("moba")[1] / "model.onnx"), load_external_data=False)
    cache = next(value for value in graph.graph.output if value.name == "present.key.0")
    cache.type.tensor_type.shape.dim[1].dim_param = "heads"
    (tmp_path / "free.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ExportError, match="k has a free size Hkv='heads'; kernels are compiled for fixed ones"):
        read_requests(tmp_path / "free.onnx")
    del graph.graph.value_info[:]
    (tmp_path / "unknown.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ExportError, match="does not tell the shape of .*; export the bundle anew"):
        read_requests(tmp_path / "unknown.onnx")
