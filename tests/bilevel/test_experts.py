"""Expert routing and the chosen experts' work against the loop-level reference and independent formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel import contract, ops
from bilevel.config import Experts
from bilevel.operators import experts, reference

# (E, Gp)
SIZES = [(1, 1), (4, 1), (4, 4), (6, 2), (6, 3), (8, 4), (12, 4)]
PLAIN: dict[str, Any] = {
    "top_k": 2,
    "topk_group": 2,
    "score_func": "sigmoid",
    "group_score": "external",
    "normalize": 0,
    "scale": 1.0,
}


@st.composite
def routing_cases(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Whole-number logits, so that exact ties are common, with NaN and infinities mixed in."""
    num_tokens, (num_experts, num_groups) = draw(st.integers(1, 5)), draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def numbers(*shape: int) -> Tensor:
        values = torch.randint(-2, 3, shape, generator=generator).float()
        if draw(st.booleans()):
            for value in (torch.nan, torch.inf, -torch.inf):
                values[torch.rand(shape, generator=generator) < 0.08] = value
        return values

    topk_group = draw(st.integers(1, num_groups))
    attributes = {
        "top_k": draw(st.integers(1, topk_group * num_experts // num_groups)),
        "topk_group": topk_group,
        "score_func": draw(st.sampled_from(contract.SCORE_FUNCS)),
        "group_score": draw(st.sampled_from(["external", "max", "top2_sum"])),
        "normalize": draw(st.sampled_from([0, 1])),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "norm_floor": draw(st.sampled_from([0.0, 1e-12, 1.5])),
        "zero_fill": draw(st.sampled_from([0, 1])),
    }
    bias = numbers(num_experts) if draw(st.booleans()) else torch.zeros(num_experts)
    return (numbers(num_tokens, num_experts), numbers(num_tokens, num_groups), bias), attributes


@given(case=routing_cases())
def test_expert_route_equals_reference(case: tuple[tuple[Tensor, ...], dict[str, Any]]) -> None:
    inputs, attributes = case
    ids, weights = ops.expert_route(*inputs, **attributes)
    true_ids, true_weights = reference.expert_route(*inputs, **attributes)
    assert ids.dtype == torch.int32 and torch.equal(ids, true_ids)
    torch.testing.assert_close(weights, true_weights, atol=1e-6, rtol=1e-6)


INF, NAN = torch.inf, torch.nan
CHOICES: dict[str, tuple[list[float], list[float], list[float], dict[str, Any], list[int]]] = {
    # name: logits, group logits, bias, changed attributes, expected ids
    "ties-go-to-the-lower-index": ([1, 1, 1, 1], [0], [0] * 4, {"topk_group": 1}, [0, 1]),
    "group-ties-go-to-the-lower-index": ([1, 2, 3, 4], [5, 5, 5, 5], [0] * 4, {}, [1, 0]),
    "best-first": ([1, 3, 2, 4], [0], [0] * 4, {"topk_group": 1, "top_k": 4}, [3, 1, 2, 0]),
    "nan-is-never-chosen": ([NAN, 1, NAN, 0], [0], [0] * 4, {"topk_group": 1, "top_k": 3}, [1, 3, -1]),
    "nan-bias-is-never-chosen": ([9, 1, 9, 0], [0], [NAN, 0, NAN, 0], {"topk_group": 1}, [1, 3]),
    "minus-inf-bias-is-never-chosen": ([9, 1], [0], [-INF, 0], {"topk_group": 1}, [1, -1]),
    "nan-group-is-never-kept": ([9, 9, 1, 0], [NAN, 0], [0] * 4, {}, [2, 3]),
    "minus-inf-group-is-never-kept": ([9, 9, 1, 0], [-INF, NAN], [0] * 4, {}, [-1, -1]),
    "plus-inf-group-ties-by-index": ([1, 2, 3, 4], [0, INF, 0, INF], [0] * 4, {"top_k": 1, "topk_group": 1}, [1]),
    "group-not-kept-loses-to-negative-scores": ([5, 5, 0, 0], [0, 1], [-3] * 4, {"topk_group": 1}, [2, 3]),
    "max-of-a-group": ([0, 0, 9, -9, 1, 1], [0, 0, 0], [0] * 6, {"group_score": "max", "topk_group": 1}, [2, 3]),
    "two-best-of-a-group": (
        [0, 0, 9, -9, 1, 1],
        [0, 0, 0],
        [0] * 6,
        {"group_score": "top2_sum", "topk_group": 1},
        [4, 5],
    ),
    # Zero fill: against negative biased scores a dropped group's experts win, in their order; never one that is -inf itself.
    "zero-fill": ([0] * 6, [0, 9, -9], [-5, -5, -4, -6, -5, -5], {"topk_group": 1, "zero_fill": 1}, [0, 1]),
    "zero-fill-below-positive": ([0] * 6, [0, 9, -9], [-5, -5, -4, 0, -5, -5], {"topk_group": 1, "zero_fill": 1}, [3, 0]),
    "zero-fill-of-nothing": ([0] * 6, [0, 9, -9], [-INF, NAN, -4, -6, -5, -5], {"topk_group": 1, "zero_fill": 1}, [4, 5]),
    "softmax-of-inf-leaves-nothing": ([INF, 1, 2], [0], [0] * 3, {"score_func": "softmax", "topk_group": 1}, [-1, -1]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_expert_route_choice(name: str) -> None:
    logits, group_logits, bias, changes, expected = CHOICES[name]
    inputs = torch.tensor([logits]).float(), torch.tensor([group_logits]).float(), torch.tensor(bias).float()
    for module in (ops, reference):
        ids, weights = module.expert_route(*inputs, **{**PLAIN, **changes})
        assert ids.tolist() == [expected]
        # An empty slot weighs nothing; a filled one weighs its unbiased score.
        scores = torch.sigmoid(inputs[0][0])
        if changes.get("score_func") != "softmax":
            wanted = [float(scores[e]) if e >= 0 else 0.0 for e in expected]
            torch.testing.assert_close(weights, torch.tensor([wanted]))


@pytest.mark.parametrize("score_func", contract.SCORE_FUNCS)
def test_expert_route_weights_are_normalised(score_func: str) -> None:
    inputs = torch.randn(5, 8), torch.randn(5, 4), torch.zeros(8)
    _, weights = ops.expert_route(*inputs, **{**PLAIN, "score_func": score_func, "normalize": 1, "scale": 2.5})
    torch.testing.assert_close(weights.sum(1), torch.full((5,), 2.5))
    # Nothing chosen: the sum has an epsilon, and no weight is NaN.
    _, weights = ops.expert_route(torch.full((5, 8), NAN), *inputs[1:], **{**PLAIN, "normalize": 1})
    assert weights.abs().max() == 0


def deepseek_v3_gate(logits: Tensor, bias: Tensor, spec: Experts, fill: float) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's gate from its report (arXiv 2412.19437, section 2.1.2); ``fill`` stands in for groups not kept."""
    scores = logits.sigmoid()
    biased = (scores + bias).unflatten(1, (spec.n_group, -1))
    group_scores = biased.topk(2, dim=-1).values.sum(-1)
    kept = F.one_hot(group_scores.topk(spec.topk_group, dim=-1).indices, spec.n_group).sum(1).bool()
    inside = biased.masked_fill(~kept[..., None], fill).flatten(1)
    ids = inside.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_k]  # topk breaks ties otherwise
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * spec.scale


@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["bias-around-0", "bias-negative"])
def test_expert_route_equals_deepseek_v3(shift: float) -> None:
    spec = Experts.deepseek_v3(layers=())
    logits, bias = torch.randn(50, spec.num_experts), torch.randn(spec.num_experts) * 0.1 + shift
    inputs = logits, torch.zeros(50, spec.n_group), bias
    ids, weights = ops.expert_route(*inputs, **spec.route_attributes())
    true_ids, true_weights = deepseek_v3_gate(logits, bias, spec, fill=-torch.inf)
    assert torch.equal(ids.long(), true_ids)
    torch.testing.assert_close(weights, true_weights)
    # With negative biases 0 beats every kept expert: filling with 0 instead of -inf is another gate.
    zero_ids, zero_weights = deepseek_v3_gate(logits, bias, spec, fill=0.0)
    assert torch.equal(zero_ids, true_ids) == (shift == 0.0)
    ids, weights = ops.expert_route(*inputs, **{**spec.route_attributes(), "zero_fill": 1})
    assert torch.equal(ids.long(), zero_ids)
    torch.testing.assert_close(weights, zero_weights)


@pytest.mark.parametrize("score_func", contract.SCORE_FUNCS)
@pytest.mark.parametrize("normalize", [0, 1])
def test_expert_route_gradient_reaches_logits(score_func: str, normalize: int) -> None:
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    group_logits, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    attributes = {**PLAIN, "score_func": score_func, "normalize": normalize, "scale": 2.5}
    assert torch.autograd.gradcheck(lambda x: experts.expert_route(x, group_logits, bias, **attributes)[1], logits)


def make_experts(tokens: int, top_k: int, num_experts: int, width: int, inner: int) -> tuple[Tensor, ...]:
    """ids as a router may give them: repeated, unused (-1), out of range."""
    generator = torch.Generator().manual_seed(tokens * 7 + num_experts)
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator, dtype=torch.int32)
    shapes = [(tokens, width), (tokens, top_k), (num_experts, 2 * inner, width), (num_experts, width, inner)]
    x, weights, gate_up, down = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, ids, weights, gate_up, down


EXPERT_SHAPES = {"T1-k1-E1-d1-f1": (1, 1, 1, 1, 1), "T7-k3-E5-d6-f4": (7, 3, 5, 6, 4), "T2-k4-E3-d5-f9": (2, 4, 3, 5, 9)}


@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_routed_experts_equals_reference(shape: str) -> None:
    inputs = make_experts(*EXPERT_SHAPES[shape])
    torch.testing.assert_close(ops.routed_experts(*inputs), reference.routed_experts(*inputs), atol=1e-5, rtol=1e-5)


def test_routed_experts_without_a_choice_gives_zero() -> None:
    x, ids, weights, gate_up, down = make_experts(4, 2, 3, 5, 6)
    out = ops.routed_experts(x, torch.full_like(ids, -1), weights, gate_up, down)
    assert out.shape == x.shape and out.abs().max() == 0


def test_routed_experts_order_of_choices_does_not_matter() -> None:
    x, ids, weights, gate_up, down = make_experts(6, 3, 4, 5, 6)
    flipped = ops.routed_experts(x, ids.flip(1), weights.flip(1), gate_up, down)
    torch.testing.assert_close(flipped, ops.routed_experts(x, ids, weights, gate_up, down), atol=1e-5, rtol=1e-5)


def test_routed_experts_all_chosen_equals_dense_mixture_with_gradients() -> None:
    """Every expert chosen once: the output and all gradients of the dense formula, computed in float64."""
    tokens, num_experts = 4, 3
    x, _, weights, gate_up, down = make_experts(tokens, num_experts, num_experts, 5, 6)
    ids = torch.stack([torch.randperm(num_experts) for _ in range(tokens)]).int()
    inputs = [t.requires_grad_(True) for t in (x, weights, gate_up, down)]
    out = ops.routed_experts(x, ids, weights, gate_up, down)

    exact = [t.detach().double().requires_grad_(True) for t in inputs]
    gate, up = torch.einsum("efd,td->etf", exact[2], exact[0]).chunk(2, dim=-1)
    each = torch.einsum("edf,etf->ted", exact[3], F.silu(gate) * up)
    truth = (exact[1][..., None] * each.gather(1, ids.long()[..., None].expand(-1, -1, 5))).sum(1)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)

    direction = torch.randn_like(out)
    expected = torch.autograd.grad(truth, exact, direction.double())
    for gradient, true_gradient in zip(torch.autograd.grad(out, inputs, direction), expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient.double(), true_gradient, atol=1e-4, rtol=1e-4)


def test_routed_experts_low_precision_accumulates_in_fp32() -> None:
    """256 + 1 - 256 over three experts: a bfloat16 sum would lose the 1."""
    x, ids = torch.ones(1, 1).bfloat16(), torch.tensor([[0, 1, 2]], dtype=torch.int32)
    gate_up, down = torch.tensor([[[20.0], [1.0]]] * 3).bfloat16(), torch.full((3, 1, 1), 0.05).bfloat16()
    weights = torch.tensor([[256.0, 1.0, -256.0]])
    expected = reference.routed_experts(x, ids, weights, gate_up, down)
    assert expected.item() == pytest.approx(1.0, rel=0.01)
    assert torch.equal(ops.routed_experts(x, ids, weights, gate_up, down), expected)


def every_expert(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts over all tokens, and then the chosen ones' weighted sum: differentiable in everything."""
    gate, up = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)
    results = torch.einsum("etf,edf->etd", F.silu(gate) * up, down)
    share = torch.stack([(weights * (ids == expert)).sum(1) for expert in range(len(down))])
    return (share[..., None] * results).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "width", "hidden", "num_experts", "kept"), [(37, 16, 8, 5, 2), (1, 8, 16, 6, 3), (9, 24, 8, 1, 1)]
)
def test_grouped_experts_have_the_loops_outputs_and_gradients(
    tokens: int, width: int, hidden: int, num_experts: int, kept: int, dtype: torch.dtype
) -> None:
    """Widths that the grouped products take, experts that nobody chose, ids out of range and repeated; against fp64."""
    generator = torch.Generator().manual_seed(5)
    x, weights = torch.randn(tokens, width, generator=generator), torch.rand(tokens, kept, generator=generator)
    gate_up = torch.randn(num_experts, 2 * hidden, width, generator=generator) / 4
    down = torch.randn(num_experts, width, hidden, generator=generator) / 4
    ids = torch.randint(-1, num_experts + 1, (tokens, kept), generator=generator, dtype=torch.int32)
    upstream = torch.randn(tokens, width, generator=generator)

    def learned(wide: bool) -> list[Tensor]:
        rounded = [x.to(dtype), weights, gate_up.to(dtype), down.to(dtype)]
        leaves = [(each.double() if wide else each).detach().clone().requires_grad_(True) for each in rounded]
        out = (every_expert if wide else ops.routed_experts)(leaves[0], ids, *leaves[1:])
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for value, truth in zip(learned(False), learned(True), strict=True):
        assert (value - truth).abs().max() <= tolerance * max(truth.abs().max().item(), 1.0)


def test_grouped_experts_that_nobody_chose_give_zero() -> None:
    x = torch.randn(3, 8)
    out = ops.routed_experts(
        x, torch.full((3, 2), -1, dtype=torch.int32), torch.rand(3, 2), torch.randn(4, 16, 8), torch.randn(4, 8, 8)
    )
    assert out.abs().max() == 0
