"""Bundles with packed caches: exported, checked as strictly as any other, run, copied and refused where they cannot go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bilevel.bundle.cache_rows import CacheRows
from bilevel.bundle.format import load_bundle
from bilevel.errors import BundleError, ExportError
from bilevel.export.check.parity import check_bundle
from bilevel.export.graph.bodies import packed_caches
from bilevel.export.graph.precision import check_precision, stored_caches
from bilevel.export.report.html import render_page
from bilevel.export.report.model import Report
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.cli.main import main
from tests.doubles.bundle import edit_manifest
from tests.export.check.faults import TOKENS, first_failure
from tests.export.check.surgery import Edit, body, edit_model, nth

Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture
def packed(exported: Exported) -> Exported:
    """preset, caches="int8", weights="fp32" -> (checkpoint, bundle); shared: copy before a change."""
    return lambda preset, caches="int8", weights="fp32": exported(preset, weights, caches=caches)


@pytest.mark.parametrize(("preset", "caches", "weights"), [("two_level", "int8", "fp32"), ("dense", "int4", "int4")])
def test_bundle_passes_and_says_what_rounding_costs(
    packed: Exported, tmp_path: Path, preset: str, caches: str, weights: str
) -> None:
    checkpoint, source = packed(preset, caches, weights)
    bundle = shutil.copytree(source, tmp_path / "bundle")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report.passed, first_failure(report)
    assert report.caches == caches and report.effect is not None and report.effect.kl_mean > 0
    assert (report.activations is None) == (weights == "fp32")
    assert max(entry.error for entry in report.computation) < 1e-5
    names = {entry.name for entry in report.computation}
    assert {"layer 0 keys", "layer 0 values", "layer 0 attention", "layer 1 output"} <= names
    assert Report.from_json(report.to_json()) == report
    assert f"{caches} caches" in render_page(report)
    (verdict,) = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checks"]
    assert verdict["passed"] and verdict["caches"] == caches


def _next_row(model: onnx.ModelProto) -> None:
    """The values' write begins a row later than it should: the last row is lost."""
    node = nth("WriteCacheQuantized", 1)(model.graph)
    one = onnx.helper.make_node("Constant", [], ["planted.one"], value_int=1)
    cast = onnx.helper.make_node("Cast", ["planted.one"], ["planted.one32"], to=onnx.TensorProto.INT32)
    less = onnx.helper.make_node("Sub", [node.input[2], "planted.one32"], ["planted.before"])
    floor = onnx.helper.make_node("Relu", ["planted.before"], ["planted.start"])
    node.input[2] = "planted.start"
    place = list(model.graph.node).index(node)
    for offset, new in enumerate((one, cast, less, floor)):
        model.graph.node.insert(place + offset, new)


def _body(op_type: str, old: str, new: str) -> Edit:
    return body(op_type, packed_caches, (old, new))


FAULTS: dict[str, tuple[Edit, str, str | None]] = {
    "truncated, not rounded": (_body("WriteCacheQuantized", "op.Round(", "op.Floor("), "layer 0 keys", "WriteCacheQuantized"),
    "a write that begins a row early": (_next_row, "layer 0 values", "WriteCacheQuantized"),
    "block keys of shifted codes": (
        _body("UnpackCache", "op.Constant(value_float=128.0), width", "op.Constant(value_float=127.0), width"),
        "layer 0 level 2 block keys",
        "FineRoute",
    ),
    "attention over shifted codes": (
        _body("RoutedAttentionQuantized", "op.Constant(value_float=128.0), width", "op.Constant(value_float=127.0), width"),
        "layer 0 attention",
        "RoutedAttentionQuantized",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found_where_it_is(packed: Exported, tmp_path: Path, fault: str) -> None:
    checkpoint, source = packed("two_level")
    bundle = shutil.copytree(source, tmp_path / "bundle")
    plant, at, operator = FAULTS[fault]
    edit_model(bundle, plant)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS, backend="portable", shrink=False)
    assert not report.passed
    assert report.failure is not None and (report.failure.name, report.failure.operator) == (at, operator)


def test_another_format_than_the_manifest_says(packed: Exported, tmp_path: Path) -> None:
    checkpoint, source = packed("two_level")
    bundle = shutil.copytree(source, tmp_path / "bundle")
    edit_manifest(bundle, lambda manifest: manifest.update(caches="int4"))
    with pytest.raises(BundleError, match="past.key.0 is uint8 .*, which int4 caches are not"):
        check_bundle(bundle, checkpoint, tokens=TOKENS)


def test_runtime_keeps_small_caches_and_copies_prefixes(packed: Exported) -> None:
    """A copied prefix, stored or in place, is read as if it had been written there; the memory is what the rows take."""
    _, bundle = packed("two_level")
    session = OnnxSession.open(bundle, threads=1)
    config = load_bundle(bundle).config
    ids = np.random.default_rng(0).integers(0, session.bundle.vocab_size, 23)

    def read(caches: Any, row: int, first: int) -> np.ndarray:
        given = np.zeros((2, len(ids) - first), np.int64)
        given[row] = ids[first:]
        new = np.zeros(2, np.int32)
        new[row] = len(ids) - first
        return np.array(caches.run(given, np.array([first if r == row else 0 for r in range(2)], np.int32), new)[row])

    caches = session.allocate(2, 48)
    rows = CacheRows.of("int8", int(config["head_dim"]))
    assert caches.state["past.key.0"].shape == (2, int(config["num_key_value_heads"]), 48, rows.num_bytes)
    assert caches.state["past.key.0"].dtype == np.uint8 and caches.state["past.block_key.0"].dtype == np.float32
    whole = read(caches, 0, 0)
    for first in (8, 13):
        other = session.allocate(2, 48)
        other.write_prefix(1, caches.read_prefix(0, first), first)
        np.testing.assert_allclose(read(other, 1, first), whole, rtol=1e-3, atol=1e-3)
    caches.copy_prefix(0, 1, 16)
    np.testing.assert_allclose(read(caches, 1, 16), whole, rtol=1e-3, atol=1e-3)


def test_library_and_bodies_write_the_same_bytes(packed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle = packed("dense", "int4", "int4")
    ids = np.random.default_rng(1).integers(0, load_bundle(bundle).vocab_size, (1, 30))
    written = []
    for library in ("", "none"):
        monkeypatch.setenv("BILEVEL_CPU_LIBRARY", library)
        caches = OnnxSession.open(bundle, threads=1).allocate(1, 32)
        caches.run(ids[:, :29], np.array([0], np.int32), np.array([29], np.int32))
        caches.run(ids[:, 29:], np.array([29], np.int32), np.array([1], np.int32))
        written.append(caches.state["past.key.0"][:, :, :30].copy())
    assert np.array_equal(*written) and written[0].any()


def test_inspect_shows_the_format_and_build_refuses_it(packed: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle = packed("two_level")
    assert main(["inspect", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["keys", "and", "values", "int8"] for line in lines)
    assert main(["build", str(bundle), "--sm", "89"]) == 2
    assert "caches keys and values in int8, for which there are no GPU kernels" in capsys.readouterr().err


def test_formats_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ExportError, match="caches='int3' is no format of caches; use one of fp32, int8, int4"):
        check_precision("fp32", "fp32", "int3")
    with pytest.raises(ExportError, match="--kv int8 goes with --precision fp32 alone"):
        check_precision("bf16", "fp32", "int8")
    with pytest.raises(
        ExportError, match="--kv fp16 differs from --precision fp32, and caches of floats have the type of the model"
    ):
        stored_caches("fp16", "fp32")
    named = [
        stored_caches(kv, precision) for kv, precision in ((None, "fp16"), ("fp16", "fp16"), ("fp32", "fp32"), ("int4", "fp32"))
    ]
    assert named == ["fp32", "fp32", "fp32", "int4"]
