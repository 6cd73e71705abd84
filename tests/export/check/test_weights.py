"""``bilevel check`` on int8 and int4 bundles: as strict about the export as on fp32 ones, honest about rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from bilevel.checkpoint import load_model
from bilevel.errors import BundleError
from bilevel.export.check import effect
from bilevel.export.check.adapt import load_adapted
from bilevel.export.check.judge import COMPUTATION_LIMIT
from bilevel.export.check.parity import check_bundle
from bilevel.export.check.rounding import round_activations, round_weights
from bilevel.export.graph.quantise import FP32_ACTIVATIONS, INT8_ACTIVATIONS
from bilevel.export.report.model import Report
from bilevel.runtime.cli.main import main
from tests.doubles.bundle import edit_manifest
from tests.export.check.faults import GRAPH_FAULTS, TOKENS, first_failure
from tests.export.check.surgery import edit_model, set_attribute

Exported = Callable[..., tuple[Path, Path]]
Edit = Callable[[onnx.ModelProto], Any]


def change(part: str, index: int, edit: Callable[[np.ndarray], None]) -> Edit:
    """Edit the index-th initializer whose name ends with ``part``; experts, the table's rows and the rest counted apart."""

    def plant(model: onnx.ModelProto) -> None:
        kinds = {".experts.": "_proj." in part, ".rows.": ".rows." in part}
        tensor = [
            t
            for t in model.graph.initializer
            if t.name.endswith(part) and all((mark in t.name) == wanted for mark, wanted in kinds.items())
        ][index]
        values = numpy_helper.to_array(tensor).copy()
        edit(values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return plant


def scale_by_a_hundredth(scales: np.ndarray) -> None:
    scales[3, 0] *= 1.01


def next_code(codes: np.ndarray) -> None:
    codes[2, 0, 1] += 1 if codes[2, 0, 1] & 15 < 15 else -1


def next_zero(zeros: np.ndarray) -> None:
    zeros[1, 0] += 1 if zeros[1, 0] & 15 < 15 else -1


def scale_of_every_expert(scales: np.ndarray) -> None:
    scales[:, 1] *= 1.01


def code_of_every_expert(codes: np.ndarray) -> None:
    codes[:, 1, 0] ^= 1  # the lowest bit of a code


def zero_of_every_expert(zeros: np.ndarray) -> None:
    zeros[:, 1, 0] ^= 1


def swap_products(model: onnx.ModelProto) -> None:
    """Two layers' products of one shape read each other's weights."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    first = nodes[0]
    second = next(node for node in nodes[1:] if shapes[node.input[1]] == shapes[first.input[1]])
    for port in (1, 2, 3):
        first.input[port], second.input[port] = second.input[port], first.input[port]


# fault -> (how it is planted, whether in the weights)
WEIGHT_FAULTS: dict[str, Edit] = {
    "a scale": change(".scales", 0, scale_by_a_hundredth),
    "a scale of a later layer": change(".scales", -2, scale_by_a_hundredth),
    "a scale of the head": change(".scales", -1, scale_by_a_hundredth),
    "a code": change(".codes", 0, next_code),
    "a zero point": change(".zeros", 1, next_zero),
    "two layers' weights": swap_products,
    "table: a scale": change(".rows.int8.scales", 0, lambda scales: np.multiply(scales, 1.01, out=scales)),
    "table: a code": change(".rows.int8.codes", 0, lambda codes: np.bitwise_xor(codes, 1, out=codes)),
    "experts: a scale": change("gate_up_proj.int4.scales", 0, scale_of_every_expert),
    "experts: a code": change("down_proj.int4.codes", 0, code_of_every_expert),
    "experts: a zero point": change("gate_up_proj.int4.zeros", 0, zero_of_every_expert),
    "experts: another width": set_attribute("RoutedExpertsQuantized", 0, "block_size", 64),
}
ALSO_IN_FP32 = [
    "level 1: another block size",
    "level 2: top-k off by one",
    "level 2: keys of the block before",
    "attention: value heads swapped",
    "attention: routes of the other head",
    "experts: gate and up swapped",
    "experts: ids shifted",
]


@pytest.mark.parametrize(
    ("preset", "weights"),
    [("two_level", "int8"), ("two_level", "int4"), pytest.param("moba", "int4", marks=pytest.mark.thorough), ("dense", "int4")],
)
def test_bundle_passes_within_the_limits_of_fp32(exported: Exported, tmp_path: Path, preset: str, weights: str) -> None:
    checkpoint, source = exported(preset, weights)
    bundle = shutil.copytree(source, tmp_path / "bundle")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report.passed and first_failure(report) is None and report.weights == weights
    assert {entry.limit for entry in report.computation} == {COMPUTATION_LIMIT}
    assert max(entry.error for entry in report.computation) < 1e-5
    assert all(entry.exact_rate == 1 for entry in report.selection)
    activations, effect = report.activations, report.effect
    assert 0 < activations.kl_mean <= activations.limit
    assert effect.kl_mean > 0 and effect.loss_after != effect.loss_before
    assert [entry.name for entry in effect.routes] == [entry.name for entry in report.selection]
    assert Report.from_json(report.to_json()) == report
    (verdict,) = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checks"]
    assert verdict["passed"] and verdict["weights"] == weights


def test_effect_grows_with_the_rounding(copied: Exported, exported: Exported, tmp_path: Path) -> None:
    """Level 1 reads what stays fp32, so its routes stay; fewer bits move the rest further."""
    effects = {}
    for weights in ("int8", "int4"):
        checkpoint, source = exported("two_level", weights)
        bundle = shutil.copytree(source, tmp_path / weights)
        effects[weights] = check_bundle(bundle, checkpoint, tokens=80).effect
    assert effects["int8"].kl_mean < effects["int4"].kl_mean
    routes = {name: {entry.name: entry for entry in effect.routes} for name, effect in effects.items()}
    assert routes["int8"]["level 1"].exact_rate == routes["int4"]["level 1"].exact_rate == 1
    assert routes["int4"]["layer 1 level 2"].exact_rate < 1 and routes["int4"]["layer 1 level 2"].jaccard > 0.5
    assert [entry.rows for entry in routes["int4"].values()] == [80, 160, 160, 80]


def test_fp32_bundle_has_no_looser_judgement(copied: Exported) -> None:
    report = check_bundle(*reversed(copied("moba")), tokens=TOKENS)
    assert report.passed and report.weights == "fp32" and not {"activations", "effect"} & set(report.to_dict())


@pytest.mark.parametrize(
    "name", [*ALSO_IN_FP32[:2], *(pytest.param(name, marks=pytest.mark.thorough) for name in ALSO_IN_FP32[2:])]
)
def test_planted_fault_in_an_int4_graph(copied: Exported, name: str) -> None:
    fault = GRAPH_FAULTS[name]
    checkpoint, bundle = copied("two_level", "int4")
    edit_model(bundle, fault.plant)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report.passed and first_failure(report) == fault.at


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_planted_fault_in_int4_weights(copied: Exported, fault: str) -> None:
    checkpoint, bundle = copied("two_level", "int4")
    edit_model(bundle, WEIGHT_FAULTS[fault], weights=True)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report.passed and first_failure(report) is not None


@pytest.mark.parametrize(
    ("stored", "claimed"),
    [("int4", "int8"), pytest.param("int8", "int4", marks=pytest.mark.thorough), ("fp32", "int4"), ("int4", "fp32")],
)
def test_another_format_than_the_manifest_says(copied: Exported, stored: str, claimed: str) -> None:
    checkpoint, bundle = copied("two_level", stored)
    edit_manifest(bundle, lambda manifest: manifest.update(weights={"format": claimed}))
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report.passed and first_failure(report) is not None


def test_unknown_format(copied: Exported) -> None:
    checkpoint, bundle = copied("moba")
    edit_manifest(bundle, lambda manifest: manifest.update(weights={"format": "int3"}))
    with pytest.raises(
        BundleError, match="gives weights.format='int3', which must be one of fp32, int8, int4; make the bundle anew"
    ):
        check_bundle(bundle, checkpoint, tokens=TOKENS)


def test_activations_are_judged(copied: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the shipped file rounds activations; beyond the limit it fails though selection and computation hold."""
    checkpoint, bundle = copied("moba", "int4")
    monkeypatch.setattr(effect, "ALLOWED_FACTOR", 0.1)
    monkeypatch.setattr(effect, "KL_LIMIT", 0.0)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert first_failure(report) is None and not report.activations.passed and not report.passed


def test_shipped_file_rounds_activations_and_the_judged_copy_does_not(exported: Exported) -> None:
    def levels(fp32_activations: bool) -> set[int]:
        path = exported("moba", "int4")[1] / "model.onnx"
        nodes = load_adapted(path, fp32_activations=fp32_activations).graph
        return {node.attributes["accuracy_level"].value for node in nodes if node.op_type == "MatMulNBits"}

    assert levels(False) == {INT8_ACTIVATIONS}
    assert levels(True) == {FP32_ACTIVATIONS}


def test_command_prints_both_further_lines(copied: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, bundle = copied("two_level", "int4")
    command = ["check", str(bundle), "--against", str(checkpoint), "--tokens", str(TOKENS)]
    assert main([*command, "--summary"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["selection", "computation", "end", "invariants", "activations", "effect"]
    assert "of int4" in lines[5] and "level 1 100 %" in lines[5] and "experts" in lines[5]
    assert main(command) == 0
    assert "Effect of int4" in capsys.readouterr().out


# PyTorch's side


def test_round_weights_spares_the_router(exported: Exported) -> None:
    """moba has a tied head: head and table are rounded alike. Level 1 compares rows of the table, which keep 8 bits."""
    for preset in ("two_level", "moba"):
        model, plain = (load_model(exported(preset)[0]) for _ in range(2))
        round_weights(model, "int4", model.config)
        before = dict(plain.named_parameters(remove_duplicate=False))
        equal = {name for name, p in model.named_parameters(remove_duplicate=False) if torch.equal(p, before[name])}
        rounded = {name for name in before if name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj"))}
        rounded |= {"lm_head.weight", "model.embed_tokens.weight"}
        assert equal == before.keys() - rounded
        table, head = model.model.embed_tokens.weight, model.lm_head.weight
        if preset == "moba":
            assert torch.equal(table, head)
        else:
            assert (table - plain.model.embed_tokens.weight).abs().max() < 0.01 * table.abs().max()


def test_rounded_activations_change_a_little_and_once(exported: Exported) -> None:
    model = load_model(exported("moba")[0])
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        before = model(ids)
        round_activations(model)
        inside = model(ids)
        round_activations(model)
        again = model(ids)
    assert 0 < (inside - before).abs().max() < 0.1 * before.abs().max()
    assert torch.equal(inside, again)


def test_set_attribute_keeps_the_quantised_products(copied: Exported) -> None:
    """The graph's bodies can be attached anew without losing what the quantised products need."""
    checkpoint, bundle = copied("two_level", "int4")
    edit_model(bundle, set_attribute("RoutedAttention", 0, "causal", 1))
    assert check_bundle(bundle, checkpoint, tokens=TOKENS).passed
