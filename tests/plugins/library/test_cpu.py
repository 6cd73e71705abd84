"""How the CPU library is found, loaded and used, and that it declares what the contract says."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from bilevel import contract
from bilevel.bundle.format import load_bundle
from bilevel.errors import BundleError, RequestError
from bilevel.plugins.library import cpu as cpu_library
from bilevel.runtime.backend.onnx import OnnxSession
from tests import ROOT
from tests.support.cpu_library import SETS, options_with_library, required_library, run_kernel, sets_here, wanted_set
from tests.support.operator_calls import Inputs, int32, make_call, model_of, node_of

SOURCE = (ROOT / "plugins" / "csrc" / "ort" / "library.cpp").read_text(encoding="utf-8")
Exported = Callable[[str], tuple[Path, Path]]


# What it declares


def test_library_declares_the_contract() -> None:
    """Names, inputs and outputs of every operator: T is fp32 there."""
    rows = re.findall(r'declare\(Operator::k(\w+), "(\w+)", "(\w+)", "(\w+)"\)', SOURCE)
    assert [kind for kind, *_ in rows] == [name for _, name, *_ in rows]

    def letters(ports: tuple[contract.Port, ...]) -> str:
        return "".join({"int32": "i", "uint8": "u"}.get(port.dtype, "f") for port in ports)

    expected = {op.name: (letters(op.inputs), letters(op.outputs)) for op in contract.OPS}
    assert {name: (inputs, outputs) for _, name, inputs, outputs in rows} == expected


def test_library_reads_the_contracts_attributes() -> None:
    """Every operator's kernel reads all of its attributes, as what they are."""
    classes = dict(re.findall(r"case Operator::k(\w+): made = std::make_unique<(\w+)>", SOURCE))
    found = re.findall(r"^struct (\w+) : (\w+) \{(.*?)^\};", SOURCE, re.DOTALL | re.MULTILINE)
    parents, bodies = ({name: each[place] for name, *each in found} for place in (0, 1))
    ((packed_rows,),) = [re.findall(r"^bilevel::CacheRows rows_of\(.*?^\}", SOURCE, re.DOTALL | re.MULTILINE)]

    def text(name: str) -> str:
        """A kernel's source with that of the one that it is made of, and of the helper that reads for several."""
        shared = packed_rows if "rows_of(*this)" in bodies[name] else ""
        return bodies[name] + shared + (text(parents[name]) if parents[name] in bodies else "")

    readers = {"integer": "int", "number": "float", "text": "string"}
    for op in contract.OPS:
        read = re.findall(r'\b(integer|number|text)(?:_or)?\("(\w+)"', text(classes[op.name]))
        assert {(name, readers[reader]) for reader, name in read} == {(a.name, a.kind) for a in op.attributes}, op.name


# That it is used


@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
def test_kernel_is_preferred_to_the_body(name: str, tmp_path: Path) -> None:
    """What ONNX Runtime runs is the one node, not the operators of the graph's own body."""
    model = model_of([node_of(name, make_call(name)[1])]).SerializeToString()
    for options, is_kernel in ((options_with_library(), True), (ort.SessionOptions(), False)):
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(model, options)
        nodes = [(node.domain, node.op_type) for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
        assert (nodes == [("bilevel", name)]) == is_kernel


def test_every_instruction_set_can_be_asked_for() -> None:
    library = required_library()
    assert sets_here()[-1] == "baseline"
    for name in ("abacus", *SETS):
        with wanted_set(name):
            assert cpu_library.instruction_set(library) == (name if name in sets_here() else sets_here()[0])


def logits_of(session: OnnxSession) -> np.ndarray:
    ids = np.arange(12, dtype=np.int64).reshape(1, 12) + 3
    return session.allocate(1, 16).run(ids, np.zeros(1, np.int32), np.full(1, 12, np.int32)).copy()


@pytest.mark.parametrize("preset", ["two_level", "moba"])
def test_session_gives_the_same_with_and_without_the_library(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    library = required_library()
    _, bundle = exported(preset)
    fast = OnnxSession.open(bundle, threads=2)
    assert fast.cpu_library == library
    monkeypatch.setenv(cpu_library.VARIABLE, "none")
    portable = OnnxSession.open(bundle, threads=1)
    assert portable.cpu_library is None
    np.testing.assert_allclose(logits_of(fast), logits_of(portable), rtol=1e-4, atol=1e-5)


def test_sessions_open_at_once(exported: Exported) -> None:
    """Each session registers the library; the operators' domain is made once."""
    required_library()
    bundle = load_bundle(exported("two_level")[1])
    with ThreadPoolExecutor(4) as pool:
        logits = list(pool.map(lambda _: logits_of(OnnxSession(bundle, threads=1)), range(8)))
    assert all(np.array_equal(logits[0], other) for other in logits)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_bundle_runs_its_own_bodies(exported: Exported, precision: str) -> None:
    """The kernels are fp32."""
    bundle = dataclasses.replace(load_bundle(exported("two_level")[1]), precision=precision)
    assert OnnxSession(bundle).cpu_library is None


def test_bundle_without_operators_loads_no_library(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(exported("two_level")[1])
    bundle = dataclasses.replace(bundle, graph=dataclasses.replace(bundle.graph, operators={}))
    monkeypatch.setenv(cpu_library.VARIABLE, "no-such-file.so")  # not even looked for
    assert OnnxSession(bundle).cpu_library is None


# Where it is looked for


def test_find_cpu_library_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable, then the installation; "none" in any case means none."""
    installed, named = tmp_path / "installed", tmp_path / "mine.so"
    installed.mkdir()
    spec = importlib.machinery.ModuleSpec("bilevel.plugins", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "elsewhere"), str(installed)]
    monkeypatch.setattr(cpu_library.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.delenv(cpu_library.VARIABLE, raising=False)
    assert cpu_library.find_cpu_library() is None
    for path in (named, library := installed / "_cpu.abi3.so", installed / "_cpu_notes.txt"):
        path.write_bytes(b"")
    for text, expected in [(None, library), ("", library), (str(named), named), ("none", None), ("None", None)]:
        if text is not None:
            monkeypatch.setenv(cpu_library.VARIABLE, text)
        assert cpu_library.find_cpu_library() == expected, text


def test_missing_file_is_one_sentence(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, os.path.join("no", "such.so"))
    with pytest.raises(RequestError, match="BILEVEL_CPU_LIBRARY=no/such.so is no file; unset it, or set it to none") as caught:
        OnnxSession.open(exported("two_level")[1])
    assert "\n" not in str(caught.value)


def test_file_that_is_no_library_is_one_sentence(exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library\n", encoding="utf-8")
    monkeypatch.setenv(cpu_library.VARIABLE, str(tmp_path / "text.so"))
    with pytest.raises(BundleError, match="text.so cannot be loaded .*; reinstall bilevel, or set .*=none$") as caught:
        OnnxSession.open(exported("two_level")[1])
    assert "\n" not in str(caught.value)


# What it refuses


@pytest.mark.parametrize("name", ["CoarseRoute", "FineRoute", "RoutedAttention"])
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"past_len": int32(-9, 3)}, "past_len must be at least 0"),
        ({"new_len": int32(7, 3)}, "new_len lie between 0 and L"),
        ({"new_len": int32(6, -1)}, "new_len lie between 0 and L"),
        ({"new_len": int32(6)}, r"must be \[B\]"),
        ({"past_len": int32(1, 2, 3)}, r"must be \[B\]"),
    ],
    ids=["negative-past", "long", "negative", "short", "past-of-other-batch"],
)
def test_kernels_refuse_wrong_lengths(name: str, lengths: Inputs, message: str) -> None:
    inputs, attributes = make_call(name)
    with pytest.raises(Exception, match=message):
        run_kernel(name, {**inputs, **lengths}, attributes)


@pytest.mark.parametrize(
    ("name", "port", "axis"),
    [
        ("CoarseRoute", "unit_key", 0),
        ("CoarseRoute", "unit_key", 3),
        ("FineRoute", "candidates", 0),
        ("FineRoute", "candidates", 2),
        ("RoutedAttention", "k", 0),
        ("RoutedAttention", "v", 2),
        ("RoutedAttention", "q", 3),
        ("RoutedAttention", "routes", 2),
        ("ExpertRoute", "select_bias", 0),
        ("ExpertRoute", "group_logits", 0),
        ("RoutedExperts", "ids", 1),
        ("RoutedExperts", "down", 2),
        ("RoutedExpertsQuantized", "ids", 1),
        ("RoutedExpertsQuantized", "gate_up_codes", 2),
        ("RoutedExpertsQuantized", "gate_up_scales", 2),
        ("RoutedExpertsQuantized", "gate_up_zeros", 1),
        ("RoutedExpertsQuantized", "down_codes", 1),
        ("RoutedExpertsQuantized", "down_zeros", 0),
    ],
)
def test_kernels_refuse_shapes_that_do_not_fit(name: str, port: str, axis: int) -> None:
    inputs, attributes = make_call(name)
    inputs[port] = inputs[port].narrow(axis, 0, 1).contiguous()
    with pytest.raises(Exception, match="do(es)? not fit .*export the model anew"):
        run_kernel(name, inputs, attributes)


def test_kernels_read_graphs_that_are_older_than_an_attribute() -> None:
    inputs, attributes = make_call("ExpertRoute")
    older = {key: value for key, value in attributes.items() if key not in ("norm_floor", "zero_fill")}
    for got, want in zip(run_kernel("ExpertRoute", inputs, older), run_kernel("ExpertRoute", inputs, attributes), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("attribute", ["block_size", "topk", "num_selection_heads", "local_blocks"])
def test_kernels_refuse_attributes_out_of_range(attribute: str) -> None:
    inputs, attributes = make_call("CoarseRoute")
    with pytest.raises(Exception, match=f"{attribute} is out of range"):
        run_kernel("CoarseRoute", inputs, {**attributes, attribute: -1})
