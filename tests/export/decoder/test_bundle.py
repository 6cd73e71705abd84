"""``export_bundle`` and the two commands: what a bundle holds, and that whatever goes wrong nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

from bilevel.bundle.chat import read_sources
from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.config_json import load_config
from bilevel.errors import ExportError
from bilevel.export.decoder import bundle as bundle_module
from bilevel.export.decoder.bundle import describe_file, export_bundle
from bilevel.export.decoder.decoder import state_tensors
from bilevel.runtime.cli.main import main
from tests import ROOT
from tests.doubles.bundle import edit_manifest, make_tokenizer
from tests.support.tiny_models import BLOCK_SIZE, PREFILL_CHUNK, edit_config, save_checkpoint

Exported = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def checkpoint(exported: Exported, tmp_path: Path) -> Path:
    """A checkpoint of one's own."""
    return Path(shutil.copytree(exported("moba")[0], tmp_path / "checkpoint"))


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    """Its bundle."""
    return Path(shutil.copytree(exported("moba")[1], tmp_path / "bundle"))


@pytest.fixture
def plain(exported: Exported, tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoint and bundle of a dense model, which takes half the time: it has no twin."""
    checkpoint, bundle = exported("dense")
    return Path(shutil.copytree(checkpoint, tmp_path / "plain")), Path(shutil.copytree(bundle, tmp_path / "plain-bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# What a bundle holds


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_export_bundle_is_what_the_runtime_reads(exported: Exported, preset: str) -> None:
    checkpoint, folder = exported(preset)
    bundle = load_bundle(folder)
    config = load_config(checkpoint)
    twin = [] if preset == "dense" else ["dense.onnx"]
    assert sorted(bundle.files) == ["config.json", *twin, "head.onnx", "model.data", "model.onnx", "tokenizer.json"]
    for name, record in bundle.files.items():
        assert describe_file(folder / name) == {"sha256": record.sha256, "bytes": record.num_bytes}
    assert load_config(folder) == config
    assert (folder / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert (bundle.block_size, bundle.prefill_chunk, bundle.max_positions) == (BLOCK_SIZE, PREFILL_CHUNK, 96)
    assert (bundle.bos, bundle.eos, bundle.vocab_size, bundle.precision) == (None, (1,), config.vocab_size, "float32")
    two_level = {"CoarseRoute", "FineRoute", "RoutedAttention", "ExpertRoute", "RoutedExperts"}
    assert (
        set(bundle.graph.operators)
        == {"two_level": two_level, "moba": {"CoarseRoute", "RoutedAttention"}, "dense": set()}[preset]
    )
    assert [spec.name for spec, _ in bundle.graph.state] == [f"past.{tensor.name}" for tensor in state_tensors(config)]
    assert [output for _, output in bundle.graph.state] == [f"present.{tensor.name}" for tensor in state_tensors(config)]
    for spec, tensor in zip([spec for spec, _ in bundle.graph.state], state_tensors(config), strict=True):
        assert spec.shape == tensor.shape
    assert bundle.checks == ()


def test_export_bundle_end_tokens_of_the_generation_config(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "TWIN_PRECISIONS", ())  # the twin has no part in it, and takes as long as the rest
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 7]}', encoding="utf-8")
    steps: list[str] = []
    report = export_bundle(checkpoint, tmp_path / "new" / "bundle", on_stage=steps.append)
    assert steps[0] == f"loading {checkpoint}"
    assert steps[1:] == ["tracing and translating to ONNX", "storing the weights", "writing the bundle"]
    assert load_bundle(report.path).eos == (1, 7) and report.operators == {"CoarseRoute": 2, "RoutedAttention": 2}
    assert report.size_bytes == sum(len(data) for name, data in contents(report.path).items() if name != "bundle.json")


def test_named_chat_templates_go_into_the_bundle(tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "bundle"
    (checkpoint / "additional_chat_templates").mkdir(parents=True)
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (checkpoint / name).write_text(name, encoding="utf-8")
    (checkpoint / "tokenizer.json").write_text(make_tokenizer().to_str(), encoding="utf-8")
    for name, data in bundle_module._read_tokenizer(checkpoint).items():
        (folder / name).write_bytes(data)
    expected = {"default": "chat_template.jinja", "rag": "additional_chat_templates/rag.jinja"}
    assert read_sources(folder).templates == read_sources(checkpoint).templates == expected


# What is refused before any work


def refuse(checkpoint: Path, bundle: Path, message: str, **options: Any) -> None:
    """The export is refused, and leaves everything as it was."""
    before = contents(bundle) if bundle.is_dir() else None
    with pytest.raises(ExportError, match=message):
        export_bundle(checkpoint, bundle, **options)
    assert (contents(bundle) if bundle.is_dir() else None) == before
    assert not hidden(bundle.parent)


def test_export_bundle_refuses_existing_bundle(checkpoint: Path, bundle: Path) -> None:
    refuse(checkpoint, bundle, "exists; choose another folder or replace it with --force")


def test_export_bundle_force_spares_what_is_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work", encoding="utf-8")
    refuse(checkpoint, folder, "is no bundle .*move it away", force=True)
    refuse(checkpoint, folder / "chapter.txt", "is no bundle .*move it away", force=True)


def test_export_bundle_refuses_checkpoint_without_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    refuse(checkpoint, tmp_path / "new", "no tokenizer.json.*save_pretrained")


@pytest.mark.parametrize("chunk", [0, -1])
def test_export_bundle_refuses_prefill_chunk(checkpoint: Path, tmp_path: Path, chunk: int) -> None:
    refuse(checkpoint, tmp_path / "new", f"prefill_chunk={chunk} must be at least 1", prefill_chunk=chunk)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'], ids=["damaged", "a list", "a string"])
def test_export_bundle_refuses_generation_config(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(bundle_module, "load_model", None)  # before the model is loaded
    (checkpoint / "generation_config.json").write_text(text, encoding="utf-8")
    refuse(
        checkpoint, tmp_path / "new", "generation_config.json is (not valid JSON .*|no JSON object); write it anew or delete it"
    )


# What goes wrong on the way


def test_export_bundle_force_replaces(plain: tuple[Path, Path]) -> None:
    checkpoint, bundle = plain
    (bundle / "engines").mkdir()
    (bundle / "engines" / "old").touch()
    export_bundle(checkpoint, bundle, force=True, prefill_chunk=8)
    assert load_bundle(bundle).prefill_chunk == 8
    assert not (bundle / "engines").exists() and not hidden(bundle.parent)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", [(onnx_ir, "save"), (Path, "write_bytes"), (Path, "write_text")], ids=lambda f: f[1])
def test_export_bundle_full_disk(plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, failing: tuple[Any, str]) -> None:
    checkpoint, bundle = plain
    if failing[0] is Path:  # nothing slow has to run before these
        monkeypatch.setattr(bundle_module, "save_decoder", lambda model, path, **_: path.touch())
    monkeypatch.setattr(*failing, no_space)
    refuse(checkpoint, bundle, "could not be written .No space left on device.; free some space", force=True)


def test_export_bundle_interrupted(plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C half way through."""
    checkpoint, bundle = plain

    def interrupt(model: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a graph")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_module, "save_decoder", interrupt)
    before = contents(bundle)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, bundle, force=True)
    assert contents(bundle) == before and not hidden(bundle.parent)
    assert main(["export", str(checkpoint), str(bundle), "--force"]) == 130
    assert contents(bundle) == before and not hidden(bundle.parent)


def start_export(checkpoint: Path, bundle: Path, setup: str = "") -> subprocess.Popen[str]:
    """The command in a process of its own; ``setup`` is Python that runs first."""
    code = f"import sys\n{setup}\nfrom bilevel.runtime.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "export", str(checkpoint), str(bundle), "--force"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_export_command_on_a_disk_that_takes_no_more(plain: tuple[Path, Path]) -> None:
    """A real failure of write(2): files of at most 16 KiB, less than the weights."""
    checkpoint, bundle = plain
    before = contents(bundle)
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nsize = 16384\n"
    process = start_export(checkpoint, bundle, limit + "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = errors.strip().splitlines()
    assert line.startswith("bilevel: error: ") and "could not be written (File too large)" in line
    assert contents(bundle) == before and not hidden(bundle.parent)


def test_export_command_killed(plain: tuple[Path, Path]) -> None:
    """SIGKILL in the middle leaves the old bundle whole; the next command that reads it removes what the killed one left."""
    checkpoint, bundle = plain
    before = contents(bundle)
    process = start_export(checkpoint, bundle)
    deadline = time.monotonic() + 60
    while not hidden(bundle.parent) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert contents(bundle) == before
    assert len(hidden(bundle.parent)) == 1, "it was killed in the middle"
    assert load_bundle(bundle) and not hidden(bundle.parent)


# The commands


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The command ends with status 2 and one sentence that holds all the parts."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("bilevel: error: ") and captured.out == ""
    for part in parts:
        assert part in line


def test_export_command_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fail(
        ["export", str(tmp_path / "none"), str(tmp_path / "b")],
        capsys,
        "none is no folder and no file; give a checkpoint folder",
    )
    (tmp_path / "empty").mkdir()
    fail(["export", str(tmp_path / "empty"), str(tmp_path / "b")], capsys, "config.json does not exist")


@pytest.mark.parametrize("kept", [0, 100, -8], ids=["empty", "header cut", "last tensor cut"])
def test_export_command_damaged_weights(checkpoint: Path, capsys: pytest.CaptureFixture[str], kept: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fail(["export", str(checkpoint), str(checkpoint.parent / "new")], capsys, "model.safetensors is damaged or truncated")
    assert not (checkpoint.parent / "new").exists() and not hidden(checkpoint.parent)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"routing": {"preset": "two_level", "topk": 9, "coarse_topk": 8}}, "topk=9 (level 2) exceeds coarse_topk=8"),
        ({"routing": {"topk": 3841}}, "exceeds 3840, the most that TensorRT's TopK can keep; use larger blocks or keep fewer"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 is not divisible by num_key_value_heads=2"),
        ({"routing": {"block_sise": 4}}, "the unknown key routing.block_sise (did you mean block_size?)"),
        ({"head_mixing": 4}, "unknown key 'head_mixing'"),
    ],
    ids=["K2 over K1", "K over 3840", "heads not divisible", "unknown routing key", "unknown key"],
)
def test_export_command_bad_config(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], part: str
) -> None:
    edit_config(checkpoint, **changes)
    fail(["export", str(checkpoint), str(checkpoint.parent / "new")], capsys, part)


def test_export_command_existing_bundle(checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fail(["export", str(checkpoint), str(bundle)], capsys, "exists; choose another folder or replace it with --force")


def test_export_command_prints_what_it_did(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundle_module, "TWIN_PRECISIONS", ())
    assert main(["export", str(checkpoint), str(tmp_path / "new"), "--json", "--prefill-chunk", "8"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bundle"] == str(tmp_path / "new") and report["operators"] == {"CoarseRoute": 2, "RoutedAttention": 2}


CHECK = ["--tokens", "40"]


@pytest.mark.parametrize("form", [[], ["--summary"], ["--json"]], ids=["tables", "summary", "json"])
def test_check_command_passes(checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str], form: list[str]) -> None:
    assert main(["check", str(bundle), "--against", str(checkpoint), *CHECK, *form]) == 0
    out = capsys.readouterr().out
    if form == ["--json"]:
        assert json.loads(out)["passed"]
    else:
        assert "pass" in out and "FAIL" not in out


def test_check_command_fails_with_status_1(checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are not the checkpoint's: half of model.data's embedding is zero."""
    data = bytearray((bundle / "model.data").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (bundle / "model.data").write_bytes(data)
    edit_manifest(bundle, lambda m: m["files"].update({"model.data": describe_file(bundle / "model.data")}))
    assert main(["check", str(bundle), "--against", str(checkpoint), *CHECK]) == 1
    assert "parity FAILS" in capsys.readouterr().out
    assert [verdict["passed"] for verdict in load_bundle(bundle).checks] == [False]


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "config.json", "tokenizer.json"])
def test_check_command_tampered_file(checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    fail(["check", str(bundle), "--against", str(checkpoint)], capsys, f"{name} is missing or not the file that was exported")


def test_check_command_truncated_graph(checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where bundle.json agrees with the damaged file."""
    path = bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    edit_manifest(bundle, lambda m: m["files"].update({"model.onnx": describe_file(path)}))
    fail(["check", str(bundle), "--against", str(checkpoint), *CHECK], capsys, "model.onnx", "export it again")


def test_check_command_another_model(exported: Exported, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = exported("dense")[0]
    fail(
        ["check", str(bundle), "--against", str(other)], capsys, "another configuration; give the checkpoint that it came from"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [(b"caf\xe9 " * 99, "is not UTF-8 text (byte 3); convert it first"), (b"short", "but 40 are to be checked; give a longer")],
    ids=["not UTF-8", "too short"],
)
def test_check_command_bad_data(
    checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str], text: bytes, part: str
) -> None:
    path = bundle.parent / "text.txt"
    path.write_bytes(text)
    fail(["check", str(bundle), "--against", str(checkpoint), *CHECK, "--data", str(path)], capsys, part)


@pytest.mark.parametrize(
    ("manifest", "part"),
    [
        (None, "is not a bundle (it has no bundle.json); make one: bilevel export"),
        ("{", "bundle.json is not valid JSON"),
        ("[]", "bundle.json holds [], which must be an object; make the bundle anew"),
        (
            '{"format": "bilevel-bundle", "format_version": 2}',
            "it has format bilevel-bundle version 2, this bilevel reads bilevel-bundle version 1",
        ),
        ('{"format": "bilevel-bundle", "format_version": 1}', "bundle.json does not give files; make the bundle anew"),
    ],
    ids=["missing", "damaged", "a list", "another version", "incomplete"],
)
def test_check_command_bad_manifest(
    checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str], manifest: str | None, part: str
) -> None:
    (bundle / "bundle.json").unlink()
    if manifest is not None:
        (bundle / "bundle.json").write_text(manifest, encoding="utf-8")
    fail(["check", str(bundle), "--against", str(checkpoint)], capsys, part)


def test_check_command_contradictory_options(checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fail(["check", str(bundle), "--against", str(checkpoint), "--summary", "--json"], capsys, "exclude each other")
    fail(["check", str(bundle / "x"), "--against", str(checkpoint)], capsys, "is no folder; make a bundle with")
    fail(["check", str(bundle), "--against", str(checkpoint / "x")], capsys, "is no folder; give the checkpoint")


def test_saved_checkpoint_is_the_one_that_loads(tmp_path: Path) -> None:
    """The fixture itself: what the tests export is a checkpoint as users have them."""
    assert load_model(save_checkpoint(tmp_path / "checkpoint")).config.experts is not None
