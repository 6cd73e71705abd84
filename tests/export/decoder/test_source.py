"""What bilevel export takes as a model: a folder, a GGUF file, a name on the Hugging Face Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from bilevel.errors import BilevelError, CheckpointError, ExportError, MissingDependency
from bilevel.export.decoder.source import checkpoint_folder
from bilevel.runtime.cli.main import main
from bilevel.runtime.generate.generator import Generator
from tests import ROOT
from tests.support.gguf_files import byte_level_vocabulary, write_model


def resolve(source: Path, beside: Path) -> Path:
    with checkpoint_folder(source, beside, lambda stage: None) as folder:
        return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path, tmp_path / "bundle") == tmp_path


def test_a_gguf_file_is_exported_in_one_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bundle as from the imported checkpoint, and nothing else is left."""
    (tmp_path / "one").mkdir()
    write_model(tmp_path / "m.gguf", "llama", byte_level_vocabulary("qwen2"), "Q8_0")
    assert main(["export", str(tmp_path / "m.gguf"), str(tmp_path / "one" / "bundle")]) == 0
    output = capsys.readouterr().out
    assert f"next: bilevel import {tmp_path / 'm.gguf'} my-checkpoint, and bilevel check" in output
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["bundle"]
    assert main(["import", str(tmp_path / "m.gguf"), str(tmp_path / "checkpoint")]) == 0
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "bundle")]) == 0
    for name in ("model.onnx", "head.onnx", "model.data", "tokenizer.json", "tokenizer_config.json", "bundle.json"):
        assert (tmp_path / "one" / "bundle" / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes(), name
    # <|im_end|> by name, <|endoftext|> because it is a control token.
    generator = Generator.open(tmp_path / "bundle")
    assert generator.session.bundle.eos == (2, 0)
    (completion,) = generator.generate(["The quick"]).finish()
    assert completion.num_prompt_tokens > 2 and completion.token_ids


def test_a_bad_gguf_file_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert main(["export", str(tmp_path / "m.gguf"), str(tmp_path / "bundle")]) == 2
    assert "m.gguf is truncated or damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_existing_bundle_is_refused_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: pytest.fail("downloaded"))
    assert main(["export", "org/name", str(tmp_path / "bundle")]) == 2
    assert "exists; choose another folder or replace it with --force" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["none", "a/b/c", "/none/at/all", "tests/none"])
def test_neither_folder_nor_file_nor_name(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path into a folder that is there is no name on the Hub."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        ExportError, match=r"is no folder and no file; give a checkpoint folder .*, a \.gguf file, or a model's name"
    ):
        resolve(Path(source), tmp_path / "bundle")


def test_a_name_on_the_hub_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(Path("org/name-1.5B"), tmp_path / "bundle") == tmp_path
    ((name, options),) = asked
    assert name == "org/name-1.5B"
    assert {"*.json", "*.safetensors"} <= set(options["allow_patterns"]) and "*.bin" not in options["allow_patterns"]


def answer(status: int) -> Any:
    """What the Hub's client raises its errors with."""
    import httpx2 as httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    "failure, expected",
    [
        (
            lambda: errors.LocalEntryNotFoundError("x"),
            "is not in the local cache and the Hugging Face Hub cannot be reached; connect",
        ),
        (
            lambda: errors.RepositoryNotFoundError("x", response=answer(404)),
            "is not on the Hugging Face Hub, or is private; check the",
        ),
        (
            lambda: errors.GatedRepoError("x", response=answer(403)),
            "asks for its terms to be accepted; accept them on its page",
        ),
        (
            lambda: errors.HfHubHTTPError("500 broken\nmore", response=answer(500)),
            r"could not be downloaded \(500 broken\); try again",
        ),
        (lambda: OSError("disk full"), r"could not be downloaded \(disk full\); try again"),
    ],
)
def test_a_download_that_fails(
    failure: Callable[[], Exception], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(name: str, **options: Any) -> str:
        raise failure()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=f"org/name is no local folder and {expected}") as refused:
        resolve(Path("org/name"), tmp_path / "bundle")
    assert "\n" not in str(refused.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r"huggingface_hub is not installed: pip install 'bilevel\[hub\]'"):
        resolve(Path("org/name"), tmp_path / "bundle")
    assert issubclass(MissingDependency, BilevelError)


def test_the_local_cache_is_enough_offline(tmp_path: Path) -> None:
    """With HF_HOME and no network: a model that is in the cache is found, another is refused in one sentence."""
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    program = (
        "import sys; from pathlib import Path; from bilevel.export.decoder.source import checkpoint_folder\n"
        "with checkpoint_folder(Path(sys.argv[1]), Path('bundle'), print) as folder: print(folder)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE", None)
    results = [
        subprocess.run(
            [sys.executable, "-c", program, name], check=False, capture_output=True, text=True, env=environment, cwd=ROOT
        )
        for name in ("org/name", "org/other")
    ]
    assert results[0].stdout.splitlines() == ["downloading org/name", str(cached / "snapshots" / "abc")]
    assert (
        "CheckpointError: org/other is no local folder and is not in the local cache and the Hugging Face Hub"
        in results[1].stderr
    )
