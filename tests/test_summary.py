"""The last lines of a run of the tests."""

from __future__ import annotations

import pytest

from tests.support.summary import skip_reasons


def test_skips_are_counted_by_reason() -> None:
    """Of tests (skipped where they are marked or in their body) and of whole files alike."""
    where = ("tests/x.py", 3)
    test = {"location": ("tests/x.py", 3, "test"), "keywords": {}, "outcome": "skipped", "when": "setup"}
    reports: list[pytest.TestReport | pytest.CollectReport] = [
        pytest.TestReport(nodeid="a", longrepr=(*where, "Skipped: no GPU"), **test),  # type: ignore[arg-type]
        pytest.TestReport(nodeid="b", longrepr=(*where, "Skipped: no GPU"), **test),  # type: ignore[arg-type]
        pytest.CollectReport("c", "skipped", (*where, "Skipped: Ray is not installed"), []),
    ]
    assert skip_reasons(reports) == {"no GPU": 2, "Ray is not installed": 1}
