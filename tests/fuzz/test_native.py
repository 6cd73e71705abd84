"""Graphs and tokenizers, whose readers are native code: they refuse, and the process lives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from bilevel.bundle.confined import Confined, Limits
from tests.doubles.bundle import edit_manifest, file_record, make_model, make_tokenizer, write_bundle
from tests.fuzz.oracles import cases
from tests.fuzz.values import altered, odd_texts, written

LIMITS = Limits(cpu_seconds=20, wall_seconds=60, memory=2 << 30)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def opener(bundle: Path) -> Iterator[Confined]:
    with closing(Confined("tests.fuzz.targets:open_bundle", str(bundle), LIMITS)) as worker:
        yield worker


@pytest.fixture(scope="module")
def reader(bundle: Path) -> Iterator[Confined]:
    with closing(Confined("tests.fuzz.targets:read_tokenizer", str(bundle), LIMITS)) as worker:
        yield worker


def is_sentence(text: str) -> bool:
    return bool(text) and "\n" not in text and "Traceback" not in text and len(text) < 3000


@st.composite
def altered_graphs(draw: DrawFn) -> bytes:
    """The double's graph with names, sizes, types, attributes or values that are others, or with bytes that are."""
    model = onnx.ModelProto.FromString(make_model().SerializeToString())
    graph = model.graph
    action = draw(st.sampled_from(["op", "input", "shape", "type", "drop", "cycle", "external", "bytes", "bytes", "cut"]))
    node = draw(st.sampled_from(list(graph.node)))
    if action == "op":
        node.op_type = draw(st.sampled_from(["Identity", "Loop", "If", "Scan", "Reshape", "NoSuchOp", "RandomNormal", ""]))
    elif action == "input":
        node.input[0] = draw(st.sampled_from([*(each.output[0] for each in graph.node), "nothing", ""]))
    elif action in ("shape", "type"):
        tensor = draw(st.sampled_from([*graph.input, *graph.output])).type.tensor_type
        if action == "type":
            tensor.elem_type = draw(st.integers(0, 30))
        elif tensor.shape.dim:
            tensor.shape.dim[0].dim_value = draw(st.sampled_from([-1, 0, 1, 2**31, 2**62]))
    elif action == "drop":
        graph.node.remove(node)
    elif action == "cycle":
        node.input[0] = node.output[0]
    elif action == "external":
        tensor = draw(st.sampled_from(list(graph.initializer)))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = draw(st.sampled_from(["/etc/passwd", "../../../etc/passwd", "nothing", "model.onnx", "bundle.json", ""]))
        for key, value in (("location", place), ("offset", draw(st.sampled_from(["0", "-8", "9" * 30]))), ("length", "8")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    content = model.SerializeToString()
    if action == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if action == "bytes":
        raw = bytearray(content)
        for _ in range(draw(st.integers(1, 8))):
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        return bytes(raw)
    return content


@cases(60)
@given(content=altered_graphs())
def test_a_graph(bundle: Path, opener: Confined, content: bytes) -> None:
    """Its hash is right: who writes the graph writes the manifest."""
    (bundle / "model.onnx").write_bytes(content)
    edit_manifest(bundle, lambda manifest: manifest["files"].update({"model.onnx": file_record(bundle / "model.onnx")}))
    assert is_sentence(opener.ask(True))


TOKENIZER: dict[str, Any] = json.loads(make_tokenizer().to_str())
SMALL = {
    **TOKENIZER,
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\s+|\w+"}, "behavior": "Isolated", "invert": False},
    "model": {**TOKENIZER["model"], "vocab": dict(list(TOKENIZER["model"]["vocab"].items())[:40]), "merges": []},
}


@cases(60)
@given(data=st.data(), text=odd_texts)
def test_a_tokenizer(bundle: Path, reader: Confined, data: st.DataObject, text: str) -> None:
    (bundle / "tokenizer.json").write_bytes(written(data.draw(altered(SMALL))))
    assert is_sentence(reader.ask(text))


@cases(12)
@given(
    pattern=st.sampled_from(["(a|aa)+$", "(a+)+$", "(.*)*x", "", "(", "\\", "(?<=a+)b", "a{1000}{1000}"]),
    decoder=st.sampled_from(
        [None, {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x" * 99}, {"type": "ByteFallback"}]
    ),
)
def test_a_tokenizer_with_patterns(bundle: Path, reader: Confined, pattern: str, decoder: Any) -> None:
    """Patterns that take exponential time end in a sentence too."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    (bundle / "tokenizer.json").write_bytes(written({**SMALL, "pre_tokenizer": split, "decoder": decoder}))
    assert is_sentence(reader.ask("a" * 40 + "b"))
