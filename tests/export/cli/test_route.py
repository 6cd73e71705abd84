"""``bilevel route`` on a tiny model: both methods, a kill in the middle, what is refused, and the way on to a bundle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bilevel.bundle.format import read_manifest
from bilevel.config_json import load_config
from bilevel.runtime.cli.main import main
from tests import ROOT
from tests.export.route.models import save_checkpoint, write_text

COMMON = ["--context", "640", "--share", "0.6", "--block-size", "16"]
GATE = [*COMMON, "--method", "gate", "--adapter", "--rows", "3", "--passes", "8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("route")
    write_text(folder / "text")
    return save_checkpoint(folder / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Gates trained in one go."""
    folder = base.with_name("adapter")
    assert main(["route", str(base), str(folder), *GATE, "--text", str(base.with_name("text"))]) == 0
    return folder


def test_bounds(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A routed checkpoint under the share, with its log; the command says what it cost and what comes next."""
    out, text = tmp_path / "routed", str(base.with_name("text"))
    assert main(["route", str(base), str(out), *COMMON, "--text", text]) == 0
    printed = capsys.readouterr().out
    assert "dense:" in printed and "routed:" in printed and f"next: bilevel export {out} my-bundle" in printed
    routing = load_config(out).routing
    assert routing.preset == "moba_gqa" and routing.key in ("bounds", "mean") and routing.block_size == 16
    log = json.loads((out / "log.json").read_text())
    assert log["share"] <= 0.6 and 8 < log["judgement"]["routed"]["asked"] <= 32 and len(log["calibration"]) > 1
    assert main(["route", str(base), str(out), *COMMON, "--text", text, "--json", "--key", "mean", "--force"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["routing"]["key"] == "mean" and told["share"] <= 0.6 and load_config(out).routing.key == "mean"


def test_gate_reports_its_training(adapter: Path) -> None:
    log = json.loads((adapter / "log.json").read_text())
    lines = log["training"]
    assert [line["update"] for line in lines] == [0, 12] and lines[-1]["loss"] > 0
    assert len(lines[-1]["needle_heads"]) == 3 and log["plan"]["rows"] == 3
    assert not adapter.with_name("adapter.work").exists()
    gates = load_file(adapter / "gates.safetensors")
    assert len(gates) == 4 * 3 and all(tensor.dtype.itemsize == 2 for tensor in gates.values())


def test_killed_and_started_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Killed while the teacher reads and while the gates learn, the run ends as if it had not been."""
    out, work = tmp_path / "adapter", tmp_path / "adapter.work"
    command = [sys.executable, "-m", "bilevel.runtime.cli.main", "route", str(base), str(out), *GATE]
    command += ["--text", str(base.with_name("text")), "--save-seconds", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for file in ("lessons/00004.safetensors", "state.pt"):
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while not (work / file).exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    assert main(command[3:]) == 0
    for name in ("gates.safetensors", "adapter.json"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    logs = [json.loads((folder / "log.json").read_text()) for folder in (out, adapter)]
    assert logs[0]["training"] == logs[1]["training"] and not work.exists()


def test_from_an_adapter(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gates are taken over, calibrated anew where a share is named; updates are learned on top, through a kill, and merged."""
    text = ["--text", str(base.with_name("text"))]
    common = ["--from", str(adapter), "--adapter", "--context", "320", *text]
    assert main(["route", str(base), str(tmp_path / "as it is"), *common]) == 0
    for name in ("gates.safetensors", "adapter.json"):
        assert (tmp_path / "as it is" / name).read_bytes() == (adapter / name).read_bytes()
    assert main(["route", str(base), str(tmp_path / "other"), *common, "--share", "0.6", "--words", "0.9"]) == 0
    other = json.loads((tmp_path / "other" / "adapter.json").read_text())["routing"]
    # Level 1 is taken over as well, whatever this run's text and the context that is named.
    again = ["--from", str(tmp_path / "other"), "--adapter", "--context", "330", "--share", "0.7", "--text", str(base.parent)]
    assert main(["route", str(base), str(tmp_path / "third"), *again]) == 0
    weights = [load_file(tmp_path / name / "gates.safetensors")["model.word_router.word_weight"] for name in ("other", "third")]
    assert torch.equal(*weights)
    assert other["preset"] == "two_level" and other["weighted_words"] and other["key"] == "gate"
    log = json.loads((tmp_path / "other" / "log.json").read_text())
    assert log["share"] <= 0.6 and log["training"] and "without words" in log["judgement"]

    tuned = [*common, "--tune", "4", "--save-seconds", "0"]
    assert main(["route", str(base), str(tmp_path / "tuned"), *tuned]) == 0
    assert not (tmp_path / "tuned.work").exists()
    capsys.readouterr()
    command = [sys.executable, "-m", "bilevel.runtime.cli.main", "route", str(base), str(tmp_path / "again"), *tuned]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "again.work" / "tune.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    other = tmp_path / "other text"
    other.mkdir()
    for file in base.with_name("text").iterdir():
        (other / file.name).write_text(file.read_text().replace("paper", "letter"))
    for change in (["--seed", "1"], ["--text", str(other)]):
        assert main([*command[3:], *change]) == 2
        assert "belongs to another run" in capsys.readouterr().err
    assert main(command[3:]) == 0
    updates = [load_file(tmp_path / name / "tuned.safetensors") for name in ("tuned", "again")]
    assert updates[0].keys() == updates[1].keys() and len(updates[0]) == 3 * 2 * 2
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in updates[0])
    log = json.loads((tmp_path / "tuned" / "log.json").read_text())
    assert [line["update"] for line in log["tuning"]["log"]] == [0, 1, 2, 3, 4, 4] and "untuned" in log["judgement"]
    assert main(["export", str(base), "--adapter", str(tmp_path / "tuned"), str(tmp_path / "bundle")]) == 0
    assert main(["route", str(base), str(tmp_path / "twice"), "--from", str(tmp_path / "tuned"), *text]) == 2
    assert "is tuned already" in capsys.readouterr().err


def test_tuning_without_gates(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any choice of blocks can be tuned; the whole checkpoint then holds the merged weights, and nothing else is touched."""
    text, out = ["--text", str(base.with_name("text"))], tmp_path / "routed"
    work = tmp_path / "routed.work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    command = ["route", str(base), str(out), "--context", "320", "--share", "0.6"]
    command += ["--block-size", "16", "--dense-layers", "1", "--key", "bounds", "--tune", "2", *text]
    assert main(command) == 2
    assert "holds something else; move it away" in capsys.readouterr().err
    (work / "thesis.txt").unlink()
    assert main(command) == 0
    before, after = load_file(base / "model.safetensors"), load_file(out / "model-00001-of-00001.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(3) for name in "qk"}


def test_another_plan_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unfinished run goes on under its own options only."""
    work = tmp_path / "adapter.work"
    work.mkdir()
    (work / "plan.json").write_text(json.dumps({"seed": 4, "precision": "float32"}))
    text = str(base.with_name("text"))
    assert main(["route", str(base), str(tmp_path / "adapter"), *GATE, "--text", text]) == 2
    assert "holds an unfinished run with another base" in capsys.readouterr().err


def test_to_a_bundle_and_its_check(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    assert main(["export", str(base), "--adapter", str(adapter), str(bundle)]) == 0
    printed = capsys.readouterr()
    assert f"--against {base} --adapter {adapter}" in printed.out and "warning" not in printed.err
    section = json.loads((adapter / "adapter.json").read_text())["routing"]
    assert json.loads((bundle / "config.json").read_text())["routing"] == section
    read_manifest(bundle)
    checked = ["check", str(bundle), "--against", str(base), "--tokens", "120", "--backend", "portable", "--summary"]
    assert main([*checked, "--adapter", str(adapter)]) == 0
    assert main(checked) == 2
    assert "was exported from a model of another configuration" in capsys.readouterr().err


def test_export_warns_of_an_untrained_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = save_checkpoint(tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "routing": {"preset": "moba", "block_size": 16, "topk": 4}}))
    assert main(["export", str(bare), str(tmp_path / "bundle")]) == 0
    assert f"bilevel route {bare} OUT" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--share", "0"], "--share 0.0 must be more than 0 and at most 1"),
        (["--method", "gate", "--rows", "0"], "--rows 0 must be at least 1"),
        (["--rows", "7"], "--rows 7 belongs to the training of --method gate"),
        (["--tune", "1", "--passes", "7"], "--passes 7 belongs to the training of --method gate"),
        (["--save-seconds", "3"], "--save-seconds 3.0 must be 0 or more, beside --method gate or --tune"),
        (["--from", "/nowhere", "--method", "bounds"], "--from takes the keys of the adapter"),
        (["--block-size", "-3"], "--block-size -3 must be at least 1"),
        (["--dense-layers", "a,b"], "--dense-layers a,b must be layers with commas between"),
        (["--dense-layers", "9"], "routing.dense_layers holds 9, but the layers are 0..2"),
        (["--method", "gate", "--key", "mean"], "--key mean belongs to --method bounds"),
        (["--tune", "-1"], "--tune -1 must be a number of texts"),
        (["--from", "/nowhere"], "/nowhere holds no adapter.json"),
        (["--from", "/nowhere", "--key", "mean"], "--from takes the keys of the adapter"),
        (["--context", "100000"], "--context 100000 exceeds the model's 1024 positions"),
        (["--text", "/nowhere"], "--text /nowhere is no file and no folder"),
    ],
)
def test_refusals(options: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = [] if "--text" in options else ["--text", str(base.with_name("text"))]
    assert main(["route", str(base), str(tmp_path / "out"), "--context", "640", "--share", "0.6", *text, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_routed_already(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routed = tmp_path / "routed"
    assert main(["route", str(base), str(routed), *COMMON, "--text", str(base.with_name("text"))]) == 0
    assert main(["route", str(routed), str(tmp_path / "again"), *COMMON]) == 2
    assert "is routed already" in capsys.readouterr().err
    assert main(["route", str(base), str(routed), *COMMON]) == 2
    assert "exists; choose another folder or replace it with --force" in capsys.readouterr().err
    assert main(["route", str(tmp_path / "gone"), str(tmp_path / "again")]) == 2
    assert "is no folder; give a checkpoint" in capsys.readouterr().err


def test_sizes_that_do_not_divide(base: Path, tmp_path: Path) -> None:
    """Texts are cut to whole blocks, in calibration, training and judgement."""
    text = ["--text", str(base.with_name("text"))]
    odd = ["--context", "700", "--share", "0.6", "--block-size", "24"]
    assert (
        main(
            [
                "route",
                str(base),
                str(tmp_path / "bounds"),
                *odd,
                *text,
                "--adapter",
                "--dense-layers",
                "none",
                "--key",
                "bounds",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "bounds" / "log.json").read_text())["context"] == 696
    assert (
        main(["route", str(base), str(tmp_path / "gate"), *odd, *text, "--method", "gate", "--rows", "2", "--passes", "1"]) == 0
    )


def test_nothing_of_the_users_is_lost(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the model that is read, nor what happens to lie where a run would keep its progress."""
    for out in (base, base.parent):
        assert main(["route", str(base), str(out), *COMMON, "--adapter", "--force"]) == 2
        assert "which would be lost; name another folder" in capsys.readouterr().err
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    text = ["--text", str(base.with_name("text"))]
    assert main(["route", str(base), str(tmp_path / "out"), *GATE, *text]) == 2
    assert "holds something else; move it away" in capsys.readouterr().err
    assert (work / "thesis.txt").read_text() == "years of work"
