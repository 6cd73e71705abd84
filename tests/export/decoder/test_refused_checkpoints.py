"""Checkpoints that could not run, or that reach outside of themselves, are refused before anything is traced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import BilevelError
from bilevel.export.decoder import bundle as exporter
from bilevel.export.decoder.bundle import export_bundle

Copied = Callable[..., tuple[Path, Path]]


@pytest.fixture
def checkpoint(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that nothing is traced of."""
    checkpoint, _ = copied("two_level")

    def trace(*_: Any) -> None:
        pytest.fail("it was taken")

    monkeypatch.setattr(exporter, "_save_graphs", trace)
    return checkpoint


def refuse(checkpoint: Path, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(BilevelError, match=message):
        export_bundle(checkpoint, out, **options)
    assert not out.exists()


def change(path: Path, *keys: str, value: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    holder = content
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": {"vocab": {}}}'])
def test_a_tokenizer_that_is_none(content: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text(content, encoding="utf-8")
    refuse(checkpoint, tmp_path / "out", r"tokenizer\.json is no tokenizer .*; write it with transformers")


@pytest.mark.parametrize(
    "keys",
    [
        ("routing", "block_size"),
        ("max_position_embeddings",),
        ("num_hidden_layers",),
        ("routing", "window"),
        ("routing", "route_dim"),
        ("vocab_size",),
        ("hidden_size",),
    ],
    ids=".".join,
)
def test_sizes_that_nothing_has(keys: tuple[str, ...], checkpoint: Path, tmp_path: Path) -> None:
    for value in (10**9, 10**30):
        change(checkpoint / "config.json", *keys, value=value)
        refuse(checkpoint, tmp_path / "out", rf"{keys[-1]}={value} must be at most \d+")


def test_pieces_that_nothing_reads(checkpoint: Path, tmp_path: Path) -> None:
    refuse(checkpoint, tmp_path / "out", "prefill_chunk=1000000000 must be at least 1 and at most", prefill_chunk=10**9)


@pytest.mark.parametrize("token", [10**9, -1, 10**30])
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_tokens_outside_of_the_vocabulary(name: str, token: int, checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint / "config.json", name, value=token)
    refuse(checkpoint, tmp_path / "out", rf"{token}")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/a.jinja"]
)
def test_links_to_somewhere_else(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """What they lead to would go into the bundle."""
    secret = tmp_path / "secret"
    shutil.copyfile(checkpoint / "tokenizer.json", secret) if name == "tokenizer.json" else secret.write_text(
        "{}", encoding="utf-8"
    )
    path = checkpoint / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    refuse(
        checkpoint, tmp_path / "out", rf"is a link to {secret}, outside of the checkpoint; put a copy of the file in its place"
    )


def test_links_of_the_hubs_cache_and_within_the_checkpoint(
    copied: Copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = copied("two_level")
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "1").mkdir(parents=True)
    for path in checkpoint.iterdir():
        path.rename(repository / "blobs" / path.name)
        (repository / "snapshots" / "1" / path.name).symlink_to(f"../../blobs/{path.name}")
    assert "tokenizer.json" in exporter._read_tokenizer(repository / "snapshots" / "1")
    own = repository / "blobs"
    (own / "tokenizer.json").rename(own / "real.json")
    (own / "tokenizer.json").symlink_to("real.json")
    assert "tokenizer.json" in exporter._read_tokenizer(own)
