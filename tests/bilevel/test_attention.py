"""Routed attention against the loop-level reference, dense attention, and an independent masked formula in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ops
from bilevel.operators import reference
from bilevel.operators.attention import causal_mask, masked_attention

# (Hq, Hkv, Hs), among them groups that do not nest: Hq=12, Hkv=4, Hs=6.
HEADS = [(1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 4), (4, 4, 2), (6, 2, 3), (6, 3, 2), (12, 4, 6)]


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    routes: Tensor
    past_len: Tensor
    new_len: Tensor
    block_size: int
    causal: int
    scale: float = 0.7

    def attend(self, function: object = ops.routed_attention, **changes: object) -> Tensor:
        values = {**vars(self), **changes}
        attributes = {name: values.pop(name) for name in ("block_size", "causal", "scale")}
        return function(*values.values(), **attributes)  # type: ignore[operator]


def make_case(
    heads: tuple[int, int, int],
    block_size: int,
    num_blocks: int,
    past_len: list[int],
    new_len: list[int],
    *,
    topk: int = 3,
    causal: int = 1,
    width: int = 5,
    seed: int = 0,
) -> Case:
    """Random inputs; routes repeat themselves and point outside the cache; tokens that nobody may see are NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, capacity = len(past_len), max(*new_len, 1), num_blocks * block_size

    def normal(num_heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, num_heads, tokens, width, generator=generator)

    q, k, v = normal(heads[0], length), normal(heads[1], capacity), normal(heads[1], capacity)
    for b in range(batch):
        k[b, :, past_len[b] + new_len[b] :] = torch.nan
        v[b, :, past_len[b] + new_len[b] :] = torch.nan
    shape = (batch, heads[2], length, topk)
    routes = torch.randint(-2, num_blocks + 2, shape, generator=generator, dtype=torch.int32)
    lengths = (torch.tensor(n, dtype=torch.int32) for n in (past_len, new_len))
    return Case(q, k, v, routes, *lengths, block_size=block_size, causal=causal)


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


def masked_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    past_len: Tensor,
    new_len: Tensor,
    *,
    block_size: int,
    causal: int,
    scale: float,
) -> Tensor:
    """softmax(scale q k' + mask) v in the inputs' own dtype: one mask over all tokens, written out from the definition."""
    batch, num_heads, length, _ = q.shape
    mask = torch.zeros(batch, num_heads, length, k.shape[2], dtype=torch.bool)
    for b, h, i, t in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist():
        position, valid = int(past_len[b]) + i, int(past_len[b] + new_len[b])
        blocks = routes[b, h * routes.shape[1] // num_heads, i].tolist()
        mask[b, h, i, t] = i < new_len[b] and t // block_size in blocks and t < (position + 1 if causal else valid)
    k, v = (x.nan_to_num().repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    score = torch.where(mask, q @ k.mT * scale, torch.finfo(q.dtype).min)
    return torch.where(mask, score.softmax(-1), 0.0) @ v


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


SHAPES = {
    "B1-Hq1-Hkv1-Hs1-R1-L1": ((1, 1, 1), 1, 1, [0], [1]),
    "B2-Hq4-Hkv2-Hs2-R3-L5": ((4, 2, 2), 3, 4, [6, 0], [5, 2]),
    "B3-Hq6-Hkv3-Hs2-R4-L7": ((6, 3, 2), 4, 3, [5, 1, 3], [7, 0, 4]),
    "B1-Hq12-Hkv4-Hs6-R2-L6": ((12, 4, 6), 2, 5, [3], [6]),
}


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
