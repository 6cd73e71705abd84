"""``bilevel check`` finds every planted fault where it starts and passes every harmless change.

pytest tests/export/check/test_faults.py -q      # ends with the two rates
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.export.check.parity import check_bundle
from bilevel.export.report.model import Report
from bilevel.plugins.library.cpu import VARIABLE, find_cpu_library
from tests.export.check.faults import GRAPH_FAULTS, TOKENS, Fault
from tests.export.check.faults_bodies import BODY_FAULTS, KERNEL_FAULTS, KernelFault
from tests.export.check.harmless import HARMLESS, periodic_text
from tests.export.check.surgery import Compiler, Kernel, edit_model
from tests.support.cpu_library import required_library

Copied = Callable[..., tuple[Path, Path]]
Built = Callable[[Kernel], Path]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """kernel -> the CPU library with this change."""
    required_library()  # says what is missing where there is no compiler
    compiler = Compiler(tmp_path_factory.mktemp("kernels"))
    return compiler.build


def assert_found(report: Report, fault: Fault | KernelFault, execution: str | None = None) -> None:
    """The report says that it starts where the fault was planted."""
    assert not report.passed
    failure = report.failure
    if failure is None:  # PyTorch has nothing to compare with: what must hold anyway does not
        (broken,) = (entry for entry in report.invariants if not entry.passed)
        assert broken.name == fault.at and f" {fault.operator}, {execution})" in broken.detail
        return
    assert (failure.name, failure.operator) == (fault.at, fault.operator)
    if execution is not None:
        assert failure.execution == execution


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_fault_in_a_graph(copied: Copied, name: str) -> None:
    """Both executions read the same wrong graph; the quicker one will do."""
    fault = GRAPH_FAULTS[name]
    checkpoint, bundle = copied(fault.model)
    edit_model(bundle, fault.plant, fault.weights)
    backend = "all" if find_cpu_library() is None else "kernels"
    assert_found(check_bundle(bundle, checkpoint, tokens=fault.tokens, backend=backend, shrink=False), fault)


@pytest.mark.parametrize("name", BODY_FAULTS)
def test_fault_in_a_body(copied: Copied, name: str) -> None:
    fault = BODY_FAULTS[name]
    checkpoint, bundle = copied(fault.model)
    if fault.prepare is not None:
        fault.prepare(checkpoint, bundle)
        assert check_bundle(bundle, checkpoint, tokens=fault.tokens).passed
    edit_model(bundle, fault.plant)
    assert_found(check_bundle(bundle, checkpoint, tokens=fault.tokens, shrink=False), fault, "bodies")


@pytest.mark.parametrize("name", KERNEL_FAULTS)
def test_fault_in_a_kernel(copied: Copied, built: Built, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fault = KERNEL_FAULTS[name]
    checkpoint, bundle = copied(fault.model)
    monkeypatch.setenv(VARIABLE, str(built(fault.kernel)))
    assert_found(check_bundle(bundle, checkpoint, tokens=TOKENS, shrink=False), fault, "CPU kernels")


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_change(copied: Copied, built: Built, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    change = HARMLESS[name]
    checkpoint, bundle = copied(change.model, "fp32", change.precision)
    if change.files is not None:
        change.files(checkpoint, bundle)
    if change.edit is not None:
        edit_model(bundle, change.edit, change.weights)
    if change.kernel is not None:
        monkeypatch.setenv(VARIABLE, str(built(change.kernel)))
    data = periodic_text(bundle) if change.periodic else None
    with change.around():
        report = check_bundle(bundle, checkpoint, tokens=TOKENS, data=data, shrink=False, **change.arguments)
    assert report.passed, report.failure or report.end_to_end
    if not change.excused:
        return
    (router,) = (entry for entry in report.selection if entry.name == change.excused)
    assert router.excused > 0 and router.exact_rate < 1
