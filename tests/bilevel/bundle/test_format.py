"""The bundle format: what is read, and what is refused in one sentence with its remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.bundle.format import load_bundle, read_manifest
from bilevel.bundle.tensors import TensorSpec
from bilevel.errors import BundleError
from bilevel.runtime.backend.onnx import OnnxSession
from tests.doubles.bundle import (
    BLOCK_SIZE,
    EOS,
    MAX_POSITIONS,
    PREFILL_CHUNK,
    VOCAB_SIZE,
    edit_manifest,
    file_record,
    write_bundle,
)

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path)


def test_load_bundle_reads_the_manifest(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert (bundle.block_size, bundle.max_positions, bundle.prefill_chunk) == (BLOCK_SIZE, MAX_POSITIONS, PREFILL_CHUNK)
    assert (bundle.bos, bundle.eos, bundle.vocab_size) == (None, (EOS,), VOCAB_SIZE)
    assert bundle.graph.inputs[0] == TensorSpec("input_ids", "int64", ("batch", "new_tokens"))
    assert [(spec.name, output) for spec, output in bundle.graph.state] == [
        ("past.token_ids", "present.token_ids"),
        ("past.key.0", "present.key.0"),
        ("past.block_key.0", "present.block_key.0"),
    ]
    assert bundle.graph_path == folder / "model.onnx"


def test_load_bundle_accepts_a_string_path(folder: Path) -> None:
    assert load_bundle(str(folder)).folder == folder


@pytest.mark.parametrize("tokens, capacity", [(1, 8), (8, 8), (9, 16), (100, 104)])
def test_round_up(folder: Path, tokens: int, capacity: int) -> None:
    assert load_bundle(folder).round_up(tokens) == capacity


@pytest.mark.parametrize("batch, capacity", [(1, 8), (3, 24)])
def test_state_bytes(folder: Path, batch: int, capacity: int) -> None:
    ids, key, block_key = 8 * capacity, 4 * capacity, 4 * capacity // BLOCK_SIZE
    assert load_bundle(folder).state_bytes(batch, capacity) == batch * (ids + key + block_key)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_precision(tmp_path: Path, precision: str) -> None:
    bundle = load_bundle(write_bundle(tmp_path, precision=precision))
    assert bundle.precision == precision and {spec.dtype for spec, _ in bundle.graph.state} == {"int64", precision}
    assert bundle.state_bytes(1, 16) == 16 * 8 + (16 + 16 // BLOCK_SIZE) * (4 if precision == "float32" else 2)


def test_unknown_precision_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(precision="float8"))
    with pytest.raises(
        BundleError, match="bundle.json gives precision='float8', which must be one of float32, float16, bfloat16; make the"
    ):
        load_bundle(folder)


def test_format_version_names_both_and_the_remedy(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format_version=2))
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    message = str(caught.value)
    assert "version 2" in message and "version 1" in message
    assert f"bilevel export CHECKPOINT {folder} --force" in message


@pytest.mark.parametrize("name", ["model.onnx", "model.data", "config.json", "tokenizer.json"])
def test_tampered_file_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} differs from the SHA-256"):
        load_bundle(folder)
    load_bundle(folder, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_missing_file_is_named(folder: Path, verify: bool) -> None:
    (folder / "model.data").unlink()
    with pytest.raises(BundleError, match="model.data is missing; make the bundle anew"):
        load_bundle(folder, verify)


def test_truncated_file_is_refused_by_size(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=f"model.onnx holds {len(data) // 2} bytes instead of {len(data)}"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.data"])
def test_unreadable_graph_without_verification(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match="cannot be opened by ONNX Runtime") as caught:
        OnnxSession.open(folder, verify=False)
    assert "\n" not in str(caught.value)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle .* bilevel export CHECKPOINT"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}"], ids=["empty", "cut", "not-utf8"])
def test_manifest_that_is_not_json(folder: Path, data: bytes) -> None:
    (folder / "bundle.json").write_bytes(data)
    with pytest.raises(BundleError, match="bundle.json is not valid JSON"):
        load_bundle(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_manifest_that_is_not_an_object(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)
    with pytest.raises(
        BundleError,
        match=f"bundle.json holds {re.escape(repr(json.loads(text)))}, which must be an object; make the bundle anew",
    ):
        load_bundle(folder)


def test_every_required_key_is_missed_by_name(folder: Path) -> None:
    """No key of the manifest may be left out, and the error says which one was."""
    manifest = json.loads((folder / "bundle.json").read_text())
    keys = [
        key for key in manifest if not isinstance(manifest[key], dict) or key in ("created_by", "config", "operators", "files")
    ]
    # graph.head is optional
    keys += [f"{key}.{part}" for key in ("limits", "tokens", "graph") for part in manifest[key] if part != "head"]
    for key in keys:
        outer, _, inner = key.partition(".")
        edited = json.loads(json.dumps(manifest))
        del (edited[outer] if inner else edited)[inner or outer]
        (folder / "bundle.json").write_text(json.dumps(edited))
        with pytest.raises(BundleError, match=f"bundle.json does not give {key}; make the bundle anew"):
            read_manifest(folder)


WRONG: dict[str, tuple[Edit, str]] = {
    "format": (lambda m: m.update(format="zip"), "format zip version 1"),
    "type": (lambda m: m.update(block_size="8"), "gives block_size='8', which must be a whole number"),
    "bool": (lambda m: m.update(block_size=True), "gives block_size=True, which must be a whole number"),
    "zero": (lambda m: m["limits"].update(prefill_chunk=0), "limits.prefill_chunk=0, which must be at least 1"),
    "eos": (lambda m: m["tokens"].update(eos=["</s>"]), "tokens.eos=.'</s>'., which must be a list of whole numbers"),
    "operator": (lambda m: m["operators"].update(Teleport=1), "operator Teleport"),
    "operator-version": (lambda m: m["operators"].update(CoarseRoute=9), "CoarseRoute version 9, this bilevel has version 1"),
    "dtype": (
        lambda m: m["graph"]["inputs"][3].update(dtype="float4"),
        "graph.inputs.3..dtype='float4', which must be one of float32",
    ),
    "symbol": (lambda m: m["graph"]["inputs"][3].update(shape=["batch", "depth"]), "unknown size 'depth'"),
    "shared-buffer": (lambda m: m["graph"]["outputs"][2].update(shape=["batch", 2, "capacity", 1]), "cannot share a buffer"),
    "state": (lambda m: m["graph"]["state"][0].update(output="present.nothing"), "past.token_ids -> present.nothing"),
    "unbound-input": (lambda m: m["graph"]["state"].pop(), "inputs besides its state"),
    "no-logits": (lambda m: m["graph"]["outputs"].pop(0), "output logits of float32"),
    "file-outside": (lambda m: m["files"].update({"../x": m["files"]["config.json"]}), "lies outside the bundle"),
    "file-absolute": (lambda m: m["files"].update({"/etc/x": m["files"]["config.json"]}), "lies outside the bundle"),
    "file-record": (lambda m: m["files"].update({"config.json": {"bytes": 3}}), "does not give files.config.json.sha256"),
    "caches": (lambda m: m.update(caches="int3"), "caches='int3', which must be one of fp32, int8, int4"),
    "caches-of-floats": (
        lambda m: m.update(caches="int8"),
        r"past.key.0 is float32 \['batch', 1, 'capacity', 1\], which int8 caches are not \(uint8, 3 bytes a row\)",
    ),
    "caches-of-odd-heads": (lambda m: m.update(caches="int4"), "heads of 1 numbers cannot be cached in 4 bits"),
    "caches-without-heads": (lambda m: (m.update(caches="int8"), m["config"].pop("head_dim")), "does not give config.head_dim"),
    "caches-of-halves": (
        lambda m: m.update(caches="int8", precision="float16"),
        "gives int8 caches and precision float16; packed caches go with float32",
    ),
    "bytes-for-floats": (
        lambda m: [
            port.update(dtype="uint8") for key in ("inputs", "outputs") for port in m["graph"][key] if ".key." in port["name"]
        ],
        r"past.key.0 is uint8 \['batch', 1, 'capacity', 1\], which fp32 caches are not",
    ),
    "graph-unlisted": (lambda m: m["files"].pop("model.onnx"), "does not list model.onnx"),
}


@pytest.mark.parametrize("edit, message", WRONG.values(), ids=WRONG)
def test_wrong_manifest(folder: Path, edit: Edit, message: str) -> None:
    edit_manifest(folder, edit)
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(folder)
    assert "bilevel export CHECKPOINT" in str(caught.value) and "\n" not in str(caught.value)


def test_graph_that_is_not_the_manifests(folder: Path) -> None:
    """Files that are whole, but a manifest that describes another graph."""

    def rename(manifest: dict[str, Any]) -> None:
        manifest["graph"]["inputs"][4]["name"] = manifest["graph"]["state"][1]["input"] = "past.key.7"

    edit_manifest(folder, rename)
    with pytest.raises(BundleError, match="has input past.key.7 as nothing, bundle.json says float32"):
        OnnxSession.open(folder)


def test_unreadable_tokenizer(folder: Path) -> None:
    from bilevel.runtime.generate.generator import Generator

    (folder / "tokenizer.json").write_text("{}")
    edit_manifest(folder, lambda m: m["files"].update({"tokenizer.json": file_record(folder / "tokenizer.json")}))
    with pytest.raises(BundleError, match=r"tokenizer.json cannot be read"):
        Generator.open(folder)


def test_moved_bundle_still_opens(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("ümlaut folder") / "bundle"
    shutil.copytree(folder, elsewhere)
    assert OnnxSession.open(elsewhere).bundle.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("sources", [{"1": 5}, {"1": "config.json"}, {"1": [2]}])
def test_sources_of_ends_that_are_none(folder: Path, sources: dict[str, object]) -> None:
    edit_manifest(folder, lambda manifest: manifest["tokens"].update(eos_sources=sources))
    with pytest.raises(BundleError, match="eos_sources"):
        load_bundle(folder, verify=False)
