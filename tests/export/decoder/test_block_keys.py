"""Models whose blocks have bounds or a gate for keys, and dense layers, from checkpoint to bundle, held against PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from bilevel.export.check.parity import check_bundle
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.training import candidate_recall
from tests.export.check.faults import TOKENS, first_failure
from tests.export.check.surgery import edit_model
from tests.support.tiny_models import BLOCK_SIZE, make_model

Exported = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("preset, weights", [("gate", "fp32"), ("bounds", "fp32"), ("gate", "int4")])
def test_check_passes(preset: str, weights: str, exported: Exported) -> None:
    checkpoint, bundle = exported(preset, weights)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report.passed and first_failure(report) is None
    routed = {"gate": ["layer 1 level 2"], "bounds": ["level 1", "layer 0 level 2"]}
    assert [entry.name for entry in report.selection] == routed[preset]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_check_passes_in_lower_precision(precision: str, exported: Exported) -> None:
    checkpoint, bundle = exported("gate", "fp32", precision)
    assert check_bundle(bundle, checkpoint, tokens=TOKENS).passed


def test_manifest_and_text(exported: Exported) -> None:
    """Caches and routes of the routed layer alone; the runtime's text is PyTorch's."""
    bundle = exported("gate")[1]
    manifest = json.loads((bundle / "bundle.json").read_text())
    caches = [entry["input"] for entry in manifest["graph"]["state"]]
    assert caches == ["past.key.0", "past.value.0", "past.key.1", "past.value.1", "past.block_key.1"]
    assert manifest["graph"]["routes"] == {"candidates": None, "blocks": ["blocks.1"], "experts": {}}
    ids, model = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], make_model("gate")
    (completion,) = Generator.open(bundle).generate([ids], SamplingParams(max_tokens=8, temperature=0)).finish()
    for token in completion.token_ids:
        with torch.no_grad():
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids = [*ids, token]


def test_weights_of_a_gate_stay_floats(exported: Exported) -> None:
    """They only choose: rounding them would move routes for nothing. Norms and gates are kept as they were trained."""
    model = onnx.load(str(exported("gate", "int4")[1] / "model.onnx"))
    gate = make_model("gate").state_dict()["model.layers.1.self_attn.block_keys.key_weight"].numpy()
    stored = [numpy_helper.to_array(each) for each in model.graph.initializer]
    assert any(array.shape == gate.shape and np.array_equal(array, gate) for array in stored)


def test_a_gate_that_was_altered_is_found(copied: Exported) -> None:
    """A planted fault: another projection of the keys chooses other blocks, which is no near-tie."""
    checkpoint, bundle = copied("gate")
    gate = make_model("gate").state_dict()["model.layers.1.self_attn.block_keys.key_weight"].numpy()

    def other(model: onnx.ModelProto) -> None:
        for each in model.graph.initializer:
            array = numpy_helper.to_array(each)
            if array.shape == gate.shape and np.array_equal(array, gate):
                each.CopyFrom(numpy_helper.from_array(np.roll(array, 1, axis=1).copy(), each.name))
                return
        raise AssertionError("the gate's weights are not in the graph")

    edit_model(bundle, other, weights=True)
    found = first_failure(check_bundle(bundle, checkpoint, tokens=TOKENS))
    assert found is not None and found.startswith("layer 1 level 2")


def test_recall_counts_routed_layers() -> None:
    recalls = candidate_recall(make_model("bounds"), torch.randint(3, 20, (2, 12 * BLOCK_SIZE)))
    assert len(recalls) == 1 and 0 <= recalls[0].contested <= 1
