"""RoutedAttention's GPU kernels in Triton's interpreter, both plans, against the loops, PyTorch and float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bilevel.operators import attention, routing
from tests.support.operator_calls import Attributes, Inputs, int32
from tests.support.triton_calls import check, plans_of, run_kernels, run_one


@dataclass(frozen=True)
class Case:
    """``heads``: Hq, Hkv, Hs; ``width``: also not a power of two; ``size``: tokens per block, also odd ones."""

    heads: tuple[int, int, int]
    width: int
    size: int
    blocks: int
    topk: int
    causal: int = 1

    def call(self, length: int, dtype: torch.dtype = torch.float32) -> tuple[Inputs, Attributes]:
        """Routes are unsorted, repeated and out of range, or empty. Row 0 is full, row 1 short. What no row may see is NaN."""
        heads, kv_heads, choices = self.heads
        capacity = self.size * self.blocks
        k, v = (torch.randn(2, kv_heads, capacity, self.width) for _ in range(2))
        past_len, new_len = int32(capacity - length, 3), int32(length, length // 2)
        for x in (k, v):
            x[1, :, 3 + length // 2 :] = torch.nan
        routes = torch.randint(-2, self.blocks + 2, (2, choices, length, self.topk), dtype=torch.int32)
        routes[torch.rand(routes.shape[:3]) < 0.15] = -1
        inputs = {"q": torch.randn(2, heads, length, self.width).to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
        attributes = {"block_size": self.size, "causal": self.causal, "scale": self.width**-0.5}
        return {**inputs, "routes": routes, "past_len": past_len, "new_len": new_len}, attributes


CASES = {
    "one-choice-a-kv-head": Case((4, 2, 2), 64, 16, 4, 3),
    "heads-that-do-not-nest-width-80": Case((6, 3, 2), 80, 48, 2, 2),
    "one-choice-a-head-small-blocks": Case((2, 1, 2), 20, 5, 9, 7),
    "one-choice-for-all-blocks-over-a-step-not-causal": Case((6, 2, 1), 16, 80, 2, 2, causal=0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_few_tokens_equal_reference(case: Case) -> None:
    check("RoutedAttention", *case.call(2))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_many_tokens_equal_reference(case: Case) -> None:
    """More positions than one tile holds, where the cache has room for them."""
    check("RoutedAttention", *case.call(min(70, case.size * case.blocks - 3)), only="tiles")


def exact(inputs: Inputs, attributes: Attributes) -> Tensor:
    """RoutedAttention in float64."""
    q, k, v, routes, past_len, new_len = (x.double().nan_to_num() if x.is_floating_point() else x for x in inputs.values())
    capacity, block_size = k.shape[2], attributes["block_size"]
    kept = routing.block_mask(routes, capacity // block_size).repeat_interleave(block_size, dim=-1)
    mask = attention.visible_tokens(capacity, q.shape[2], past_len, new_len, bool(attributes["causal"]))[:, None]
    mask = mask & kept[:, routing.head_map(q.shape[1], routes.shape[1])]
    kv_head = routing.head_map(q.shape[1], k.shape[1])
    scores = (q @ k[:, kv_head].mT * attributes["scale"]).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v[:, kv_head]


@pytest.mark.parametrize(
    ("case", "length", "dtype", "plan"),
    [
        (Case((4, 1, 1), 128, 64, 3, 2), 12, torch.float16, "tiles"),
        (Case((4, 1, 1), 128, 64, 3, 2), 2, torch.float16, "split"),
        (Case((2, 2, 1), 96, 16, 12, 6), 40, torch.bfloat16, "tiles"),
        (Case((2, 1, 1), 96, 16, 12, 6), 2, torch.bfloat16, "split"),
        (Case((16, 1, 1), 256, 128, 2, 2, causal=0), 4, torch.float16, "tiles"),
        (Case((3, 1, 1), 32, 32, 8, 4), 40, torch.float32, "tiles"),
        (Case((3, 1, 1), 32, 32, 8, 4), 2, torch.float32, "split"),
    ],
    ids=lambda x: str(x).removeprefix("torch.") if isinstance(x, (torch.dtype, str)) else None,
)
def test_errors_are_at_most_twice_pytorchs(case: Case, length: int, dtype: torch.dtype, plan: str) -> None:
    """PyTorch's form computes in fp32 and rounds once, so most of its error in 16 bits is that of the result's rounding."""
    inputs, attributes = case.call(length, dtype)
    truth = exact(inputs, attributes)

    def error(out: Tensor) -> tuple[float, float]:
        return float((out - truth).square().mean().sqrt()), float((out - truth).abs().max())

    (out,) = run_kernels("RoutedAttention", inputs, attributes, only=plan)[plan]
    got, plain = error(out), error(attention.routed_attention(*inputs.values(), **attributes))
    assert got[0] <= 2 * plain[0] and got[1] <= 2 * plain[1]
    assert (out[(truth == 0).all(-1)] == 0).all()


@pytest.mark.parametrize("plan", ["split", "tiles"])
def test_what_no_row_may_see_changes_no_bit(plan: str) -> None:
    """Garbage behind the text, in blocks that no position kept, in the padding of the call; routes in another order."""
    inputs, attributes = Case((4, 2, 2), 24, 4, 8, 5).call(3)
    routes = inputs["routes"]
    routes[routes == 2] = 1
    (plain,) = run_kernels("RoutedAttention", inputs, attributes, only=plan)[plan]
    for x in (inputs["k"], inputs["v"]):
        x[:, :, 8:12], x[1, :, 4:] = torch.nan, torch.inf
    inputs["q"][1, :, 1:], routes[1, :, 1:] = torch.nan, 2
    assert torch.equal(run_kernels("RoutedAttention", inputs, attributes, only=plan)[plan][0], plain)
    inputs["routes"] = torch.cat([routes.flip(-1), routes], -1)
    (shuffled,) = run_kernels("RoutedAttention", inputs, attributes, only=plan)[plan]
    if plan == "tiles":  # blocks are read in ascending order, whatever the order of a route
        assert torch.equal(shuffled, plain)
    torch.testing.assert_close(shuffled, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus-inf"])
def test_odd_values_as_in_the_reference(value: float) -> None:
    """Also rows all of whose scores are -inf, which are NaN as in any softmax."""
    inputs, attributes = Case((2, 1, 1), 8, 4, 5, 3).call(3)
    for name in ("q", "k"):
        inputs[name][torch.rand(inputs[name].shape) < 0.05] = value
    (out,) = check("RoutedAttention", inputs, attributes)
    assert out.isnan().any() and not out.isnan().all()


def test_all_scores_minus_infinity() -> None:
    """NaN where nothing has a weight, but one finite score is enough."""
    q, k, v = torch.ones(1, 1, 2, 4), torch.full((1, 1, 80, 4), -torch.inf), torch.randn(1, 1, 80, 4)
    routes = torch.arange(5, dtype=torch.int32).expand(1, 1, 2, 5).contiguous()
    inputs = {"q": q, "k": k, "v": v, "routes": routes, "past_len": int32(70), "new_len": int32(2)}
    attributes = {"block_size": 16, "causal": 1, "scale": 1.0}
    assert check("RoutedAttention", inputs, attributes)[0].isnan().all()
    k[:, :, 50] = 1.0
    (out,) = check("RoutedAttention", inputs, attributes)
    assert torch.equal(out, v[:, :, 50:51].expand_as(out))


def test_tiles_list_the_blocks_that_some_position_kept() -> None:
    """Work only for those: the list of a tile is the union of its routes, ascending, with one bit per reading position."""
    routes = torch.tensor([[7, 2, 2], [-1, 40, 9], [9, 2, -5], [0, 1, 2]], dtype=torch.int32).reshape(1, 1, 4, 3)
    k = torch.randn(1, 1, 40, 16)
    inputs = {"q": torch.randn(1, 1, 4, 16), "k": k, "v": k, "routes": routes, "past_len": int32(33), "new_len": int32(3)}
    attributes = {"block_size": 4, "causal": 1, "scale": 1.0}
    (_, plan), sizes = plans_of("RoutedAttention", inputs, attributes)
    _, workspace = run_one(plan, "RoutedAttention", inputs, attributes)
    blocks, bits = (workspace[first : first + size].view(torch.int32) for first, size in plan.offsets(sizes).values())
    # Position 1, token 34, sees nothing of what it kept: block 9 begins at token 36, block 40 is none. Position 3 is idle.
    assert blocks[:3].tolist() == [2, 2, 7] and bits[:3].tolist() == [0b101, 0b101, 0b001]
    assert blocks[3] == -1


def test_offsets_have_64_bits() -> None:
    """The last blocks of a cache of 1,048,576 tokens, 2^31 elements and more (the memory is reserved, not touched)."""
    heads, capacity, width, size = 9, 2**20, 256, 64
    k = torch.empty(1, heads, capacity, width, dtype=torch.float16)
    last = capacity // size - 1
    k[0, -1, 3 * size : 4 * size], k[0, -1, last * size :] = torch.randn(2, size, width).half()
    q, routes = torch.randn(1, heads, 1, width).half(), torch.full((1, heads, 1, 2), -1, dtype=torch.int32)
    routes[0, -1, 0] = int32(last, 3)
    inputs = {"q": q, "k": k, "v": k, "routes": routes, "past_len": int32(capacity - 1), "new_len": int32(1)}
    keys = torch.cat([k[0, -1, j * size : (j + 1) * size] for j in (3, last)]).double()
    expected = torch.softmax(keys @ q[0, -1, 0].double() * 0.05, 0) @ keys
    for outputs in run_kernels("RoutedAttention", inputs, {"block_size": size, "causal": 1, "scale": 0.05}).values():
        torch.testing.assert_close(outputs[0][0, -1, 0].double(), expected, rtol=2e-3, atol=2e-3)
        assert (outputs[0][0, :-1] == 0).all()


def test_idle_rows_and_empty_calls() -> None:
    inputs, attributes = Case((2, 1, 1), 8, 4, 3, 2).call(2)
    assert (check("RoutedAttention", {**inputs, "new_len": int32(0, 0)}, attributes)[0] == 0).all()
    for axis, names in ((0, inputs), (2, ("q", "routes"))):
        empty = {key: x.narrow(axis, 0, 0).contiguous() if key in names else x for key, x in inputs.items()}
        for outputs in run_kernels("RoutedAttention", empty, attributes).values():
            assert outputs[0].numel() == 0
