"""How ``bilevel.ops`` comes to the GPU kernels, shown with CPU tensors in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import contract, gpu_kernels, ops
from bilevel.state import Trace
from tests.support.operator_calls import Attributes, Inputs, make_call
from tests.support.tiny_models import make_model
from tests.support.triton_calls import triton_launch

NAMES = [op.name for op in contract.OPS if op in contract.GPU_OPS]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The operators that kernels ran; for the test's time CPU tensors count as a GPU's."""
    names: list[str] = []
    run = triton_launch.run

    def noted(op: contract.Op, *rest: Any) -> Any:
        names.append(op.name)
        with np.errstate(invalid="ignore"):  # 0/0 in rows without a token, which the kernels then replace
            return run(op, *rest)

    monkeypatch.setattr(gpu_kernels, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(triton_launch, "run", noted)
    gpu_kernels._load.cache_clear()
    yield names
    gpu_kernels._load.cache_clear()


def call(name: str, inputs: Inputs, attributes: Attributes) -> Any:
    return getattr(ops, contract.BY_NAME[name].torch_name)(*inputs.values(), **attributes)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_run_on_their_device(name: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's function and the registered operator; the same results as PyTorch's form."""
    inputs, attributes = make_call(name, 2)
    node = getattr(torch.ops.bilevel, contract.BY_NAME[name].torch_name)
    found = call(name, inputs, attributes), node(*inputs.values(), **attributes)
    assert used == [name, name]
    monkeypatch.setattr(gpu_kernels, "DEVICES", frozenset({"cuda"}))
    expected = call(name, inputs, attributes)
    assert used == [name, name]  # a CPU tensor is none of theirs
    for outputs in found:
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_where_a_gradient_is_asked_pytorch_runs(name: str, used: list[str]) -> None:
    """Routes have no gradient, whatever their inputs ask for."""
    inputs, attributes = make_call(name, 2)
    first = next(iter(inputs))
    inputs[first].requires_grad_()
    outputs = call(name, inputs, attributes)
    if name in ("CoarseRoute", "FineRoute", "SelectBlocks"):
        assert used == [name]
        return
    assert used == []
    (outputs[1] if name == "ExpertRoute" else outputs).sum().backward()
    assert inputs[first].grad is not None
    with torch.no_grad():
        call(name, inputs, attributes)
    assert used == [name]


def test_what_kernels_do_not_cover_pytorch_runs(used: list[str]) -> None:
    inputs, attributes = make_call("CoarseRoute", 2)
    assert call("CoarseRoute", inputs, {**attributes, "topk": 129}).shape[-1] == 129
    inputs, attributes = make_call("RoutedAttention", 2)
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    assert call("RoutedAttention", wide, attributes).dtype == torch.float64
    assert used == []
    assert not triton_launch.covers(
        contract.ROUTED_ATTENTION, [*list(inputs.values())[:-1], inputs["new_len"].to("meta")], attributes
    )


def test_an_operator_without_kernels_runs_in_pytorch(used: list[str]) -> None:
    inputs, attributes = make_call("RoutedExpertsQuantized", 2)
    assert call("RoutedExpertsQuantized", inputs, attributes).shape == (2, 40) and used == []


def test_tensors_that_are_not_contiguous(used: list[str]) -> None:
    inputs, attributes = make_call("RoutedAttention", 2)
    expected = call("RoutedAttention", inputs, attributes)
    apart = {key: x.mT.contiguous().mT if x.dim() > 1 else x for key, x in inputs.items()}
    assert not apart["k"].is_contiguous()
    assert torch.equal(call("RoutedAttention", apart, attributes), expected) and len(used) == 2


def test_compiled_modules_are_traced_through_pytorch(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, attributes = make_call("RoutedExperts", 2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    call("RoutedExperts", inputs, attributes)
    assert used == []


def test_switched_off_or_without_triton(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, attributes = make_call("ExpertRoute", 2)
    with monkeypatch.context() as without:
        without.setenv(gpu_kernels.VARIABLE, "None")
        call("ExpertRoute", inputs, attributes)
    gpu_kernels._load.cache_clear()
    with monkeypatch.context() as without:
        find = importlib.util.find_spec
        without.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
        call("ExpertRoute", inputs, attributes)
    assert used == []
    gpu_kernels._load.cache_clear()
    call("ExpertRoute", inputs, attributes)
    assert used == ["ExpertRoute"]


def test_a_model_gives_the_same_routes_and_logits(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder with both levels of both routings; 13 tokens, 4 a block."""
    model = make_model("two_level")
    tokens = torch.randint(0, model.config.vocab_size, (1, 13))
    results = []
    for devices in ({"cpu"}, {"cuda"}):
        monkeypatch.setattr(gpu_kernels, "DEVICES", frozenset(devices))
        trace = Trace()
        with torch.no_grad():
            results.append((model(tokens, trace=trace), trace))
    (logits, trace), (expected, plain) = results
    assert {name: used.count(name) for name in NAMES} == {
        "CoarseRoute": 1,
        "FineRoute": 2,
        "SelectBlocks": 0,
        "RoutedAttention": 2,
        "ExpertRoute": 1,
        "RoutedExperts": 1,
    }
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(trace.candidates, plain.candidates) and torch.equal(trace.expert_ids[0], plain.expert_ids[0])
