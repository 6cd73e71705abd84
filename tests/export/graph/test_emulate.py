"""Lower-precision graphs on ONNX Runtime's CPU provider: one rounding per operator, nothing else changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx.utils
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bilevel.checkpoint import load_model
from bilevel.errors import ExportError
from bilevel.export.decoder.decoder import state_tensors
from bilevel.export.graph.emulate import _MOVES, BFLOAT16, LOWER, Array, emulate, from_numpy, run, to_numpy
from tests.support.cpu_library import required_library
from tests.support.tiny_models import BLOCK_SIZE

Exported = Callable[..., tuple[Path, Path]]
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}


def open_model(model: onnx.ModelProto, weights: Path | None = None, library: Path | None = None) -> ort.InferenceSession:
    """weights: the folder of external weights."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options)


def parse(kind: str, graph: str) -> onnx.ModelProto:
    """A model of one graph in ONNX's text form, in which T is the lower type."""
    text = f'<ir_version: 10, opset_import: ["" : 23, "com.example" : 1]> g {graph}'
    return onnx.parser.parse_model(text.replace("T[", f"{kind}["))


def numbers(kind: str, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[kind])


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# One operator


@pytest.mark.parametrize("kind", DTYPES)
def test_every_operator_rounds_once(kind: str) -> None:
    """Bit for bit what NumPy gives: computed in fp32, rounded, read again. No rounding is optimised away."""
    model = parse(kind, "(T[n] a, T[n] b) => (T[n] z) { s = Add(a, b)\n p = Mul(s, s)\n z = Sub(p, a) }")
    a, b = numbers(kind, 4000), numbers(kind, 4000, seed=1)
    (found,) = run(open_model(emulate(model)), ["z"], {"a": a, "b": b})

    def rounded(x: Array) -> Array:
        return x.astype(DTYPES[kind]).astype(np.float32)

    wide = a.astype(np.float32)
    total = rounded(wide + b.astype(np.float32))
    assert found.dtype == DTYPES[kind]
    assert np.array_equal(found.astype(np.float32), rounded(rounded(total * total) - wide))
    assert not np.array_equal(found.astype(np.float32), rounded((wide + b.astype(np.float32)) ** 2 - wide)), "they matter"


@pytest.mark.parametrize("kind", DTYPES)
def test_what_moves_numbers_stays_in_its_type(kind: str) -> None:
    """Every such operator runs in both types, so nothing is cast; large weights and caches are not copied."""
    model = parse(
        kind,
        """(T[4, 6] x, int64[2] rows) => (T[2, 6] gathered, T[4, 6] scattered, T[m] rest, int64[2] size, float[4, 6] wide)
        { at = Unsqueeze(rows, one)
          gathered = Gather(x, rows)
          nested = GatherND(x, at)
          same = Identity(nested)
          scattered = ScatterND(x, at, same)
          turned = Transpose(scattered)
          flat = Flatten(turned)
          first, second = Split<axis = 0, num_outputs = 2>(flat)
          both = Concat<axis = 0>(first, second)
          cut = Slice(both, one, two, zero)
          shape = Shape(x)
          size = Reshape(shape, minus)
          constant = Constant<value = float[1, 4] {1, 2, 3, 4}>()
          small = Cast<to = 1>(constant)
          lower = CastLike(small, x)
          picked = GatherElements<axis = 1>(lower, index)
          put = ScatterElements<axis = 1>(lower, index, picked)
          line = Squeeze(put, zero)
          rest0 = Reshape(cut, minus)
          rest = Concat<axis = 0>(rest0, line)
          wide = Cast<to = 1>(scattered) }""",
    )
    constants = {"zero": [0], "one": [1], "two": [2], "minus": [-1], "index": [[2, 0, 1]]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items())
    copy = emulate(model)
    assert set(kinds(copy)) == _MOVES
    assert kinds(copy) == [kind if kind != "CastLike" else "Cast" for kind in kinds(model)], "and no cast was added"
    x, rows = numbers(kind, 4, 6), np.array([2, 0])
    gathered, scattered, rest, size, wide = run(
        open_model(copy), ["gathered", "scattered", "rest", "size", "wide"], {"x": x, "rows": rows}
    )
    assert np.array_equal(gathered, x[rows]) and np.array_equal(scattered, x) and size.tolist() == [4, 6]
    assert rest.astype(float).tolist() == [*x.T[1].astype(float), 1, 2, 3, 4]
    assert wide.dtype == np.float32 and np.array_equal(wide, x.astype(np.float32))


@pytest.mark.parametrize("kind", DTYPES)
def test_a_scatter_that_adds_is_computed(kind: str) -> None:
    model = parse(kind, '(T[3] x, int64[2, 1] at, T[2] y) => (T[3] z) { z = ScatterND<reduction = "add">(x, at, y) }')
    x, y = np.array([1, 1, 1], DTYPES[kind]), np.array([1, 2], DTYPES[kind])
    (found,) = run(open_model(emulate(model)), ["z"], {"x": x, "at": np.array([[0], [2]]), "y": y})
    assert found.astype(float).tolist() == [2, 1, 3]


@pytest.mark.parametrize("kind", DTYPES)
def test_types_that_an_attribute_gives(kind: str) -> None:
    number = {"float16": 10, "bfloat16": 16}[kind]
    model = parse(kind, f"(int64[1] n, float[2, 2] m) => (T[k] a, T[2, 2] b) {{ a = C(n)\n b = EyeLike<dtype = {number}>(m) }}")
    value = numpy_helper.from_array(np.array([1.5], DTYPES[kind]))
    model.graph.node[0].CopyFrom(helper.make_node("ConstantOfShape", ["n"], ["a"], value=value))
    a, b = run(open_model(emulate(model)), ["a", "b"], {"n": np.array([3]), "m": np.zeros((2, 2), np.float32)})
    assert a.dtype == b.dtype == DTYPES[kind]
    assert a.astype(float).tolist() == [1.5] * 3 and b.astype(float).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("flag", [True, False])
def test_control_flow(kind: str, flag: bool) -> None:
    """Inside a branch operators are treated alike; a value of the outer graph is cast where it is read."""
    model = parse(
        kind,
        """(bool c, T[n] x) => (T[n] z, T[n] w)
        { y = Add(x, x)
          z = If (c) <then_branch = t () => (T[n] u) { u = Mul(y, x) }, else_branch = e () => (T[n] v) { v = Sub(x, y) }>
          w = Neg(y) }""",
    )
    x = numbers(kind, 50)
    z, w = run(open_model(emulate(model)), ["z", "w"], {"c": np.array(flag), "x": x})
    y = x + x
    assert z.dtype == DTYPES[kind] and np.array_equal(z, y * x if flag else x - y) and np.array_equal(w, -y)


def test_names_that_are_taken() -> None:
    """The names that the pass would give are a user's already."""
    model = parse("bfloat16", "(T[n] x, float[n] p, float[n] q) => (T[n] z, float[n] w) { z = Neg(x)\n w = Add(p, q) }")
    renamed = {"p": "x/fp32", "q": "z/unrounded"}
    for value in model.graph.input:
        value.name = renamed.get(value.name, value.name)
    model.graph.node[1].input[:] = renamed.values()
    x, ones = numbers("bfloat16", 5), np.ones(5, np.float32)
    z, w = run(open_model(emulate(model)), ["z", "w"], {"x": x, "x/fp32": ones, "z/unrounded": ones})
    assert np.array_equal(z, -x) and w.tolist() == [2.0] * 5


def test_operator_without_schema() -> None:
    """Its operands become fp32 as any other's do, where the graph tells the types; where it does not, that is said."""
    model = parse("float16", "(T[n] x) => (T[n] z) { y = com.example.Strange(x)\n z = Neg(y) }")
    with pytest.raises(ExportError, match="the type of the value y is not known; give a graph whose value_info tells it"):
        emulate(model)
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n"]))
    assert kinds(emulate(model)) == ["Cast", "Strange", "Cast", "Cast", "Neg", "Cast"]


# A bundle


def mentioned(nodes: Any) -> Iterator[int]:
    """Element types that nodes, and the graphs inside them, name."""
    for node in nodes:
        for attribute in node.attribute:
            yield attribute.t.data_type
            yield attribute.i if attribute.name == "to" else 0
            if attribute.HasField("g"):
                values = (*attribute.g.input, *attribute.g.output, *attribute.g.value_info)
                yield from (value.type.tensor_type.elem_type for value in values)
                yield from mentioned(attribute.g.node)


def ports(model: onnx.ModelProto) -> list[tuple[str, int]]:
    return [(value.name, value.type.tensor_type.elem_type) for value in (*model.graph.input, *model.graph.output)]


@pytest.mark.parametrize("precision", TORCH)
def test_emulated_bundle_keeps_everything_but_the_types(exported: Exported, precision: str) -> None:
    """Ports, weights and routed nodes; what touches the lower type only moves numbers or rounds, and bodies see fp32."""
    _, bundle = exported("two_level", precision=precision)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    copy = emulate(model)
    assert model.SerializeToString(deterministic=True) == before, "the model that was given is not changed"
    assert ports(copy) == ports(model) and list(copy.graph.initializer) == list(model.graph.initializer)
    routed = [[(n.op_type, n.name, list(n.attribute)) for n in m.graph.node if n.domain == "bilevel"] for m in (model, copy)]
    assert routed[0] == routed[1] and len(routed[0]) == 7
    assert [f.name for f in copy.functions] == [f.name for f in model.functions]
    assert any(kind in LOWER for f in model.functions for kind in mentioned(f.node))
    assert not any(kind in LOWER for f in copy.functions for kind in mentioned(f.node))
    types = {value.name: value.type.tensor_type.elem_type for value in (*copy.graph.value_info, *copy.graph.output)}
    types |= {weight.name: weight.data_type for weight in copy.graph.initializer} | dict(ports(copy))
    for node in copy.graph.node:
        if any(types.get(name) in LOWER for name in (*node.input, *node.output)):
            assert node.op_type in _MOVES
    onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)


def last_logits(session: Any, config: Any, dtype: torch.dtype, ids: Array, calls: list[int]) -> Array:
    """fp32 [calls, vocab]: the logits after each call."""
    sizes = {"batch": 1, "capacity": 64, "num_blocks": 64 // BLOCK_SIZE}
    tensors = state_tensors(config, dtype)
    shapes = [[sizes[s] if isinstance(s, str) else s for s in t.shape] for t in tensors]
    caches = [to_numpy(torch.zeros(shape, dtype=t.dtype)) for t, shape in zip(tensors, shapes, strict=True)]
    past, logits = 0, []
    for length in calls:
        feeds = {"input_ids": ids[:, past : past + length], "past_len": np.array([past], np.int32)}
        feeds |= {"new_len": np.array([length], np.int32)}
        feeds |= {f"past.{t.name}": cache for t, cache in zip(tensors, caches, strict=True)}
        found, *caches = run(session, ["logits", *(f"present.{t.name}" for t in tensors)], feeds)
        logits.append(found[0])
        past += length
    return np.stack(logits)


@pytest.mark.parametrize("precision", TORCH)
def test_emulated_bundle_equals_pytorch(exported: Exported, precision: str) -> None:
    """In prefill and decode it lies as near to fp64 as PyTorch in that precision does (at most twice as far), with the portable
    bodies and with the CPU kernels; so does ONNX Runtime's own fp16. So short a text keeps every block: no route can differ."""
    checkpoint, bundle = exported("two_level", precision=precision)
    dtype, calls = TORCH[precision], [5, 1, 4, 1, 1]
    model = load_model(checkpoint, dtype=dtype)
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, (1, sum(calls)))
    with torch.no_grad():
        ends = np.cumsum(calls) - 1
        plain = model(torch.from_numpy(ids))[0, ends].double().numpy()
        exact = model.double()(torch.from_numpy(ids))[0, ends].numpy()
    floor = np.linalg.norm(plain - exact)
    raw = onnx.load(bundle / "model.onnx", load_external_data=False)
    copy = emulate(onnx_ir.from_proto(raw))
    sessions = [open_model(copy, bundle), open_model(copy, bundle, required_library())]
    if precision == "fp16":
        sessions.append(open_model(raw, bundle))
    for session in sessions:
        logits = last_logits(session, model.config, dtype, ids, calls)
        assert logits.dtype == np.float32
        assert 0 < np.linalg.norm(logits - exact) < 2 * floor < 0.1 * np.linalg.norm(exact)


def test_part_of_a_bundle(exported: Exported) -> None:
    """A sub-graph with its weights still outside: an MLP, from its input to its output."""
    checkpoint, bundle = exported("two_level", precision="bf16")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    gate = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    product = next(node for node in model.graph.node if gate.input[0] in node.output)
    mul = next(node for node in model.graph.node if node.op_type == "Mul" and gate.output[0] in node.input)
    extracted = onnx.utils.Extractor(model).extract_model([product.input[0]], [mul.output[0]])
    x = numbers("bfloat16", 2, 3, 24)
    session = open_model(emulate(extracted), bundle)
    (found,) = run(session, [mul.output[0]], {product.input[0]: x})
    mlp = load_model(checkpoint, dtype=torch.bfloat16).model.layers[0].get_submodule("mlp")
    with torch.no_grad():
        expected = torch.nn.functional.silu(mlp.get_submodule("gate_proj")(from_numpy(x)))
    assert found.shape == (2, 3, 20)
    # The graph rounds the sigmoid and the product; PyTorch only the product.
    torch.testing.assert_close(from_numpy(found), expected, rtol=2**-7, atol=1e-6)


def test_fp32_graph_comes_back_as_it_is(exported: Exported) -> None:
    model = onnx.load(exported("two_level")[1] / "model.onnx", load_external_data=False)
    assert emulate(model) == model


# Arrays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_tensors_and_arrays(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 4) * 9).to(dtype).T
    array = to_numpy(tensor)
    assert array.shape == (4, 3) and (array.dtype == BFLOAT16) == (dtype == torch.bfloat16)
    assert np.array_equal(array.astype(np.float64), tensor.double().numpy())
    assert from_numpy(array).dtype == dtype and torch.equal(from_numpy(array), tensor)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_run_takes_and_gives_bfloat16(shape: tuple[int, ...]) -> None:
    """Any shape and layout; results are copies, which outlive their session."""
    sizes = ", ".join(map(str, shape))
    model = parse("bfloat16", f"(T[{sizes}] x) => (T[{sizes}] y, int64[r] s) {{ y = Identity(x)\n s = Shape(x) }}")
    x = np.full((*shape[::-1],), 1.5, BFLOAT16).T
    session = open_model(model)
    y, s = run(session, ["y", "s"], {"x": x})
    del session
    assert y.dtype == BFLOAT16 and y.shape == shape and np.array_equal(y, x) and s.tolist() == list(shape)
