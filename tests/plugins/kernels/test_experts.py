"""ExpertRoute's and RoutedExperts' GPU kernels in Triton's interpreter, every plan, against the loops, PyTorch and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import contract
from bilevel.operators import experts
from tests.support.operator_calls import BOUNDED, EXPERT, SWIGLU, Inputs, expert_calls, make_call
from tests.support.triton_calls import check, run_kernels


@pytest.mark.parametrize("group_score", ["external", "max", "top2_sum"])
@pytest.mark.parametrize("score_func", contract.SCORE_FUNCS)
@given(data=st.data())
@settings(max_examples=4)
def test_expert_route_equals_reference(data: st.DataObject, score_func: str, group_score: str) -> None:
    """Ties, negative biases, groups and experts masked by -inf, NaN; more kept than finite scores are left."""
    check("ExpertRoute", *data.draw(expert_calls(score_func, group_score)))


def test_expert_route_of_deepseek() -> None:
    """256 experts in 8 groups of which 4 are kept; 60 experts in 6 groups, neither a power of two."""
    for num_experts, groups, kept, top_k in ((256, 8, 4, 8), (60, 6, 3, 5)):
        inputs = {"logits": torch.randn(3, num_experts), "group_logits": torch.zeros(3, groups)}
        inputs["select_bias"] = torch.randn(num_experts)
        choice = {"top_k": top_k, "topk_group": kept, "score_func": "sigmoid", "group_score": "top2_sum"}
        ids, _ = check("ExpertRoute", inputs, {**EXPERT, **choice})
        assert (ids >= 0).all()


def test_expert_route_minus_zero_ties_with_zero() -> None:
    inputs, attributes = make_call("ExpertRoute")
    inputs["group_logits"] = torch.tensor([-0.0, 0.0, -0.0, 0.0]).expand(6, 4).contiguous()
    (ids, _) = check("ExpertRoute", inputs, attributes)
    assert (ids // 2 < 2).all()  # the first two of four groups


def test_expert_route_keeps_no_group_without_a_finite_score() -> None:
    """Three groups may be kept, one can be: its two experts are chosen and nobody else."""
    inputs, attributes = make_call("ExpertRoute")
    inputs["group_logits"] = torch.tensor([-torch.inf, 1.0, torch.nan, -torch.inf]).expand(6, 4).contiguous()
    (ids, weights) = check("ExpertRoute", inputs, {**attributes, "topk_group": 3, "top_k": 4})
    assert (ids[:, :2].sort().values == torch.tensor([2, 3])).all() and (ids[:, 2:] == -1).all() and (weights[:, 2:] == 0).all()


def make_experts(tokens: int, kept: int, count: int, width: int, inner: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Ids -1, out of range and repeated (which count twice); expert 0 is chosen by nobody."""
    ids = torch.randint(1, count + 1, (tokens, kept), dtype=torch.int32)
    ids[torch.rand(ids.shape) < 0.1] = -1
    inputs = {"x": torch.randn(tokens, width).to(dtype), "ids": ids, "weights": torch.randn(tokens, kept)}
    gate_up, down = torch.randn(count, 2 * inner, width) * width**-0.5, torch.randn(count, width, inner) * inner**-0.5
    return {**inputs, "gate_up": gate_up.to(dtype), "down": down.to(dtype)}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2, 5, 20, 3), (70, 3, 6, 17, 40)], ids=str)
def test_routed_experts_equal_reference(sizes: tuple[int, int, int, int, int]) -> None:
    """Rows that fill no tile, and more rows of one expert than a tile has; widths that fill no slice."""
    tokens, *rest = sizes
    check("RoutedExperts", make_experts(*sizes), SWIGLU, only="tiles")
    check("RoutedExperts", make_experts(*sizes), SWIGLU, only="small tiles")
    check("RoutedExperts", make_experts(min(tokens, 3), *rest), SWIGLU, only="pairs")
    if tokens == 3:
        for plan in ("tiles", "pairs"):
            check("RoutedExperts", make_experts(*sizes), BOUNDED, only=plan)


def test_routed_experts_sort_several_chunks() -> None:
    """More pairs than one program of the counting sort takes, with one expert for most."""
    inputs = make_experts(300, 2, 4, 3, 2)
    inputs["ids"][:200, 0] = 2
    inputs["x"][7] = torch.nan  # a token's NaN stays its own
    expected = experts.routed_experts(*inputs.values())
    assert expected.isnan().any(-1).sum() == 1
    (out,) = run_kernels("RoutedExperts", inputs, SWIGLU, only="small tiles")["small tiles"]
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_errors_are_at_most_twice_pytorchs(dtype: torch.dtype) -> None:
    """PyTorch in the same type, which rounds after every product and activation."""
    inputs = make_experts(6, 2, 3, 80, 48, dtype)
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    truth = torch.zeros(6, 80, dtype=torch.float64)
    for token in range(6):
        for expert, weight in zip(inputs["ids"][token].tolist(), wide["weights"][token], strict=True):
            if 0 <= expert < 3:
                gate, up = (wide["gate_up"][expert] @ wide["x"][token]).chunk(2)
                truth[token] += weight * (wide["down"][expert] @ (torch.nn.functional.silu(gate) * up))

    def error(out: Tensor) -> tuple[float, float]:
        return float((out - truth).square().mean().sqrt()), float((out - truth).abs().max())

    plain = error(experts.routed_experts(*inputs.values()))
    assert plain[0] > 0
    for plan, outputs in run_kernels("RoutedExperts", inputs, SWIGLU).items():
        got = error(outputs[0])
        assert got[0] <= 2 * plain[0] and got[1] <= 2 * plain[1], plan


def test_idle_and_empty_calls() -> None:
    """Pairs that chose nobody give 0; a call without tokens runs nothing."""
    inputs = make_experts(3, 2, 4, 5, 3)
    assert (check("RoutedExperts", {**inputs, "ids": torch.full_like(inputs["ids"], -1)}, SWIGLU)[0] == 0).all()
    for name, attributes in (("RoutedExperts", SWIGLU), ("ExpertRoute", EXPERT)):
        inputs = make_call(name)[0]
        empty = {key: x[:0] if key in ("x", "ids", "weights", "logits", "group_logits") else x for key, x in inputs.items()}
        for outputs in run_kernels(name, empty, attributes).values():
            assert all(out.numel() == 0 for out in outputs)
