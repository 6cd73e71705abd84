"""``bilevel quality`` from end to end on tiny bundles: tables, JSON, page, exit statuses, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from bilevel.bundle.records import read_record
from bilevel.config import Routing
from bilevel.config_json import load_config
from bilevel.export.route.adapter import TUNED, Adapter, base_sizes, save_adapter
from bilevel.runtime.cli import quality as cli
from bilevel.runtime.cli.main import main
from bilevel.runtime.quality.exams import LOSS, TASKS
from bilevel.runtime.quality.measure import Request
from bilevel.runtime.quality.model import DENSE, MASS, REPORT_SCHEMA, ROUTED, SIDES, WINDOW, QualityReport
from bilevel.runtime.quality.page import render_page
from tests.doubles.bundle import edit_manifest, write_bundle
from tests.runtime.quality.conftest import BLOCK, POSITIONS, TOPK
from tests.support.tiny_models import edit_config

QUICK = ["--quick", "--facts", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def run(long_bundle: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[QualityReport, str]:
    """One run with all sides: (the report, the page)."""
    checkpoint, bundle = long_bundle
    folder = tmp_path_factory.mktemp("run")
    files = ["--json", str(folder / "q.json"), "--html", str(folder / "q.html")]
    arguments = ["quality", str(bundle), *QUICK, "--lengths", "1k,1200", "--checkpoint", str(checkpoint), *files]
    assert main([*arguments, "--floor", "copy=0"]) in (0, 1)
    report = json.loads((folder / "q.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, REPORT_SCHEMA)
    record = read_record(QualityReport, report)
    assert record.to_dict() == report
    assert sorted(path.name for path in folder.iterdir()) == ["q.html", "q.json"]
    return record, (folder / "q.html").read_text(encoding="utf-8")


def test_all_sides_answer_everything(run: tuple[QualityReport, str]) -> None:
    report, _ = run
    assert [side.name for side in report.sides] == [ROUTED, DENSE, WINDOW, MASS] and report.not_measured == ()
    assert {(task.task, task.length) for task in report.tasks} == {(t, n) for t in TASKS if t != LOSS for n in (1024, 1200)}
    assert all(task.questions == 2 and len(task.scores) == 4 for task in report.tasks)
    assert len(report.answers) == 12
    assert report.loss is not None and report.loss.length == 1200 and len(report.loss.places) == 8
    assert report.loss.far_tokens, "random models differ by more than a tenth of a nat somewhere"
    assert [reading.length for reading in report.reading] == [1024, 1200]
    assert all(reading.share < 0.02 for reading in report.reading), "3 blocks of 4 tokens are read"
    assert report.recall is not None and report.recall.candidates is not None
    assert [layer.layer for layer in report.recall.layers] == [0, 1]
    assert all(layer.mass is not None and 0 <= layer.mass <= 1 for layer in report.recall.layers)


def test_page(run: tuple[QualityReport, str]) -> None:
    """Well-formed, self-contained, every picture with words; what a report says is text and never markup."""
    report, page = run
    pictures = re.findall(r'<svg [^>]*aria-label="([^"]+)"', page)
    assert len(pictures) == 6, "a heat map for each of four sides, loss, recall"
    assert not re.search(r"(src|href)=|<script|url\(", page)
    for name in ("routed", "dense", "sink + window", "true mass", "hidden facts", "key-value pairs", "rare strings"):
        assert name in page
    check_markup(page)
    hostile = read_record(QualityReport, {**report.to_dict(), "bundle": "<script>alert(1)</script>", "routing": '"><b>'})
    assert "<script" not in render_page(hostile) and '"><b>' not in render_page(hostile)


def check_markup(page: str) -> None:
    """Every element that is opened is closed, in order."""

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == []


def test_same_seed_same_numbers(long_bundle: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for index, seed in enumerate(("3", "3", "4")):
        path = tmp_path / f"{index}.json"
        arguments = ["quality", str(long_bundle[1]), *QUICK, "--lengths", "1k", "--tasks", "copy", "--seed", seed]
        assert main([*arguments, "--json", str(path)]) == 0
        answers.append(json.loads(path.read_text(encoding="utf-8"))["answers"])
    assert answers[0] == answers[1] != answers[2]
    assert "rare strings" in capsys.readouterr().out


def test_a_bundle_that_knows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The double finds nothing, has no twin and tells no routes: a sane report, and a floor that is missed."""
    bundle = write_bundle(tmp_path)
    edit_manifest(bundle, lambda manifest: manifest["limits"].update(max_positions=1200, prefill_chunk=64))
    arguments = ["quality", str(bundle), *QUICK, "--lengths", "1k", "--tasks", "needles,loss"]
    path = tmp_path / "q.json"
    assert main([*arguments, "--floor", "needles=0.5", "--floor", "recovered=0.1", "--json", str(path)]) == 1
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["passed"] is False and [floor["value"] for floor in report["floors"]] == [None, None]
    assert {note["name"] for note in report["not_measured"]} == {DENSE, WINDOW, MASS}
    assert report["recall"] is None and report["reading"] == []
    output = capsys.readouterr().out
    assert "0 of 2" in output and "floor needles=0.5 MISSED: -; not defined: dense was not measured" in output
    render_page(read_record(QualityReport, report))


def test_against_another_bundle(long_bundle: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle against itself costs nothing; one with another tokenizer is refused."""
    bundle = str(long_bundle[1])
    path = tmp_path / "q.json"
    arguments = ["quality", bundle, *QUICK, "--lengths", "1k", "--tasks", "copy"]
    assert main([*arguments, "--against", bundle, "--json", str(path)]) == 0
    routed, dense = json.loads(path.read_text(encoding="utf-8"))["tasks"][0]["scores"][:2]
    assert routed["nats"] == dense["nats"] and routed["nats_above"] == 0
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    edit_manifest(other, lambda manifest: manifest["files"]["tokenizer.json"].update(sha256="0" * 64))
    assert main([*arguments, "--against", str(other), "--no-verify"]) == 2
    assert "has another tokenizer than" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--floor", "facts=1"], "there is no floor 'facts'; take needles, pairs, copy, recovered, recall"),
        (["--floor", "needles"], "needs a number"),
        (["--tasks", "copy", "--floor", "pairs=1"], "takes the task pairs"),
        (["--tasks", "copies"], "there is no task 'copies'; take needles, pairs, copy, loss"),
        (["--lengths", "1000k"], f"1024000 tokens are more than this model's {POSITIONS} positions"),
        (["--lengths", "48"], "48 tokens are too few"),
        (["--facts", "0"], "--facts 0 must be at least 1"),
        (["--json", "nowhere/q.json"], "nowhere/q.json cannot be written: its folder is not there"),
        (["--html", "/"], "cannot be written: it is a folder"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--checkpoint", "nowhere"], "nowhere is no folder; give the checkpoint"),
    ],
)
def test_refusals(
    long_bundle: tuple[Path, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["quality", str(long_bundle[1]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_answers_as_its_bundle_does(
    long_bundle: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is exported for the time of the measurement, and the report calls it by its own name; the true mass comes along."""
    checkpoint, bundle = long_bundle
    reports = {}
    for subject in (bundle, checkpoint):
        path = tmp_path / "q.json"
        assert main(["quality", str(subject), *QUICK, "--lengths", "1k", "--tasks", "needles", "--json", str(path)]) == 0
        reports[subject] = json.loads(path.read_text(encoding="utf-8"))
    assert reports[checkpoint]["bundle"] == str(checkpoint)
    assert {side["folder"] for side in reports[checkpoint]["sides"]} == {str(checkpoint)}
    assert [side["name"] for side in reports[checkpoint]["sides"]] == [ROUTED, DENSE, WINDOW, MASS]
    exported, own = (reports[subject]["answers"] for subject in (bundle, checkpoint))
    for before, after in zip(exported, own, strict=True):
        assert after["nats"][:3] == pytest.approx(before["nats"], abs=1e-5)


@pytest.mark.thorough
def test_an_adapter_joins_the_checkpoint(
    exported: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both as the subject and as what the true mass is taken from; a checkpoint may also be what is compared with."""
    dense = Path(shutil.copytree(exported("dense")[0], tmp_path / "dense"))
    edit_config(dense, max_position_embeddings=POSITIONS)
    base = base_sizes(load_config(dense))
    adapter, path = tmp_path / "adapter", tmp_path / "q.json"
    save_adapter(Adapter(Routing(preset="moba_gqa", key="bounds", block_size=BLOCK, topk=TOPK), base), adapter)
    arguments = [*QUICK, "--lengths", "1k", "--tasks", "copy", "--json", str(path)]
    assert main(["quality", str(dense), "--adapter", str(adapter), "--against", str(dense), *arguments]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["routing"].startswith("moba_gqa: 3 blocks of 4") and report["bundle"] == f"{dense} --adapter {adapter}"
    assert [side["name"] for side in report["sides"]] == [ROUTED, DENSE, WINDOW, MASS]
    zeros = {f"model.layers.0.self_attn.q_proj.lora_{factor}.weight": torch.zeros(1, 1) for factor in "AB"}
    save_file(zeros, adapter / TUNED)
    made: list[tuple[Path, Path | None]] = []

    def export(source: Path, adapter: Path | None, on_stage: object) -> AbstractContextManager[tuple[Path, Path]]:
        made.append((source, adapter))
        return nullcontext((tmp_path / f"bundle {len(made)}", tmp_path / f"checkpoint {len(made)}"))

    with monkeypatch.context() as patch, ExitStack() as folders:
        patch.setattr("bilevel.export.quality.subject.exported", export)
        opened = cli._opened(Request(bundle=dense), adapter, folders, str)
        assert made == [(dense, adapter), (dense, None)], "a tuned model is compared with the one before"
        assert opened.against == tmp_path / "bundle 2" and opened.name(opened.against) == str(dense)
    (adapter / TUNED).unlink()
    bundle = exported("dense")[1]
    with ExitStack() as folders:
        opened = cli._opened(Request(bundle=bundle, checkpoint=dense), adapter, folders, str)
        assert opened.checkpoint is not None and load_config(opened.checkpoint).routing.topk == TOPK
        assert opened.name(opened.checkpoint) == f"{dense} --adapter {adapter}"
    assert main(["quality", str(bundle), "--adapter", str(adapter)]) == 2
    assert "belongs to a checkpoint" in capsys.readouterr().err
    assert main(["quality", str(dense), "--checkpoint", str(dense)]) == 2
    assert "is a checkpoint itself" in capsys.readouterr().err


def test_bad_lengths(long_bundle: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("1x", "", "0", "1k,,2k"):
        with pytest.raises(SystemExit, match="2"):
            main(["quality", str(long_bundle[1]), "--lengths", text])
        assert "is no number of tokens" in capsys.readouterr().err


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["quality", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*TASKS, *SIDES, "recovered", "needles=0.9"))


def test_remaining_time() -> None:
    assert cli.remaining(10, 1, 4) == "30 s" and cli.remaining(60, 100, 400) == "3 min"


def test_against_a_shorter_bundle(long_bundle: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(long_bundle[1], tmp_path / "other"))
    edit_manifest(other, lambda manifest: manifest["limits"].update(max_positions=1000))
    assert main(["quality", str(long_bundle[1]), "--lengths", "1k", "--against", str(other)]) == 2
    assert f"1024 tokens are more than {other} holds; give lengths up to 1000" in capsys.readouterr().err
