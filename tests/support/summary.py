"""What the tests' last lines say besides pytest's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest


def skip_reasons(reports: Iterable[pytest.TestReport | pytest.CollectReport]) -> Counter[str]:
    """How many tests, or files of tests, were skipped for each reason."""
    reasons = (report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in reports)
    return Counter(reason.removeprefix("Skipped: ") for reason in reasons)


def fault_rates(terminalreporter: pytest.TerminalReporter) -> str:
    """The two rates of the planted-fault suite (``tests/export/check/test_faults.py``); "" where it did not run."""
    rates = []
    for test, sentence in (
        ("test_fault_", "faults: {} of {} found at the right place"),
        ("test_harmless_", "harmless: {} of {} pass"),
    ):
        ran = {
            outcome: {r.nodeid for r in terminalreporter.getreports(outcome) if f"test_faults.py::{test}" in r.nodeid}
            for outcome in ("passed", "failed", "error")
        }
        wrong = ran["failed"] | ran["error"]
        if ran["passed"] or wrong:
            rates.append(sentence.format(len(ran["passed"] - wrong), len(ran["passed"] | wrong)))
    return "; ".join(rates)
