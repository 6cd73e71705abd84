"""Graphs for older versions of TensorRT: only operators that these import, and the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from bilevel.errors import EngineError
from bilevel.export.engine.older_operators import lower_operators
from bilevel.export.engine.versions import Flavour
from tests.export.engine.test_cache_writes import CAPACITY, read, run_calls

Exported = Callable[..., tuple[Path, Path]]
OLD, NEW = Flavour("tensorrt", None, (10, 3)), Flavour("tensorrt", None, (10, 15))
TENSORRT_10_3 = 20  # what the parser of 10.1, its last published predecessor, documents


def too_new(model: onnx.ModelProto) -> set[str]:
    """Operators that came later than TENSORRT_10_3."""
    kinds = {node.op_type for node in model.graph.node if not node.domain}
    return {kind for kind in kinds if not onnx.defs.has(kind, TENSORRT_10_3, "")}


@pytest.mark.parametrize(
    ("preset", "precision", "tolerance"),
    [("two_level", "fp32", 1e-5), pytest.param("moba", "fp16", 5e-3, marks=pytest.mark.thorough)],
)
def test_the_same_logits(preset: str, precision: str, tolerance: float, exported: Exported) -> None:
    original, manifest = read(exported(preset, "fp32", precision)[1])
    lowered, _ = read(exported(preset, "fp32", precision)[1])
    lower_operators(lowered, OLD)
    assert too_new(original) == {"RMSNormalization", "RotaryEmbedding"} and too_new(lowered) == set()
    onnx.checker.check_model(lowered)
    pairs = zip(*(run_calls(each, CAPACITY, manifest.block_size, False) for each in (lowered, original)), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_newer_versions_get_the_graph_as_it_is(exported: Exported) -> None:
    for flavour in (NEW, Flavour("tensorrt-rtx", None, (1, 7))):
        original, _ = read(exported("two_level")[1])
        model, _ = read(exported("two_level")[1])
        lower_operators(model, flavour)
        assert model == original


def test_dense_models_need_attention(exported: Exported) -> None:
    model, _ = read(exported("dense")[1])
    with pytest.raises(EngineError, match=r"tensorrt 10\.3 has no attention, .*; install TensorRT 10\.14 or newer"):
        lower_operators(model, OLD)
    lower_operators(model, Flavour("tensorrt", None, (10, 14)))
    assert too_new(model) == {"Attention"}


@pytest.mark.parametrize(
    ("kind", "attribute", "value"),
    [("RMSNormalization", "axis", 1), ("RotaryEmbedding", "interleaved", 1), ("RotaryEmbedding", "rotary_embedding_dim", 4)],
)
def test_forms_that_are_never_exported_are_refused(kind: str, attribute: str, value: int, exported: Exported) -> None:
    model, _ = read(exported("moba")[1])
    node = next(node for node in model.graph.node if node.op_type == kind)
    kept = [each for each in node.attribute if each.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    with pytest.raises(EngineError, match=f"{node.name} .* in a way that this bilevel does not export; export the bundle anew"):
        lower_operators(model, OLD)
