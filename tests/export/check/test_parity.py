"""What ``bilevel check`` reports, records and refuses. What it finds and lets pass: ``test_faults.py``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from bilevel.errors import BundleError, RequestError
from bilevel.export.check.parity import check_bundle
from bilevel.export.decoder.bundle import describe_file
from bilevel.export.report.model import Report
from tests.export.check.faults import ATTENTION, GRAPH_FAULTS, LEVEL_2, TOKENS, first_failure, key_of_block_before, take
from tests.export.check.harmless import periodic_text, zero_query
from tests.export.check.surgery import before, edit_model, set_attribute
from tests.support.tiny_models import BLOCK_SIZE

Exported = Callable[..., tuple[Path, Path]]


# What it reports and records


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_check_bundle_passes_and_is_recorded(copied: Exported, preset: str) -> None:
    checkpoint, bundle = copied(preset)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report.passed and first_failure(report) is None
    routers = {"two_level": ["level 1", "layer 0 level 2", "layer 1 level 2", "layer 1 experts"], "dense": []}
    names = [entry.name for entry in report.selection]
    assert names == routers.get(preset, ["layer 0 level 2", "layer 1 level 2"])
    assert all(entry.rows and entry.exact_rate == 1 for entry in report.selection)
    assert Report.from_json(report.to_json()) == report
    assert report.executions == ("bodies",) if preset == "dense" else report.executions[:1] == ("bodies",)
    (verdict,) = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checks"]
    assert verdict["passed"] and verdict["model_sha256"] == describe_file(bundle / "model.onnx")["sha256"]
    assert verdict["checkpoint_sha256"] == describe_file(checkpoint / "model.safetensors")["sha256"]
    assert verdict["data"] == {"source": "random token ids (seed 0)", "tokens": TOKENS * 8 // 5, "rows": 2}
    assert verdict["verdicts"] == dict.fromkeys(verdict["verdicts"], True)


def test_a_verdict_that_cannot_be_recorded_is_given(copied: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that becomes read-only in the middle."""

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    checkpoint, bundle = copied("moba")
    monkeypatch.setattr("bilevel.bundle.format.write_manifest", refuse)
    remarks: list[str] = []
    assert check_bundle(bundle, checkpoint, tokens=TOKENS, on_remark=remarks.append).passed
    assert remarks == [f"the verdict could not be recorded in {bundle / 'bundle.json'} (Read-only file system)"]


def test_check_bundle_records_a_failure_after_a_success(copied: Exported) -> None:
    checkpoint, bundle = copied("moba")
    check_bundle(bundle, checkpoint, tokens=TOKENS)
    edit_model(bundle, set_attribute("RoutedAttention", 0, "scale", 0.4))
    check_bundle(bundle, checkpoint, tokens=TOKENS)
    checks = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checks"]
    assert [verdict["passed"] for verdict in checks] == [True, False]
    assert checks[1]["largest_error"] > 1e-3
    assert not list(bundle.glob(".*")), "nothing is left of writing the verdict"


def test_check_bundle_passes_exact_ties(copied: Exported) -> None:
    """Periodic text ties level 1, and a layer whose query is zero ties level 2."""
    checkpoint, bundle = copied("two_level")
    zero_query(checkpoint, bundle)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS, data=periodic_text(bundle))
    assert report.passed
    entries = {entry.name: entry for entry in report.selection}
    assert entries["level 1"].smallest_margin < 1e-6
    assert entries["layer 1 level 2"].exact_rate == 1


@pytest.mark.parametrize(
    ("op_type", "label", "name", "value"),
    [
        ("CoarseRoute", "level 1", "topk", 4),
        ("FineRoute", "layer 0 level 2", "local_blocks", 2),
        ("RoutedAttention", "layer 0 attention", "scale", 0.354),
        ("ExpertRoute", "layer 1 experts", "group_score", "max"),
    ],
)
def test_check_bundle_names_attribute_that_only_a_plugin_reads(
    copied: Exported, op_type: str, label: str, name: str, value: Any
) -> None:
    """The folded body computes the right thing all the same, so only the node's own words can show the fault."""
    checkpoint, bundle = copied("two_level")
    edit_model(bundle, set_attribute(op_type, 0, name, value, follow=False))
    report = check_bundle(bundle, checkpoint, tokens=TOKENS, backend="portable")  # the CPU kernels do read attributes
    assert not report.passed and report.verdicts.computation
    (entry,) = report.structure
    assert (entry.name, entry.operator, entry.attribute) == (label, op_type, name)
    assert first_failure(report) == label and f"{name}={entry.graph}" in report.failure.message


def test_check_bundle_graph_without_a_routed_node(copied: Exported) -> None:
    """A layer that became dense is named, and what it computes is compared all the same."""
    checkpoint, bundle = copied("two_level")

    def drop(model: onnx.ModelProto) -> None:
        node = ATTENTION[1](model.graph)
        node.CopyFrom(helper.make_node("Identity", [node.input[0]], list(node.output)))

    edit_model(bundle, drop)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    (entry,) = report.structure
    assert (entry.name, entry.graph, entry.model) == ("layer 1 attention", 0, 1)
    assert first_failure(report) == "layer 1 attention" and report.failure.judgement == "structure"
    assert not report.verdicts.computation, "the layer's output is wrong as well"


def test_check_bundle_graph_that_cannot_run(copied: Exported) -> None:
    checkpoint, bundle = copied("two_level")
    edit_model(bundle, before(ATTENTION[0], 1, take([7], 1)))
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report.passed and first_failure(report) == "layer 0 output"
    assert "cannot run the graph's layer 0" in report.failure.difference
    assert not report.end_to_end.teacher_forced.passed
    assert report.invariants[0].name == "the graph runs on its own"


def test_check_bundle_names_the_smallest_input(copied: Exported) -> None:
    """A block is complete from its fourth token on, and the second block is the first that anybody chooses."""
    checkpoint, bundle = copied("two_level")
    edit_model(bundle, before(LEVEL_2[1], 1, key_of_block_before))
    failure = check_bundle(bundle, checkpoint, tokens=TOKENS).failure
    assert (failure.layer, failure.operator, failure.execution) == (1, "FineRoute", "bodies")
    assert len(failure.input.token_ids) == BLOCK_SIZE and failure.input.calls == (BLOCK_SIZE,)
    assert any(name.startswith("Pad") for name in failure.nodes)
    assert "PyTorch in fp64 has" in failure.difference and "Histogram" in failure.outliers


def test_check_bundle_needs_two_calls_to_show_a_stale_block(copied: Exported) -> None:
    checkpoint, bundle = copied("two_level")
    fault = GRAPH_FAULTS["level 2: stale block key after a chunk"]
    edit_model(bundle, fault.plant)
    failure = check_bundle(bundle, checkpoint, tokens=TOKENS).failure
    assert failure.name == fault.at and len(failure.input.calls) > 1


def test_check_bundle_other_cuts_and_another_order_of_rows(copied: Exported) -> None:
    checkpoint, bundle = copied("two_level")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS, cuts=(1, 2, 3, 30), row_order=(1, 0))
    assert report.passed and report.data.calls[:4] == (1, 2, 3, 30)


@pytest.mark.parametrize("backend", ["portable", "kernels"])
def test_check_bundle_one_backend(copied: Exported, backend: str) -> None:
    checkpoint, bundle = copied("moba")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS, backend=backend)
    assert report.passed and report.executions == ({"portable": "bodies", "kernels": "CPU kernels"}[backend],)


def test_check_bundle_invariants(copied: Exported) -> None:
    checkpoint, bundle = copied("two_level")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert {entry.name: entry.passed for entry in report.invariants} == dict.fromkeys(
        [
            "any cut into calls",
            "all blocks kept equals dense",
            "the future moves no earlier route",
            "order and repetition of routes",
            "experts at extreme logits",
        ],
        True,
    )


def test_check_bundle_words_say_which_routers_differ(copied: Exported) -> None:
    checkpoint, bundle = copied("two_level")
    edit_model(bundle, set_attribute("FineRoute", 0, "local_blocks", 2))
    words = check_bundle(bundle, checkpoint, tokens=TOKENS, shrink=False).words
    assert len(words) == TOKENS
    assert any(word.wrong == ("layer 0 level 2",) and word.state == "wrong" for word in words)
    assert words[0].state == "same"


@pytest.mark.parametrize(
    "preset, precision",
    [
        ("two_level", "fp16"),
        ("moba", "bf16"),
        pytest.param("two_level", "bf16", marks=pytest.mark.thorough),
        pytest.param("moba", "fp16", marks=pytest.mark.thorough),
    ],
)
def test_check_bundle_of_a_lower_precision(exported: Exported, tmp_path: Path, preset: str, precision: str) -> None:
    checkpoint, source = exported(preset, "fp32", precision)
    bundle = shutil.copytree(source, tmp_path / "bundle")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report.passed, report.failure or report.end_to_end
    entries = {entry.name: entry for entry in report.computation}
    attention = entries["layer 1 attention"]
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}[precision]
    assert attention.floor > unit / 100 and attention.limit >= 2 * attention.floor
    assert report.end_to_end.teacher_forced.floor_kl > 0


def test_check_bundle_fault_in_a_lower_precision(exported: Exported, tmp_path: Path) -> None:
    checkpoint, source = exported("two_level", "fp32", "fp16")
    bundle = shutil.copytree(source, tmp_path / "bundle")
    edit_model(bundle, set_attribute("FineRoute", 1, "local_blocks", 2))
    assert first_failure(check_bundle(bundle, checkpoint, tokens=TOKENS, shrink=False)) == "layer 1 level 2"


# What cannot be checked


def test_check_bundle_of_another_precision_is_refused(exported: Exported) -> None:
    checkpoint, bundle = exported("moba")
    with pytest.raises(RequestError, match="is of precision float32, not float16"):
        check_bundle(bundle, checkpoint, tokens=TOKENS, precision="float16")


def test_check_bundle_of_an_older_export_is_refused(copied: Exported) -> None:
    checkpoint, bundle = copied("moba")

    def forget(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["add_9" if name == "hidden.1" else name for name in names]

    edit_model(bundle, forget)
    with pytest.raises(BundleError, match=r"names no value hidden\.1: an older bilevel exported it.*export it again"):
        check_bundle(bundle, checkpoint, tokens=TOKENS)


@pytest.mark.parametrize("tokens", [19, 97], ids=["fewer than a few blocks", "more than the model's positions"])
def test_check_bundle_token_count(exported: Exported, tokens: int) -> None:
    checkpoint, bundle = exported("two_level")
    with pytest.raises(RequestError, match=f"tokens={tokens} must lie between 20 .* and 96"):
        check_bundle(bundle, checkpoint, tokens=tokens)


@pytest.mark.parametrize("tokens", [20, 32, 33, 96])
def test_check_bundle_smallest_and_largest_token_count(copied: Exported, tokens: int) -> None:
    checkpoint, bundle = copied("moba")
    report = check_bundle(bundle, checkpoint, tokens=tokens)
    assert report.passed and report.data.tokens == tokens + tokens * 3 // 5
    assert report.end_to_end.greedy.agreed == report.end_to_end.greedy.tokens


def test_check_bundle_heldout_text_is_the_default(copied: Exported) -> None:
    checkpoint, bundle = copied("moba")
    (checkpoint / "heldout.txt").write_text("the quick brown fox " * 30, encoding="utf-8")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report.data.source == str(checkpoint / "heldout.txt") and report.passed


def test_check_bundle_verdict_on_a_full_disk(copied: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, bundle = copied("moba")
    before = (bundle / "bundle.json").read_bytes()

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    remarks: list[str] = []
    assert check_bundle(bundle, checkpoint, tokens=TOKENS, on_remark=remarks.append).passed
    assert len(remarks) == 1 and "No space left" in remarks[0]
    assert (bundle / "bundle.json").read_bytes() == before
