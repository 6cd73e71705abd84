"""bundle.json, config.json, an index of weights, an engine's manifest, a stored prefix: a sentence, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.bundle.engines import read_engine
from bilevel.bundle.format import load_bundle
from bilevel.config_json import load_source
from bilevel.export.decoder.end_tokens import end_tokens
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.cli.main import main
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.schedule.prefix_store import PrefixStore
from bilevel.runtime.schedule.slots import Slots
from bilevel.weight_files import read_headers
from tests import ROOT
from tests.doubles.bundle import write_bundle
from tests.fuzz.oracles import bounded, cases, outcome
from tests.fuzz.values import altered, no_json, written

CONFIG = json.loads((ROOT / "examples/model/config.json").read_text(encoding="utf-8"))
ENGINE: dict[str, Any] = {
    "format": "bilevel-engine",
    "format_version": 1,
    "created_by": {"bilevel": "0.1.0"},
    "backend": "tensorrt",
    "version": "10.3.0",
    "platform": "x86_64",
    "architectures": [86],
    "precision": "float32",
    "capacity": 48,
    "batch": [1, 2],
    "new_tokens": [[1, 16], [1, 1]],
    "plugins": {"nodes": 3, "library": None},
    "weight_streaming": False,
    "graph_sha256": "0" * 64,
    "memory_bytes": {"weights": 1, "activations": 1, "caches": 1},
    "plan": {"file": "engine.plan", "sha256": "0" * 64, "bytes": 5},
}
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> dict[str, Any]:
    return {"caches": "fp32", **json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxSession, bytes]:
    """A session of its own bundle, and the file of a prefix of it, of 100 tokens."""
    session = OnnxSession.open(write_bundle(tmp_path_factory.mktemp("bundle")), threads=1)
    folder = tmp_path_factory.mktemp("prefix")
    store, caches = PrefixStore(folder, session, 1 << 30), session.allocate(1, 128)
    slots = Slots(1)
    slots.hold(0, [*range(100)])
    store.keep(slots, caches)
    store.close()
    (path,) = folder.glob("*.prefix")
    return session, path.read_bytes()


def run(bundle: Path) -> None:
    """Open it, and generate where it opens."""
    generator = Generator.open(bundle, "onnx", threads=1)
    generator.texts(["def"], SamplingParams(max_tokens=2))


@cases(60)
@given(data=st.data())
def test_a_manifest(bundle: Path, manifest: dict[str, Any], data: st.DataObject) -> None:
    (bundle / "bundle.json").write_bytes(written(data.draw(altered(manifest))))
    outcome(lambda: run(bundle))
    outcome(lambda: load_bundle(bundle))


@cases(15)
@given(content=no_json)
def test_a_manifest_that_is_none(bundle: Path, content: bytes) -> None:
    (bundle / "bundle.json").write_bytes(content)
    assert outcome(lambda: load_bundle(bundle)) != "done"


@cases(40)
@given(data=st.data())
def test_what_inspect_shows(
    bundle: Path, manifest: dict[str, Any], data: st.DataObject, capsys: pytest.CaptureFixture[str]
) -> None:
    """In words that a terminal cannot be steered by."""
    (bundle / "bundle.json").write_bytes(written(data.draw(altered(manifest))))
    with bounded():
        assert main(["inspect", str(bundle)]) in (0, 1, 2)
        assert main(["inspect", str(bundle), "--json"]) in (0, 1, 2)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "Traceback" not in shown.err


@cases(60)
@given(data=st.data())
def test_an_engines_manifest(bundle: Path, data: st.DataObject) -> None:
    path = bundle / "engines" / "engine.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(written(data.draw(altered(ENGINE))))
    outcome(lambda: read_engine(path))


@cases(120)
@given(data=st.data())
def test_a_checkpoints_configuration(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_bytes(written(data.draw(altered(CONFIG))))
    outcome(lambda: load_source(folder))


@cases(40)
@given(data=st.data())
def test_an_index_of_weights(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("checkpoint", numbered=True)
    (folder / "model.safetensors.index.json").write_bytes(data.draw(altered(INDEX).map(written) | no_json))
    outcome(lambda: read_headers(folder))


@cases(40)
@given(data=st.data(), name=st.sampled_from(["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]))
def test_files_that_name_end_tokens(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    folder = tmp_path_factory.mktemp("checkpoint", numbered=True)
    settings = {
        "eos_token_id": [1, 2],
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "default", "template": "x"}],
    }
    config = load_source(ROOT / "examples/model").config
    (folder / name).write_bytes(data.draw(altered(settings).map(written) | no_json))
    outcome(lambda: end_tokens(folder, config))


@cases(60)
@given(data=st.data())
def test_a_stored_prefix(
    prefix: tuple[OnnxSession, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Refused in a sentence, or not used, or what was written."""
    session, whole = prefix
    folder = tmp_path_factory.mktemp("prefixes", numbered=True)
    head, _, rest = whole.partition(b"\n")
    head = written(data.draw(altered(json.loads(head)))).replace(b"\n", b" ")
    place = data.draw(st.integers(0, len(rest)))
    inserted, left_out = data.draw(st.sampled_from([b"", b"\0", b"\xff" * 8])), data.draw(st.integers(0, 9))
    rest = rest[:place] + inserted + rest[place + left_out :]
    (folder / "a.prefix").write_bytes(data.draw(st.sampled_from([head + b"\n" + rest, head, whole[:place]]) | no_json))

    def use() -> None:
        store = PrefixStore(folder, session, 1 << 30)
        try:
            stored, _ = store.longest([*range(100), 1])
            is_used = stored is not None and store.load(stored) is not None
            assert not is_used or (folder / "a.prefix").read_bytes().partition(b"\n")[2] == whole.partition(b"\n")[2]
        finally:
            store.close()

    outcome(use)
