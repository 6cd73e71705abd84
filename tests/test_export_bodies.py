"""The operators' portable ONNX bodies in ONNX Runtime, against the loop-level reference.

Each operator is a one-node model with its body attached. Scores are sums of small whole numbers: exact in fp32 in any order, so
that routes must be equal bit for bit, and exact ties are common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from bilevel import reference
from bilevel.export.functions import attach_functions
from bilevel.export.schemas import ONNX_OPSET, PLUGIN_NAMESPACE, register_schemas
from bilevel.export.specialise import specialise_functions
from bilevel.plugins import contract
from bilevel.plugins.errors import ExportError

Inputs = dict[str, Tensor]
Attributes = dict[str, Any]
KINDS = {"int32": TensorProto.INT32, "float32": TensorProto.FLOAT, "T": TensorProto.FLOAT}
# (Hr or Hq, Hk or Hkv, Hs), among them head groups that do not nest.
HEADS = [(1, 1, 1), (2, 1, 1), (4, 2, 2), (4, 4, 2), (4, 2, 4), (6, 3, 2), (6, 2, 3), (12, 4, 6), (12, 6, 4)]
ROUTE: Attributes = {
    "block_size": 4,
    "topk": 3,
    "num_selection_heads": 2,
    "init_blocks": 1,
    "local_blocks": 1,
    "causal": 1,
}
EXPERT: Attributes = {
    "top_k": 2,
    "topk_group": 2,
    "score_func": "sigmoid",
    "group_score": "external",
    "normalize": 1,
    "scale": 2.5,
}


def node_of(name: str, attributes: Attributes, suffix: str = "") -> onnx.NodeProto:
    op = contract.BY_NAME[name]
    outputs = [f"{port.name}_out{suffix}" for port in op.outputs]
    attributes = {**attributes, PLUGIN_NAMESPACE: contract.DOMAIN}
    return helper.make_node(name, [port.name for port in op.inputs], outputs, domain=contract.DOMAIN, **attributes)


def model_of(nodes: list[onnx.NodeProto], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A model of nodes of one operator that share their inputs; all sizes are free."""
    register_schemas()
    op = contract.BY_NAME[nodes[0].op_type]
    kinds = {**KINDS, "T": kind}

    def infos(ports: tuple[contract.Port, ...], names: Iterable[str]) -> list[onnx.ValueInfoProto]:
        pairs = zip(ports, names, strict=True)
        return [helper.make_tensor_value_info(name, kinds[port.dtype], [None] * len(port.shape)) for port, name in pairs]

    outputs = [info for node in nodes for info in infos(op.outputs, node.output)]
    graph = helper.make_graph(nodes, "one", infos(op.inputs, nodes[0].input), outputs)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    return attach_functions(helper.make_model(graph, opset_imports=opsets, ir_version=11))


@functools.lru_cache(maxsize=64)
def open_body(name: str, attributes: tuple[tuple[str, Any], ...], kind: int = TensorProto.FLOAT) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model_of([node_of(name, dict(attributes))], kind).SerializeToString(), options)


def run_body(name: str, inputs: Inputs, attributes: Attributes, kind: int = TensorProto.FLOAT) -> list[Tensor]:
    session = open_body(name, tuple(attributes.items()), kind)
    return [torch.from_numpy(out) for out in session.run(None, {key: value.numpy() for key, value in inputs.items()})]


def run_reference(name: str, inputs: Inputs, attributes: Attributes) -> list[Tensor]:
    result = getattr(reference, contract.BY_NAME[name].torch_name)(*inputs.values(), **attributes)
    return list(result) if isinstance(result, tuple) else [result]


def assert_equal(name: str, inputs: Inputs, attributes: Attributes) -> list[Tensor]:
    """The body's outputs, which must be the reference's: selections exactly, floats to rounding."""
    got, expected = run_body(name, inputs, attributes), run_reference(name, inputs, attributes)
    for result, value in zip(got, expected, strict=True):
        if result.dtype == torch.int32:
            torch.testing.assert_close(result, value, rtol=0, atol=0)
        else:
            torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5)
    return got


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def whole(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator).float()


def make_call(name: str, tokens: int = 6) -> tuple[Inputs, Attributes]:
    """Valid inputs of one operator: B2, R4, N5, two rows of different lengths; ``tokens`` is L or T."""
    lengths = {"past_len": int32(20 - tokens, 3), "new_len": int32(tokens, tokens // 2)}
    route = {"query": whole(2, 4, tokens, 3), "unit_key": whole(2, 2, 5, 3)}
    blocks = torch.randint(-1, 6, (2, 2, tokens, 4), dtype=torch.int32)
    attention = {"q": torch.randn(2, 4, tokens, 6), "k": torch.randn(2, 2, 20, 6), "v": torch.randn(2, 2, 20, 6)}
    scores = {"logits": torch.randn(tokens, 8), "group_logits": torch.randn(tokens, 4), "select_bias": torch.randn(8)}
    chosen = {"ids": torch.randint(-1, 9, (tokens, 3), dtype=torch.int32), "weights": torch.randn(tokens, 3)}
    calls: dict[str, tuple[Inputs, Attributes]] = {
        "CoarseRoute": ({**route, **lengths}, ROUTE),
        "FineRoute": ({**route, "candidates": blocks, **lengths}, ROUTE),
        "RoutedAttention": ({**attention, "routes": blocks, **lengths}, {"block_size": 4, "causal": 1, "scale": 0.4}),
        "ExpertRoute": (scores, EXPERT),
        "RoutedExperts": (
            {"x": torch.randn(tokens, 6), **chosen, "gate_up": torch.randn(8, 10, 6), "down": torch.randn(8, 6, 5)},
            {},
        ),
    }
    return calls[name]


# What a body is made of


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g.node)


@pytest.mark.parametrize("name", contract.BY_NAME)
def test_attach_functions_one_level_of_standard_operators(name: str) -> None:
    model = model_of([node_of(name, make_call(name)[1])])
    assert [(f.domain, f.name) for f in model.functions] == [(contract.DOMAIN, name)]
    (function,) = model.functions
    assert {(opset.domain, opset.version) for opset in function.opset_import} == {("", ONNX_OPSET)}
    assert {opset.domain for opset in model.opset_import} == {"", contract.DOMAIN}
    nodes = list(all_nodes(function.node))
    assert {node.domain for node in nodes} == {""}
    assert not {"Loop", "Scan", "SequenceMap"} & {node.op_type for node in nodes}
    assert list(function.input) == [port.name for port in contract.BY_NAME[name].inputs]
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", contract.BY_NAME)
def test_body_in_onnx_reference_evaluator(name: str) -> None:
    """A second implementation of ONNX reads the body the same way."""
    inputs, attributes = make_call(name)
    evaluator = onnx.reference.ReferenceEvaluator(model_of([node_of(name, attributes)]))
    got = evaluator.run(None, {key: value.numpy() for key, value in inputs.items()})
    for result, value in zip(got, run_reference(name, inputs, attributes), strict=True):
        torch.testing.assert_close(torch.from_numpy(np.asarray(result)), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["float16"])
@pytest.mark.parametrize("name", ["CoarseRoute", "FineRoute", "RoutedAttention"])
def test_body_half_precision(name: str, kind: str) -> None:
    """Operands of type T may be halves; sums are still fp32."""
    inputs, attributes = make_call(name)
    halves = {p.name for p in contract.BY_NAME[name].inputs if p.dtype == "T"}
    inputs = {key: value.half() if key in halves else value for key, value in inputs.items()}
    (got,) = run_body(name, inputs, attributes, TensorProto.FLOAT16)
    (expected,) = run_reference(name, inputs, attributes)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_attach_functions_two_nodes_keep_their_own_numbers() -> None:
    """One function serves nodes with different attributes."""
    inputs, _ = make_call("CoarseRoute", 20)
    variants = [ROUTE, {**ROUTE, "topk": 1, "causal": 0}, {**ROUTE, "block_size": 5, "init_blocks": 0, "local_blocks": 2}]
    model = model_of([node_of("CoarseRoute", variant, str(i)) for i, variant in enumerate(variants)])
    assert len(model.functions) == 1
    session = ort.InferenceSession(model.SerializeToString())
    for got, variant in zip(session.run(None, {k: v.numpy() for k, v in inputs.items()}), variants, strict=True):
        assert torch.equal(torch.from_numpy(got), run_reference("CoarseRoute", inputs, variant)[0])


@pytest.mark.parametrize("name", contract.BY_NAME)
def test_specialise_functions_equals_the_general_body(name: str) -> None:
    """Folded for static heads, widths and experts, it serves every batch, length and capacity."""
    inputs, attributes = make_call(name)
    model = model_of([node_of(name, attributes)])
    num_general = len(list(all_nodes(model.functions[0].node)))
    free = {"B": "batch", "L": "tokens", "U": "num_blocks", "M": "capacity", "T": "tokens"}
    for value, port in zip(model.graph.input, contract.BY_NAME[name].inputs, strict=True):
        sizes = [free.get(symbol, size) for symbol, size in zip(port.shape, inputs[port.name].shape, strict=True)]
        value.CopyFrom(helper.make_tensor_value_info(port.name, KINDS[port.dtype], sizes))
    (function,) = specialise_functions(model).functions
    assert len(list(all_nodes(function.node))) < num_general
    assert {node.domain for node in all_nodes(function.node)} == {""}
    assert {(opset.domain, opset.version) for opset in function.opset_import} == {("", ONNX_OPSET)}
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString())
    for tokens in (1, 4, 5, 8, 9, 20):
        inputs, _ = make_call(name, tokens)
        got = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        for result, value in zip(got, run_reference(name, inputs, attributes), strict=True):
            torch.testing.assert_close(torch.from_numpy(result), value, rtol=1e-4, atol=1e-5)


def test_attach_functions_refuses_two_ways_of_scoring() -> None:
    nodes = [node_of("ExpertRoute", {**EXPERT, "score_func": f}, f) for f in ("sigmoid", "softmax")]
    with pytest.raises(ExportError, match="score in 2 ways.*use one score_func"):
        model_of(nodes)


def test_attach_functions_refuses_unknown_operator() -> None:
    graph = helper.make_graph([helper.make_node("SlowRoute", ["x"], ["y"], domain=contract.DOMAIN)], "one", [], [])
    with pytest.raises(ExportError, match="SlowRoute, which is no operator of the contract"):
        attach_functions(helper.make_model(graph))


# Routes


@st.composite
def route_calls(draw: st.DrawFn, fine: bool) -> tuple[Inputs, Attributes]:
    """Rows of different lengths (0 too), K over N, init + local over K, NaN and infinities; L on both sides of 8."""
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3]))
    block_size, num_blocks = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 8))
    length = draw(st.integers(1, min(20, block_size * num_blocks)))
    num_route_heads, num_key_heads, num_selection_heads = draw(st.sampled_from(HEADS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    inputs = {
        "query": whole(batch, num_route_heads, length, width, generator=generator),
        "unit_key": whole(batch, num_key_heads, num_blocks, width, generator=generator),
    }
    if draw(st.booleans()):
        for tensor in inputs.values():
            for value in (torch.nan, torch.inf, -torch.inf):
                tensor[torch.rand(tensor.shape, generator=generator) < 0.06] = value
    if fine:
        heads = draw(st.sampled_from([h for h in (1, 2, 3, 4, 6) if num_selection_heads % h == 0]))
        shape = (batch, heads, length, draw(st.integers(1, num_blocks + 2)))
        # Unsorted, with repeated, missing (-1) and out-of-range blocks.
        inputs["candidates"] = torch.randint(-2, num_blocks + 3, shape, generator=generator, dtype=torch.int32)
    room = block_size * num_blocks - length
    inputs["past_len"] = int32(*(draw(st.integers(0, room)) for _ in range(batch)))
    inputs["new_len"] = int32(*(draw(st.integers(0, length)) for _ in range(batch)))
    attributes = {
        "block_size": block_size,
        "topk": draw(st.integers(1, num_blocks + 2)),
        "num_selection_heads": num_selection_heads,
        "init_blocks": draw(st.integers(0, 3)),
        "local_blocks": draw(st.integers(1, 3)),
        "causal": draw(st.sampled_from([0, 1])),
    }
    return inputs, attributes


@given(call=route_calls(fine=False))
def test_coarse_route_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("CoarseRoute", *call)


@given(call=route_calls(fine=True))
def test_fine_route_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("FineRoute", *call)


@pytest.mark.parametrize("name", ["CoarseRoute", "FineRoute"])
@pytest.mark.parametrize("causal", [0, 1], ids=["full", "causal"])
@pytest.mark.parametrize("score", [0.0, torch.nan, torch.inf, -torch.inf], ids=["zero", "nan", "inf", "-inf"])
def test_route_body_all_scores_equal(name: str, causal: int, score: float) -> None:
    """Exact ties go to the lower block; NaN and -inf are never selected, +inf ties."""
    inputs, attributes = make_call(name, 20)
    inputs["past_len"], inputs["new_len"] = int32(0, 0), int32(20, 20)
    inputs["query"] = torch.full((2, 4, 20, 1), score)
    inputs["unit_key"] = torch.ones(2, 2, 5, 1)
    if name == "FineRoute":
        inputs["candidates"] = int32(4, 3, 3, 2, 1, 0).expand(2, 2, 20, 6).contiguous()
    (routes,) = assert_equal(name, inputs, {**attributes, "causal": causal})
    scored = [0, 1, 4] if score in (0.0, torch.inf) else [0, 4, -1]
    assert routes[0, 0, 19].tolist() == scored


@pytest.mark.parametrize("name", ["CoarseRoute", "FineRoute"])
def test_route_body_empty_rows_have_no_routes(name: str) -> None:
    inputs, attributes = make_call(name)
    inputs["new_len"] = int32(0, 0)
    (routes,) = assert_equal(name, inputs, attributes)
    assert (routes == -1).all()


# Attention


@st.composite
def attention_calls(draw: st.DrawFn) -> tuple[Inputs, Attributes]:
    """Routes are sets: unsorted, repeated and out of range; L on both sides of 8, where the body changes its way."""
    batch = draw(st.integers(1, 2))
    block_size, num_blocks = draw(st.sampled_from([1, 3, 4])), draw(st.integers(1, 7))
    length = draw(st.integers(1, min(20, block_size * num_blocks)))
    num_heads, num_kv_heads, num_selection_heads = draw(st.sampled_from(HEADS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens, room = block_size * num_blocks, block_size * num_blocks - length
    shape = (batch, num_selection_heads, length, draw(st.integers(1, num_blocks + 2)))
    inputs = {
        "q": normal(batch, num_heads, length, 4) * draw(st.sampled_from([1.0, 300.0])),
        "k": normal(batch, num_kv_heads, tokens, 4),
        "v": normal(batch, num_kv_heads, tokens, 4),
        "routes": torch.randint(-2, num_blocks + 2, shape, generator=generator, dtype=torch.int32),
        "past_len": int32(*(draw(st.integers(0, room)) for _ in range(batch))),
        "new_len": int32(*(draw(st.integers(0, length)) for _ in range(batch))),
    }
    return inputs, {"block_size": block_size, "causal": draw(st.sampled_from([0, 1])), "scale": 0.5}


@given(call=attention_calls())
def test_routed_attention_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("RoutedAttention", *call)


@pytest.mark.parametrize("length", [1, 8, 9, 150], ids=lambda n: f"L{n}")
@pytest.mark.parametrize("change", ["permuted", "repeated", "padded"])
def test_routed_attention_body_routes_are_a_set(length: int, change: str) -> None:
    """Also more (token, block) pairs of one block than a tile holds (L150)."""
    blocks = -(-length // 4)
    q, k, v = torch.randn(1, 4, length, 6), torch.randn(1, 2, 4 * blocks, 6), torch.randn(1, 2, 4 * blocks, 6)
    routes = torch.rand(1, 2, length, blocks).argsort(-1)[..., :3].to(torch.int32)
    inputs = {"q": q, "k": k, "v": v, "routes": routes, "past_len": int32(0), "new_len": int32(length)}
    attributes = {"block_size": 4, "causal": 1, "scale": 0.4}
    changed = {
        "permuted": routes.flip(-1),
        "repeated": torch.cat([routes, routes, routes[..., :1]], -1),
        "padded": torch.cat([torch.full_like(routes, -1), routes, torch.full_like(routes, blocks)], -1),
    }[change]
    (plain,) = assert_equal("RoutedAttention", inputs, attributes)
    (other,) = run_body("RoutedAttention", {**inputs, "routes": changed.contiguous()}, attributes)
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [5, 12], ids=["gathered", "dispatched"])
def test_routed_attention_body_rows_without_a_visible_token_give_zero(length: int) -> None:
    inputs, attributes = make_call("RoutedAttention", length)
    inputs["routes"][0, :, 1] = -1  # no route at all
    inputs["routes"][0, :, 2] = 99  # only a route that does not exist
    inputs["past_len"] = int32(0, 3)
    inputs["routes"][0, :, 0] = 4  # only a block that lies in the future
    inputs["new_len"] = int32(length, 0)
    (out,) = assert_equal("RoutedAttention", inputs, attributes)
    assert (out[0, :, :3] == 0).all() and (out[1] == 0).all()
    assert (out[0, :, 3:] != 0).any()


# Experts

# Sums of two of these scores never lie within rounding of one another unless they are equal, whatever whole bias is added.
LOGITS = torch.tensor([-2.0, 0.0, 1.0, 3.0])


@st.composite
def expert_calls(draw: st.DrawFn, score_func: str, group_score: str) -> tuple[Inputs, Attributes]:
    """Ties, negative biases, groups and experts masked by -inf, NaN; more kept than finite scores are left."""
    num_tokens = draw(st.integers(1, 6))
    num_experts, num_groups = draw(st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 3), (8, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def pick(values: Tensor, *shape: int) -> Tensor:
        picked = values[torch.randint(len(values), shape, generator=generator)]
        if masks:
            for value in (torch.nan, torch.inf, -torch.inf, -torch.inf):
                picked[torch.rand(shape, generator=generator) < 0.08] = value
        return picked

    masks = draw(st.booleans())
    inputs = {
        "logits": pick(LOGITS, num_tokens, num_experts),
        "group_logits": pick(LOGITS, num_tokens, num_groups),
        "select_bias": pick(torch.tensor([-3.0, 0.0, 1.0]), num_experts),
    }
    topk_group = draw(st.integers(1, num_groups))
    attributes = {
        "top_k": draw(st.integers(1, topk_group * num_experts // num_groups)),
        "topk_group": topk_group,
        "score_func": score_func,
        "group_score": group_score,
        "normalize": draw(st.sampled_from([0, 1])),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    return inputs, attributes


@pytest.mark.parametrize("group_score", ["external", "max", "top2_sum"])
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@given(data=st.data())
@settings(max_examples=20)
def test_expert_route_body_equals_reference(data: st.DataObject, score_func: str, group_score: str) -> None:
    assert_equal("ExpertRoute", *data.draw(expert_calls(score_func, group_score)))


@given(
    tokens=st.integers(1, 40),
    kept=st.integers(1, 4),
    experts=st.integers(1, 6),
    width=st.sampled_from([1, 5]),
    seed=st.integers(0, 2**16),
)
def test_routed_experts_body_equals_reference(tokens: int, kept: int, experts: int, width: int, seed: int) -> None:
    """Ids -1, out of range and repeated (which count twice); T on both sides of 4, where the body changes its way."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn(tokens, width, generator=generator),
        "ids": torch.randint(-1, experts + 1, (tokens, kept), generator=generator, dtype=torch.int32),
        "weights": torch.randn(tokens, kept, generator=generator),
        "gate_up": torch.randn(experts, 6, width, generator=generator),
        "down": torch.randn(experts, width, 3, generator=generator),
    }
    assert_equal("RoutedExperts", inputs, {})


@pytest.mark.parametrize("tokens", [3, 100], ids=["gathered", "dispatched"])
@pytest.mark.parametrize("ids", [(-1, -1), (2, 2), (7, 1)], ids=["none", "repeated", "out-of-range"])
def test_routed_experts_body_odd_ids(tokens: int, ids: tuple[int, int]) -> None:
    """All tokens choose alike: one expert's list is longer than a tile."""
    inputs, attributes = make_call("RoutedExperts", tokens)
    inputs["ids"], inputs["weights"] = int32(*ids).repeat(tokens, 1), torch.randn(tokens, 2)
    inputs["gate_up"], inputs["down"] = inputs["gate_up"][:4], inputs["down"][:4]
    (out,) = assert_equal("RoutedExperts", inputs, attributes)
    assert (out == 0).all() == (ids == (-1, -1))


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x], ids=["T1", "T5"])
def test_routed_experts_body_idle_tokens_give_zero(change: Callable[[Tensor], Tensor]) -> None:
    inputs, attributes = make_call("RoutedExperts", 5)
    inputs |= {name: change(inputs[name]).contiguous() for name in ("x", "ids", "weights")}
    inputs["weights"] = torch.zeros_like(inputs["weights"])
    (out,) = run_body("RoutedExperts", inputs, attributes)
    assert out.shape == inputs["x"].shape and (out == 0).all()
