"""What ``bilevel check`` reports, records and refuses. That it finds faults and lets pass what is harmless: ``test_faults.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from bilevel.export.bundle import describe_file
from bilevel.export.check import check_bundle
from bilevel.plugins.errors import BundleError, RequestError
from tests.faults import ATTENTION, TOKENS, first_failure, take
from tests.harmless import periodic_text, zero_query
from tests.surgery import before, edit_model, set_attribute

Exported = Callable[[str], tuple[Path, Path]]


# What it reports and records


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_check_bundle_passes_and_is_recorded(copied: Exported, preset: str) -> None:
    checkpoint, bundle = copied(preset)
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report["passed"] and first_failure(report) is None
    routers = {"two_level": ["level 1", "layer 0 level 2", "layer 1 level 2", "layer 1 experts"], "dense": []}
    names = [entry["name"] for entry in report["selection"]]
    assert names == routers.get(preset, ["layer 0 level 2", "layer 1 level 2"])
    assert all(entry["rows"] and entry["exact_rate"] == 1 for entry in report["selection"])
    assert json.loads(json.dumps(report)) == report
    (verdict,) = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checks"]
    assert verdict["passed"] and verdict["model_sha256"] == describe_file(bundle / "model.onnx")["sha256"]
    assert verdict["checkpoint_sha256"] == describe_file(checkpoint / "model.safetensors")["sha256"]
    assert verdict["data"] == {"source": "random token ids (seed 0)", "tokens": TOKENS}


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
    assert report["passed"]
    entries = {entry["name"]: entry for entry in report["selection"]}
    assert entries["level 1"]["smallest_margin"] < 1e-6
    assert entries["layer 1 level 2"]["exact_rate"] == 1


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
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert not report["passed"]
    assert [(entry["name"], entry["attribute"]) for entry in report["attributes"]] == [(label, name)]


# What cannot be checked


def test_check_bundle_graph_without_a_routed_node(copied: Exported) -> None:
    """A graph that lost a routed node is refused, not compared in part."""
    checkpoint, bundle = copied("two_level")

    def drop(model: onnx.ModelProto) -> None:
        node = ATTENTION[1](model.graph)
        node.CopyFrom(helper.make_node("Identity", [node.input[0]], list(node.output)))

    edit_model(bundle, drop)
    with pytest.raises(BundleError, match=r"1 RoutedAttention nodes.* has 2; export it again"):
        check_bundle(bundle, checkpoint, tokens=TOKENS)


def test_check_bundle_graph_that_cannot_run(copied: Exported) -> None:
    checkpoint, bundle = copied("two_level")
    edit_model(bundle, before(ATTENTION[0], 1, take([7], 1)))
    with pytest.raises(BundleError, match="cannot run.*export it again"):
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
    assert report["passed"] and report["data"]["tokens"] == tokens
    assert report["end_to_end"]["greedy"]["agreed"] == report["end_to_end"]["greedy"]["tokens"]


def test_check_bundle_heldout_text_is_the_default(copied: Exported) -> None:
    checkpoint, bundle = copied("moba")
    (checkpoint / "heldout.txt").write_text("the quick brown fox " * 30, encoding="utf-8")
    report = check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert report["data"]["source"] == str(checkpoint / "heldout.txt") and report["passed"]


def test_check_bundle_verdict_on_a_full_disk(copied: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, bundle = copied("moba")
    before = (bundle / "bundle.json").read_bytes()

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BundleError, match="verdict could not be recorded.*No space left"):
        check_bundle(bundle, checkpoint, tokens=TOKENS)
    assert (bundle / "bundle.json").read_bytes() == before
