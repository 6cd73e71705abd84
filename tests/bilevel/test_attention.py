"""Routed attention against the loop-level reference, dense attention, and an independent masked formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel import ops
from bilevel.operators import reference
from bilevel.operators.attention import causal_mask, masked_attention
from tests.support.attention_cases import HEADS, SHAPES, Case, make_case, masked_formula


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size, num_blocks = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 6))
    batch, capacity = draw(st.integers(1, 3)), block_size * num_blocks
    new_len = [draw(st.integers(0, min(7, capacity))) for _ in range(batch)]
    return make_case(
        draw(st.sampled_from(HEADS)),
        block_size,
        num_blocks,
        [draw(st.integers(0, capacity - max(new_len))) for _ in range(batch)],
        new_len,
        topk=draw(st.integers(1, num_blocks + 2)),
        causal=draw(st.sampled_from([0, 1])),
        width=draw(st.sampled_from([1, 5])),
        seed=draw(st.integers(0, 2**16)),
    )


@given(case=cases())
def test_routed_attention_equals_reference(case: Case) -> None:
    torch.testing.assert_close(case.attend(), case.attend(reference.routed_attention), atol=1e-5, rtol=1e-5)


@given(case=cases(), data=st.data())
def test_routed_attention_routes_are_a_set(case: Case, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(case.routes.shape[3]))))
    noise = torch.tensor([-1, case.k.shape[2] // case.block_size, 2**31 - 1, -(2**31)], dtype=torch.int32)
    noise = noise.expand(*case.routes.shape[:3], -1)
    repeated = torch.cat([noise, case.routes[..., order], case.routes], dim=-1)
    assert torch.equal(case.attend(routes=repeated), case.attend())


@given(case=cases())
def test_routed_attention_over_all_blocks_equals_dense(case: Case) -> None:
    num_blocks = case.k.shape[2] // case.block_size
    every = torch.arange(num_blocks, dtype=torch.int32).expand(*case.routes.shape[:3], -1)
    q, k, v = case.q, case.k.nan_to_num(), case.v.nan_to_num()
    mask = causal_mask(k.shape[2], q.shape[2], case.past_len, case.new_len)
    dense = masked_attention(q, k, v, mask, case.scale)
    torch.testing.assert_close(case.attend(routes=every, causal=1), dense, atol=1e-6, rtol=1e-6)


@given(case=cases())
def test_routed_attention_of_any_row_alone(case: Case) -> None:
    """A row of a call equals the same row in a call of its own, at its own position."""
    together = case.attend(causal=1)
    for i in range(case.q.shape[2]):
        past_len, new_len = case.past_len + i, (case.new_len - i).clamp(0, 1)
        alone = case.attend(
            q=case.q[:, :, i : i + 1], routes=case.routes[:, :, i : i + 1], past_len=past_len, new_len=new_len, causal=1
        )
        torch.testing.assert_close(alone, together[:, :, i : i + 1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("routes", [[-1, -1], [7, 99], [2, 2]], ids=["unused", "out-of-range", "future-block"])
def test_routed_attention_empty_row_gives_zero(routes: list[int]) -> None:
    case = make_case((4, 2, 2), 2, 3, [1], [2], topk=2)
    case.routes[:] = torch.tensor(routes, dtype=torch.int32)
    case.q.requires_grad_(True)
    for function in (ops.routed_attention, reference.routed_attention):
        assert case.attend(function, q=case.q.detach()).abs().max() == 0
    case.attend().sum().backward()
    assert case.q.grad is not None and case.q.grad.abs().max() == 0  # and no NaN


def test_routed_attention_idle_and_padded_rows_give_zero() -> None:
    case = make_case((2, 1, 1), 2, 3, [3, 0, 2], [0, 3, 1])
    case.routes[:] = torch.arange(3, dtype=torch.int32)
    out = case.attend()
    used = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert torch.equal(out.abs().amax((1, 3)) > 0, used)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_routed_attention_gradients_equal_masked_formula(shape: str, causal: int) -> None:
    """The same output and the same gradients of q, k and v as the written-out formula in float64."""
    case = make_case(*SHAPES[shape], topk=2, causal=causal)
    weight = torch.randn_like(case.q)
    inputs = [x.nan_to_num().requires_grad_(True) for x in (case.q, case.k, case.v)]
    exact = [x.detach().double().requires_grad_(True) for x in inputs]
    out = case.attend(q=inputs[0], k=inputs[1], v=inputs[2])
    truth = case.attend(masked_formula, q=exact[0], k=exact[1], v=exact[2])
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(out, inputs, weight)
    expected = torch.autograd.grad(truth, exact, weight.double())
    for gradient, true_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), true_gradient, atol=1e-5, rtol=1e-4)
        assert case.q.shape[2] == 1 or gradient.abs().max() > 0  # one token alone may be routed to nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_routed_attention_low_precision_error(shape: str, dtype: torch.dtype) -> None:
    """At most twice the error that plain torch makes in that precision, both against float64 on the same inputs."""
    case = make_case(*SHAPES[shape], topk=3, width=32)
    inputs = {name: getattr(case, name).nan_to_num().to(dtype) for name in ("q", "k", "v")}
    truth = case.attend(masked_formula, **{name: x.double() for name, x in inputs.items()})
    plain = (case.attend(masked_formula, **inputs).double() - truth).abs()
    out = case.attend(**inputs)
    ours = (out.double() - truth).abs()
    assert out.dtype == dtype
    assert torch.equal(out, case.attend(**{name: x.float() for name, x in inputs.items()}).to(dtype))  # fp32 inside
    assert ours.max() <= 2 * plain.max() and ours.square().mean() <= 4 * plain.square().mean()
