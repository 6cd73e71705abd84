"""The report in the terminal, and the words and numbers that it shares with the page."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bilevel.export.report.judgements import TensorResult
from bilevel.export.report.summary import (
    by_part,
    percent,
    scientific,
    short,
    shorten,
    verdict_lines,
    visible,
    worst,
)
from bilevel.export.report.terminal import print_report, print_summary
from tests.export.report.report_samples import ALL, changed, deep, failing, passing


@pytest.mark.parametrize("name", ALL)
def test_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = ALL[name]()
    print_report(report)
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == f"parity {'holds' if report.passed else 'FAILS'} (41.3 s)"
    assert "\x1b" not in out and "\u202e" not in out
    for entry in report.structure:
        assert entry.name in out
    print_summary(report)
    summary = capsys.readouterr().out.splitlines()
    lines = [line for line in verdict_lines(report) if line.key != "structure" or not line.passed]
    assert len(summary) == len(lines) + (report.effect is not None) + (report.failure is not None)
    for line, shown in zip(lines, summary, strict=False):
        assert shown.startswith(f"{line.title:12} {'pass' if line.passed else 'FAIL'}  ")


def test_summary_of_a_passing_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = passing()
    print_summary(report)
    selection, computation, ends, invariants = capsys.readouterr().out.splitlines()
    assert selection == "selection    pass  12285 choices of 9 routers: 0 wrong, 0 excused at a near-tie"
    tensor = max(report.computation, key=lambda tensor: tensor.error)
    assert computation == f"computation  pass  largest error {tensor.error:.1e} of the largest magnitude ({tensor.name})"
    assert ends == "end to end   pass  KL 2.8e-13 nats a token, greedy text 256 of 256 tokens equal"
    assert invariants.startswith("invariants   pass  all 4 hold: all blocks kept equals dense, ")


def test_failing_report_ends_with_where_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    report = failing()
    print_report(report)
    out = capsys.readouterr().out
    for entry in report.computation:
        assert (f"│ {entry.name} " in out.split("Tensors beyond")[1].split("End to end")[0]) is not entry.passed
    block = out.split("Where it starts")[1]
    for words in (
        "layer 3 level 2 (FineRoute)",
        "layer_3/route/Sub_41",
        "66 tokens in calls of 33, 33",
        "PyTorch keeps blocks [0, 2]",
    ):
        assert words in block
    assert out.index("Invariants") < out.index("Selection") < out.index("Where it starts")


def test_passing_sections_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    report = failing()
    verdicts = replace(report.verdicts, computation=True, end_to_end=True, invariants=True)
    print_report(replace(report, verdicts=verdicts))
    out = capsys.readouterr().out
    assert out.index("End to end") < out.index("Selection") < out.index("Where it starts")


def test_many_layers_take_few_rows(capsys: pytest.CaptureFixture[str]) -> None:
    report = deep()
    print_report(report)
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 60
    router = report.selection[20]
    selection = changed(report.selection, router.name, unexcused=4, passed=False, example="row 3: other blocks")
    print_report(replace(report, selection=selection))
    out = capsys.readouterr().out
    assert f"│ {router.name} " in out.split("Routers that choose wrongly")[1] and "row 3: other blocks" in out


def test_numbers_in_words() -> None:
    assert [scientific(value) for value in (0, 1.63e-6, None, math.inf)] == ["0", "1.6e-06", "not finite", "not finite"]
    assert [short(value, "-") for value in (1.63e-6, 0.182, 4.13, 123.4, 2e5, None)] == [
        "1.6e−6",
        "0.18",
        "4.1",
        "123",
        "2.0e5",
        "-",
    ]
    assert shorten("error 4.1e-07, 1e+05 allowed, model-1e") == "error 4.1e−7, 1e5 allowed, model-1e"
    assert [percent(rate) for rate in (1, 0.999999, 0.9993, 0.5, 0, None)] == [
        "100 %",
        "99.99 %",
        "99.93 %",
        "50.0 %",
        "0.0 %",
        "-",
    ]


def test_visible() -> None:
    assert visible("a\x00\x1b\x7f\r\n\t\ud800\u202eb") == "a␀␛␡␍\n\t\ufffd\ufffdb"
    assert visible("a\n\tb", newlines=False) == "a␤␉b"


def test_the_worst_is_the_first_that_fails_or_the_nearest_to_its_limit() -> None:
    def tensor(order: int, error: float | None, limit: float | None, passed: bool) -> TensorResult:
        return replace(passing().computation[0], order=order, error=error, limit=limit, passed=passed)

    tensors = [tensor(3, 0.5, 1.0, True), tensor(4, 0.2, 0.25, True), tensor(5, 99.0, None, True)]
    assert worst(tensors).order == 4
    tensors += [tensor(9, 9.0, 1.0, False), tensor(7, None, 1.0, False)]
    assert worst(tensors).order == 7
    selection = passing().selection
    selection = changed(selection, selection[4].name, excused=1)
    assert worst(selection) is selection[4]
    assert next(iter(by_part(passing().computation))) == "embedding"
