"""What cannot be imported is refused in one sentence with the file, the key or tensor, the value and the remedy; nothing is
left behind."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bilevel.errors import CheckpointError
from bilevel.export.gguf.convert import import_gguf
from bilevel.export.gguf.header import is_gguf, read_gguf
from bilevel.runtime.cli.main import main
from tests.support.gguf_files import (
    Metadata,
    byte_level_vocabulary,
    make_model,
    model_metadata,
    model_tensors,
    sentencepiece_vocabulary,
    write_gguf,
)

VOCABULARY = byte_level_vocabulary("qwen2")
MODEL = make_model("llama", len(VOCABULARY["tokenizer.ggml.tokens"]))
FOLDER = "the model's own folder in Hugging Face's format"


def refusal(path: Path, **options: Any) -> str:
    """The sentence with which the file is refused; nothing may lie beside it afterwards."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(CheckpointError) as refused:
        import_gguf(path, path.parent / "checkpoint", **options)
    assert sorted(path.parent.iterdir()) == before
    return str(refused.value)


def written(folder: Path, changes: Metadata, vocabulary: Metadata = VOCABULARY, **tensors: np.ndarray | None) -> Path:
    """A good file with other metadata (None: without the key) and other tensors (None: without the tensor; ``__`` for a
    dot)."""
    metadata = {**model_metadata("llama", MODEL), **vocabulary, **changes}
    stored = {**model_tensors("llama", MODEL), **{name.replace("__", "."): array for name, array in tensors.items()}}
    return write_gguf(
        folder / "m.gguf",
        {key: value for key, value in metadata.items() if value is not None},
        {name: array for name, array in stored.items() if array is not None},
    )


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"general.architecture": "gemma3"}, f"holds the architecture 'gemma3', and llama, qwen2, .* are imported; .*{FOLDER}"),
        ({"llama.block_count": None}, r"lacks the metadata llama\.block_count; convert the model again"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, r"lacks the metadata llama\.attention\.layer_norm_rms_epsilon"),
        ({"llama.block_count": "five"}, r"gives llama\.block_count as 'five', which is no int; convert"),
        ({"llama.attention.head_count": [4, 4]}, r"gives llama\.attention\.head_count as \[4, 4\]"),
        ({"llama.vocab_size": 7}, r"gives llama\.vocab_size=7, but token_embd\.weight has \d+; convert"),
        ({"llama.rope.dimension_count": 8}, rf"llama\.rope\.dimension_count=8 for heads of 16 channels.*{FOLDER}"),
        ({"llama.attention.sliding_window": 64}, rf"llama\.attention\.sliding_window=64, which is not imported.*{FOLDER}"),
        (
            {"general.architecture": "bailingmoe"},
            r"holds the architecture 'bailingmoe', which is not imported: its experts are chosen .*; give one of llama",
        ),
        ({"llama.block_count": 0}, r"gives llama\.block_count=0, which must be greater than 0; convert"),
        ({"llama.attention.head_count_kv": 0}, r"gives llama\.attention\.head_count_kv=0, which must be greater than 0"),
        ({"llama.nextn_predict_layers": 5}, r"gives llama\.nextn_predict_layers=5 of 5 blocks"),
        ({"llama.expert_count": 8}, r"llama\.expert_count=8, which is not imported and may change the result"),
        ({"llama.block_count": 6}, r"lacks the tensor blk\.5\.attn_norm\.weight, which its metadata calls for; convert"),
        (
            {"llama.block_count": 4},
            r"stores blk\.4\.attn_k\.weight \(9 such tensors\), for which the architecture has no place",
        ),
        (
            {"llama.feed_forward_length": 128},
            r"stores blk\.0\.ffn_gate\.weight as \[96, 64\], and its metadata call for \[128, 64\]",
        ),
        ({"general.alignment": "x"}, r"general\.alignment='x', which is no positive integer"),
        (
            {"tokenizer.ggml.model": "bert"},
            rf"a tokenizer of the kind 'bert' \(tokenizer\.ggml\.model\), and gpt2, llama .*{FOLDER}",
        ),
        ({"tokenizer.ggml.model": None}, r"lacks the metadata tokenizer\.ggml\.model"),
        ({"tokenizer.ggml.pre": "poro-chat"}, rf"by the rule 'poro-chat' \(tokenizer\.ggml\.pre\), and gpt-2, .*{FOLDER}"),
        ({"tokenizer.ggml.pre": None}, r"lacks the metadata tokenizer\.ggml\.pre"),
        ({"tokenizer.ggml.tokens": None}, r"lacks the metadata tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.merges": None}, r"lacks the metadata tokenizer\.ggml\.merges"),
        (
            {"tokenizer.ggml.merges": ["o n", "x yz"]},
            r"tokenizer\.ggml\.merges 'x yz' \(number 1\), which does not join two tokens",
        ),
        ({"tokenizer.ggml.token_type": [1, 1]}, r"gives \d+ tokens and 2 token types"),
        ({"tokenizer.ggml.eos_token_id": 9999}, r"gives tokenizer\.ggml\.eos_token_id=9999, and has \d+ tokens"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            r"adds a bos_token to every text, but lacks tokenizer\.ggml\.bos_token_id",
        ),
    ],
)
def test_metadata(changes: Metadata, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, changes)
    assert_sentence(refusal(path), path, expected)


def assert_sentence(message: str, path: Path, expected: str) -> None:
    import re

    assert message.startswith(str(path)) and re.search(expected, message), message
    assert "; " in message and "\n" not in message


@pytest.mark.parametrize(
    "tensors, expected",
    [
        ({"token_embd__weight": None}, r"lacks the tensor token_embd\.weight"),
        ({"blk__2__ffn_up__weight": None}, r"lacks the tensor blk\.2\.ffn_up\.weight"),
        ({"blk__0__attn_q__bias": np.zeros(64, np.float32)}, r"lacks the tensor blk\.0\.attn_k\.bias"),
        ({"blk__0__ffn_norm_exps__weight": np.zeros(4, np.float32)}, r"stores blk\.0\.ffn_norm_exps\.weight \(1 such"),
        (
            {"rope_freqs__weight": np.linspace(1, 2, 8, dtype=np.float32)},
            r"rope_freqs\.weight frequencies other than those of Llama 3",
        ),
        ({"output_norm__weight": np.full(64, np.nan, np.float32)}, r"NaN or infinite weights in output_norm\.weight"),
    ],
)
def test_tensors(tensors: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, {}, **tensors)
    assert_sentence(refusal(path), path, expected)


def test_a_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    tokens = [*VOCABULARY["tokenizer.ggml.tokens"], "one more"]
    path = written(tmp_path, {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)})
    assert_sentence(refusal(path), path, r"lists \d+ tokens \(tokenizer\.ggml\.tokens\) and embeds \d+ \(token_embd\.weight\)")


def test_a_token_that_is_listed_twice(tmp_path: Path) -> None:
    tokens = [*VOCABULARY["tokenizer.ggml.tokens"][:-1], "!"]
    path = written(tmp_path, {"tokenizer.ggml.tokens": tokens})
    assert_sentence(refusal(path), path, r"lists the token '!' twice in tokenizer\.ggml\.tokens")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"tokenizer.ggml.scores": None}, r"lacks the metadata tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.scores": [1.0]}, r"tokens and 1 scores"),
    ],
)
def test_sentencepiece(changes: Metadata, expected: str, tmp_path: Path) -> None:
    path = written(
        tmp_path, {"llama.vocab_size": None, **changes}, sentencepiece_vocabulary(len(VOCABULARY["tokenizer.ggml.tokens"]))
    )
    assert_sentence(refusal(path), path, expected)


def test_no_gguf_file(tmp_path: Path) -> None:
    for contents in (b"", b"GG", b"PK\3\4 a zip", b"\x80\0\0\0\0\0\0\0{}"):
        (tmp_path / "m.gguf").write_bytes(contents)
        assert_sentence(
            refusal(tmp_path / "m.gguf"), tmp_path / "m.gguf", r"is no GGUF file \(it does not begin with GGUF\); give"
        )


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions(version: int, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    assert_sentence(refusal(tmp_path / "m.gguf"), tmp_path / "m.gguf", rf"is GGUF version {version}, and \(2, 3\) are read")


def test_truncated_anywhere(tmp_path: Path) -> None:
    """Cut at 60 places from the first byte to the last: each time one sentence."""
    whole = written(tmp_path, {}).read_bytes()
    path = tmp_path / "m.gguf"
    for size in [*range(5, 200, 13), *np.linspace(200, len(whole) - 1, 45).astype(int)]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf is truncated.*; download it again$"):
            read_gguf(path)
    path.write_bytes(whole[:-1])
    assert_sentence(
        refusal(path), path, rf"is truncated: the tensor \S+ ends at byte {len(whole)}, the file at {len(whole) - 1};"
    )


def test_damaged_heads(tmp_path: Path) -> None:
    """Any byte of the head overwritten: it is read, or refused in one sentence, and never takes memory for what is not
    there."""
    path = written(tmp_path, {})
    whole = bytearray(path.read_bytes())
    draw = np.random.default_rng(0)
    for at in draw.integers(4, 3000, 300):
        damaged = whole.copy()
        damaged[at] = int(draw.integers(256))
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except CheckpointError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def patched_type(path: Path, name: str, kind: int) -> None:
    """Overwrite a tensor's type in the head."""
    contents = bytearray(path.read_bytes())
    at = contents.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (axes,) = struct.unpack_from("<I", contents, at)
    struct.pack_into("<I", contents, at + 4 + 8 * axes, kind)
    path.write_bytes(contents)


@pytest.mark.parametrize(
    "kind, label", [(777, "777"), (gguf.GGMLQuantizationType.TQ1_0.value, r"\d+ \(TQ1_0\)"), (26, r"26 \(I32\)")]
)
def test_unreadable_quantisation(kind: int, label: str, tmp_path: Path) -> None:
    path = written(tmp_path, {})
    patched_type(path, "blk.1.ffn_up.weight", kind)
    assert_sentence(
        refusal(path),
        path,
        rf"stores blk\.1\.ffn_up\.weight in the quantisation type {label}, which is not read; give a file in F32",
    )


def test_rows_that_do_not_divide_into_blocks(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    patched_type(path, "blk.1.ffn_down.weight", gguf.GGMLQuantizationType.Q4_K.value)
    assert_sentence(refusal(path), path, r"stores blk\.1\.ffn_down\.weight in rows of 96, no multiple of 256")


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert "exists; choose another folder or replace it with --force" in refusal(path)
    assert "is no checkpoint (no config.json), so --force does not replace it; move it away" in refusal(path, force=True)
    shutil.rmtree(target)
    import_gguf(path, target)
    stored = (target / "model.safetensors").read_bytes()
    other = written(tmp_path, {"general.name": "damaged"}, output_norm__weight=np.full(64, np.inf, np.float32))
    assert "NaN or infinite weights" in refusal(other, force=True)
    assert (target / "model.safetensors").read_bytes() == stored
    import_gguf(written(tmp_path, {}), target, force=True)


def test_unknown_dtype(tmp_path: Path) -> None:
    assert "dtype='int8' is unknown; the types are fp32, fp16, bf16" in refusal(written(tmp_path, {}), dtype="int8")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {})
    assert main(["import", str(path), str(tmp_path / "checkpoint"), "--dtype", "bf16"]) == 0
    output = capsys.readouterr().out
    assert "llama: 5 layers, 0." in output and "million weights, from tensors in 48 F32" in output
    assert f"next: bilevel export {tmp_path / 'checkpoint'}" in output
    assert main(["import", str(path), str(tmp_path / "checkpoint")]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.gguf"), str(tmp_path / "other")]) == 2
    assert "none.gguf is no file; give the .gguf file to import" in capsys.readouterr().err


def test_files_are_told_apart_by_their_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"GGUF....")
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "weights.bin").write_bytes(b"abcd")
    assert [is_gguf(tmp_path / name) for name in ("model", "empty.gguf", "weights.bin", "none.gguf", ".")] == [
        True,
        True,
        False,
        False,
        False,
    ]
