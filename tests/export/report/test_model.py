"""The report's JSON: its schema, which follows from the fields, and the way back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from bilevel.errors import RequestError
from bilevel.export.report.model import REPORT_SCHEMA, Report
from tests.export.report.report_samples import ALL, failing, lower_precision, passing, small_weights

VALIDATOR = jsonschema.Draft202012Validator(REPORT_SCHEMA)


@pytest.mark.parametrize("name", ALL)
def test_reports_follow_the_schema_and_come_back_from_json(name: str) -> None:
    report = ALL[name]()
    VALIDATOR.validate(json.loads(report.to_json()))
    assert Report.from_json(report.to_json()) == report
    assert report.passed == report.verdicts.passed == all(report.verdicts.to_dict().values())
    orders = [entry.order for entry in (*report.selection, *report.computation)]
    assert sorted(orders) == list(range(len(orders))), "one order of routers and tensors"


def test_schema_is_one_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(REPORT_SCHEMA)

    def fields(schema: dict[str, Any]) -> int:
        assert schema.get("description"), schema
        inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
        assert "properties" not in schema or schema["additionalProperties"] is False
        return 1 + sum(fields(field) for field in inner)

    assert fields(REPORT_SCHEMA) > 100


def test_what_may_be_absent_is_what_only_rounded_weights_bring() -> None:
    """Everything else is always there, null where it does not apply."""

    def absent(schema: dict[str, Any], path: str = "") -> list[str]:
        fields = {f"{path}/{name}": field for name, field in schema.get("properties", {}).items()}
        own = [name for name in fields if name.rpartition("/")[2] not in schema["required"]]
        inner = {**fields, **({path: schema["items"]} if "items" in schema else {})}
        return own + [name for place, field in inner.items() for name in absent(field, place)]

    assert absent(REPORT_SCHEMA) == ["/caches", "/activations", "/effect", "/verdicts/activations"]
    assert not {"activations", "effect"} & passing().to_dict().keys()
    assert {"activations", "effect"} <= small_weights().to_dict().keys()
    assert passing().to_dict()["failure"] is None


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r.update(schema=1), "2 was expected"),
        (lambda r: r.update(extra=1), "Additional properties"),
        (lambda r: r["selection"][0].pop("margins"), "'margins' is a required property"),
        (lambda r: r["selection"][0].update(level=3), "not one of"),
        (lambda r: r["selection"][0].update(exact_rate=1.1), "greater than the maximum"),
        (lambda r: r["words"][0].update(state="odd"), "not one of"),
        (lambda r: r.pop("failure"), "'failure' is a required property"),
        (lambda r: r.update(weights="int4"), "'activations' is a required property"),
        (lambda r: r["verdicts"].update(activations=True), "should not be valid"),
        (lambda r: r.update(model_sha256="abc"), "does not match"),
        (lambda r: r["end_to_end"]["greedy"].update(interval=[0.5]), "is too short"),
        (lambda r: r["data"].update(rows=None), "None is not of type 'integer'"),
    ],
)
def test_schema_refuses(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    report = passing().to_dict()
    change(report)
    assert any(words in error.message for error in VALIDATOR.iter_errors(report))


def test_a_number_that_is_not_finite_is_none_from_the_start() -> None:
    ends = failing().end_to_end
    forced = replace(ends.teacher_forced, kl_interval=(math.nan, -math.inf), kl_max=math.inf)
    report = replace(failing(), end_to_end=replace(ends, teacher_forced=forced))
    assert report.computation[-1].error is None and forced.kl_interval == (None, None) and forced.kl_max is None
    text = report.to_json()
    assert text.isascii() and "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["computation"][-1]["error"] is None
    VALIDATOR.validate(json.loads(text))


def test_verdict_is_what_a_bundle_records() -> None:
    report = lower_precision()
    verdict = report.verdict()
    assert verdict["verdicts"] == report.verdicts.to_dict() and verdict["passed"] and verdict["precision"] == "float16"
    assert verdict["data"] == {"source": "examples/model/heldout.txt", "tokens": 512, "rows": 2}
    assert verdict["routes_excused"] == sum(router.excused for router in report.selection) > 0
    assert verdict["largest_error"] == max(tensor.error or 0 for tensor in report.computation)
    assert verdict["kl_mean"] == report.end_to_end.teacher_forced.kl_mean
    assert failing().verdict()["largest_error"] is None, "an error that is not finite is the largest"
    json.dumps(verdict, allow_nan=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2, "extra": 1}', '{"schema": 2, "verdicts": 1}'])
def test_other_text_is_no_report(text: str) -> None:
    with pytest.raises(RequestError, match="this is no report of bilevel check .*; make one with: bilevel check --json"):
        Report.from_json(text)


def test_a_report_of_another_version_is_refused() -> None:
    text = passing().to_json().replace('"schema": 2', '"schema": 1', 1)
    with pytest.raises(RequestError, match="has version 1, this bilevel reads version 2; make it again"):
        Report.from_json(text)
