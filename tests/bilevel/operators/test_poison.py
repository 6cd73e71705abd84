"""What an operator must not read may hold anything: NaN, infinities and 3e38 there change nothing, in every execution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import contract, ops
from bilevel.operators import experts, reference
from tests.support.attention_executions import DIFFERENTIABLE, EXECUTIONS, PACKED_EXECUTIONS, Execution
from tests.support.cpu_library import run_kernel, sets_here
from tests.support.operator_calls import Attributes, Inputs, attention_calls, int32, make_call, packed_attention_calls, run_body
from tests.support.poison import WORST, poison_attention
from tests.support.triton_calls import run_kernels

SINGLE = pytest.mark.parametrize("single", [False, True], ids=["nobody reads", "one row does not read"])
Executions = dict[str, Execution]
GPU = [name for name in EXECUTIONS if name.startswith("GPU")]  # interpreted: seconds an example


def assert_reads_its_routes_only(
    execution: str, single: bool, inputs: Inputs, attributes: Attributes, seed: int, executions: Executions = EXECUTIONS
) -> None:
    attend = executions[execution]
    poisoned, judged, _ = poison_attention(inputs, attributes, seed, single=single)
    before, after = attend(inputs, attributes), attend(poisoned, attributes)
    torch.testing.assert_close(after[judged], before[judged], rtol=1e-5, atol=1e-6)
    idle = torch.arange(before.shape[2]) >= inputs["new_len"][:, None, None]
    assert (after[idle.expand(before.shape[:3])] == 0).all()


@SINGLE
@pytest.mark.parametrize("execution", [name for name in EXECUTIONS if name not in GPU])
@given(call=attention_calls(), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_attention_reads_its_routes_only(execution: str, single: bool, call: tuple[Inputs, Attributes], seed: int) -> None:
    assert_reads_its_routes_only(execution, single, *call, seed)


@SINGLE
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("execution", PACKED_EXECUTIONS)
@given(data=st.data(), seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_attention_over_packed_caches_reads_its_routes_only(
    execution: str, form: str, single: bool, data: st.DataObject, seed: int
) -> None:
    assert_reads_its_routes_only(execution, single, *data.draw(packed_attention_calls(form)), seed, PACKED_EXECUTIONS)


@SINGLE
@pytest.mark.parametrize("execution", GPU)
def test_attention_kernels_read_their_routes_only(execution: str, single: bool) -> None:
    inputs, attributes = make_call("RoutedAttention", 11 if "tiles" in execution else 3)
    inputs["routes"][:, :, :, 0] = 3  # blocks that some rows of a tile see in part
    assert_reads_its_routes_only(execution, single, inputs, attributes, 0)


def gradients(attend: Any, inputs: Inputs, attributes: Attributes, judged: Tensor, factor: Tensor) -> dict[str, Tensor]:
    """Of a loss that holds the judged rows only, by q, k and v."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("q", "k", "v")}
    out = attend({**inputs, **leaves}, attributes)
    torch.where(judged[..., None], out * factor, 0.0).sum().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("execution", DIFFERENTIABLE)
@given(call=attention_calls(), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_attention_has_gradients_for_its_routes_only(execution: str, call: tuple[Inputs, Attributes], seed: int) -> None:
    """A row that does read poison has no gradient in numbers, and so have the tokens that it shares: here nobody reads it."""
    inputs, attributes = call
    attend = DIFFERENTIABLE[execution]
    poisoned, judged, read = poison_attention(inputs, attributes, seed, single=False)
    factor = torch.randn(attend(inputs, attributes).shape, generator=torch.Generator().manual_seed(seed))
    before, after = (gradients(attend, x, attributes, judged, factor) for x in (inputs, poisoned))
    for name, where in read.items():
        torch.testing.assert_close(after[name][where], before[name][where], rtol=1e-4, atol=1e-4)
        assert (after[name][~where] == 0).all(), name


def every_execution(name: str, inputs: Inputs, attributes: Attributes) -> dict[str, list[Tensor]]:
    """{execution: outputs} of any operator."""
    function = getattr(ops, contract.BY_NAME[name].torch_name)
    loops = getattr(reference, contract.BY_NAME[name].torch_name)
    answers = {"loops": loops(*inputs.values(), **attributes), "PyTorch": function(*inputs.values(), **attributes)}
    outputs = {key: list(value) if isinstance(value, tuple) else [value] for key, value in answers.items()}
    outputs["body"] = run_body(name, inputs, attributes)
    outputs |= {f"CPU kernel, {isa}": run_kernel(name, inputs, attributes, isa) for isa in sets_here()}
    return outputs | {f"GPU kernel, {plan}": out for plan, out in run_kernels(name, inputs, attributes).items()}


@pytest.mark.parametrize("value", [torch.nan, 3e38])
@pytest.mark.parametrize("name", ["CoarseRoute", "FineRoute"])
def test_routes_do_not_depend_on_blocks_that_are_not_complete(name: str, value: float) -> None:
    """Unit keys of incomplete blocks and of those behind the text, queries and candidates of rows that are none."""
    inputs, attributes = make_call(name, 7)
    inputs["past_len"], inputs["new_len"] = int32(2, 11), int32(4, 7)  # 1 and 4 complete blocks of 4 tokens
    expected = every_execution(name, inputs, attributes)["loops"][0]
    inputs["unit_key"][0, :, 1:], inputs["unit_key"][1, :, 4:], inputs["query"][0, :, 4:] = value, value, value
    if name == "FineRoute":
        inputs["candidates"][0, :, 4:] = WORST
    for execution, (routes,) in every_execution(name, inputs, attributes).items():
        assert torch.equal(routes, expected), execution


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_block_s_key_does_not_depend_on_other_blocks(value: float) -> None:
    """The mean of a block that is not complete may be anything: nobody scores it."""
    tokens = torch.randn(1, 2, 12, 3)
    keys = ops.pool_blocks(tokens, int32(0), 3, 4)
    tokens[:, :, 9:] = value
    assert torch.equal(ops.pool_blocks(tokens, int32(0), 3, 4)[:, :, :2], keys[:, :, :2])


@pytest.mark.parametrize(
    ("tokens", "value"), [(3, torch.inf), (3, 3e38), (9, torch.nan)], ids=["few, inf", "few, 3e38", "many, NaN"]
)
def test_experts_that_nobody_chose_are_not_read(tokens: int, value: float) -> None:
    """Ids of -1 and out of range: neither weights of theirs nor expert 0 count, nor does a token that chose nobody."""
    inputs, attributes = make_call("RoutedExperts", tokens)
    ids = torch.randint(2, 7, (tokens, 3), dtype=torch.int32)
    ids[::2, 1], ids[1::2, 2], ids[-1] = -1, 8, -1
    inputs["ids"] = ids
    (expected,) = every_execution("RoutedExperts", inputs, attributes)["loops"]
    inputs["weights"][(ids < 0) | (ids > 7)] = value
    inputs["x"][-1] = value
    for weight in (inputs["gate_up"], inputs["down"]):
        weight[[0, 1, 7]] = value
    for execution, (out,) in every_execution("RoutedExperts", inputs, attributes).items():
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, msg=lambda text, e=execution: f"{e}: {text}")
        assert (out[-1] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_experts_that_nobody_chose_have_no_gradient(value: float) -> None:
    inputs, _ = make_call("RoutedExperts", 6)
    inputs["ids"] = torch.randint(2, 7, (6, 3), dtype=torch.int32)
    inputs["ids"][:, 1] = -1
    inputs["weights"][:, 1], inputs["gate_up"][0], inputs["down"][0] = value, value, value
    leaves = {key: inputs[key].requires_grad_() for key in ("x", "weights", "gate_up", "down")}
    experts.routed_experts(*inputs.values()).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.isfinite().all(), name
    assert (leaves["weights"].grad[:, 1] == 0).all() and (leaves["down"].grad[0] == 0).all()  # type: ignore[index]
