"""The operators' portable ONNX bodies in ONNX Runtime, against the loop-level reference.

The calls are those of tests/support/operator_calls.py, which the CPU library answers too (tests/plugins/library/test_cpu.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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

from bilevel import contract
from bilevel.errors import ExportError
from bilevel.export.graph.functions import attach_functions
from bilevel.export.graph.schemas import ONNX_OPSET
from bilevel.export.graph.specialise import specialise_functions
from tests.support.operator_calls import (
    EXPERT,
    KINDS,
    ROUTE,
    Attributes,
    Inputs,
    assert_equal,
    attention_calls,
    cache_writes,
    expert_calls,
    experts_calls,
    int32,
    make_call,
    model_of,
    node_of,
    packed_attention_calls,
    packed_blocks,
    route_calls,
    run_body,
    run_reference,
    select_calls,
)

# What a body is made of


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g.node)


@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
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


@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
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


@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
def test_specialise_functions_equals_the_general_body(name: str) -> None:
    """Folded for static heads, widths and experts, it serves every batch, length and capacity."""
    inputs, attributes = make_call(name)
    model = model_of([node_of(name, attributes)])
    num_general = len(list(all_nodes(model.functions[0].node)))
    free = {"B": "batch", "L": "tokens", "U": "num_blocks", "M": "capacity", "T": "tokens"}
    for value, port in zip(model.graph.input, contract.BY_NAME[name].inputs, strict=True):
        sizes = [free.get(dim.symbol, size) for dim, size in zip(port.shape, inputs[port.name].shape, strict=True)]
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


@given(call=route_calls(fine=False))
def test_coarse_route_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("CoarseRoute", *call)


@given(call=route_calls(fine=True))
def test_fine_route_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("FineRoute", *call)


@given(call=select_calls())
def test_select_blocks_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("SelectBlocks", *call)


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


@pytest.mark.parametrize("name", ["CoarseRoute", "FineRoute", "SelectBlocks"])
def test_route_body_empty_rows_have_no_routes(name: str) -> None:
    inputs, attributes = make_call(name)
    inputs["new_len"] = int32(0, 0)
    (routes,) = assert_equal(name, inputs, attributes)
    assert (routes == -1).all()


# Attention


@given(call=attention_calls())
def test_routed_attention_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("RoutedAttention", *call)


@given(call=attention_calls(sinks=True))
def test_routed_attention_sinks_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("RoutedAttentionSinks", *call)


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


@pytest.mark.parametrize("group_score", ["external", "max", "top2_sum"])
@pytest.mark.parametrize("score_func", contract.SCORE_FUNCS)
@given(data=st.data())
@settings(max_examples=20)
def test_expert_route_body_equals_reference(data: st.DataObject, score_func: str, group_score: str) -> None:
    assert_equal("ExpertRoute", *data.draw(expert_calls(score_func, group_score)))


@given(call=experts_calls())
def test_routed_experts_body_equals_reference(call: tuple[Inputs, Attributes]) -> None:
    assert_equal("RoutedExperts", *call)


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


# Packed caches


@pytest.mark.parametrize("form", ["int8", "int4"])
@given(data=st.data())
@settings(max_examples=15)
def test_bodies_of_packed_caches_equal_the_loops(data: st.DataObject, form: str) -> None:
    """What is written byte for byte, whatever the numbers; what is read, and attention over it."""
    assert_equal("WriteCacheQuantized", *data.draw(cache_writes(form)))
    assert_equal("UnpackCache", *data.draw(packed_blocks(form)))
    assert_equal("RoutedAttentionQuantized", *data.draw(packed_attention_calls(form)))
