"""Routed attention with gradients: the CPU library and the tiles in PyTorch against the loops and the written-out formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import ops
from bilevel.operators import attention, cpu_library, reference
from tests.support.attention_cases import SHAPES, Case, make_case, masked_formula
from tests.support.cpu_library import required_library, sets_here, wanted_set

# Rows of different lengths, past tokens, groups that do not nest, blocks of one token and of more than a vector has lanes;
# values narrower and wider than keys.
UGLY = {
    **{name: (*shape, 5, None) for name, shape in SHAPES.items()},
    "R1-wide-values": ((4, 2, 4), 1, 9, [0, 3], [9, 6], 3, 20),
    "R17-narrow-values": ((12, 4, 6), 17, 4, [20, 0], [48, 33], 16, 7),
    "R33-many-rows": ((6, 2, 2), 33, 4, [0, 5, 31], [120, 0, 77], 20, 33),
}
# What computes: the library's instruction sets, or PyTorch's tiles.
KINDS = ("avx512", "avx2", "baseline", "tiles")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What computes: the library with one instruction set, or PyTorch's tiles."""
    if request.param == "tiles":
        monkeypatch.setattr(cpu_library, "covers", lambda *tensors: False)
        yield "tiles"
        return
    assert required_library() and cpu_library._load() is not None
    if request.param not in sets_here():
        pytest.skip(f"this CPU has no {request.param}")
    with wanted_set(request.param):
        yield request.param


def ugly(shape: str, causal: int = 1, topk: int = 2) -> Case:
    heads, block_size, num_blocks, past_len, new_len, width, value_width = UGLY[shape]
    return make_case(
        heads, block_size, num_blocks, past_len, new_len, topk=topk, causal=causal, width=width, value_width=value_width
    )


def learned(case: Case, function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k and v under ``weight``."""
    inputs = [x.detach().clone().requires_grad_(True) for x in inputs]
    out = case.attend(function, q=inputs[0], k=inputs[1], v=inputs[2])
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


def weight_of(case: Case, seed: int = 1) -> Tensor:
    return torch.randn(*case.q.shape[:3], case.v.shape[3], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shape", UGLY)
def test_outputs_and_gradients_equal_the_masked_formula(kind: str, shape: str, causal: int) -> None:
    """Within 1e-5 relative of fp64: the largest difference of a tensor against its largest value."""
    case = ugly(shape, causal)
    inputs, weight = [case.q, case.k, case.v], weight_of(case)
    exact = learned(case, masked_formula, [x.nan_to_num().double() for x in inputs], weight)
    for value, truth in zip(learned(case, attention.routed_attention, inputs, weight), exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - truth).abs().max() <= 1e-5 * max(truth.abs().max().item(), 1.0)


@pytest.mark.parametrize("shape", UGLY)
def test_tiles_in_fp64_equal_the_masked_formula_to_rounding(shape: str) -> None:
    case = ugly(shape, topk=3)
    inputs, weight = [x.double() for x in (case.q, case.k, case.v)], weight_of(case)
    exact = learned(case, masked_formula, [x.nan_to_num() for x in inputs], weight)
    for value, truth in zip(learned(case, attention.routed_attention, inputs, weight), exact, strict=True):
        torch.testing.assert_close(value, truth, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("shape", ["B1-Hq1-Hkv1-Hs1-R1-L1", "B2-Hq4-Hkv2-Hs2-R3-L5", "R1-wide-values"])
def test_gradients_of_tiles_and_of_the_loops_are_those_of_finite_differences(shape: str) -> None:
    case = ugly(shape)
    inputs = tuple(x.nan_to_num().double()[..., :3].contiguous().requires_grad_(True) for x in (case.q, case.k, case.v))
    assert torch.autograd.gradcheck(lambda q, k, v: case.attend(q=q, k=k, v=v), inputs, atol=1e-6)
    with torch.no_grad():
        value, truth = (
            case.attend(each, q=inputs[0], k=inputs[1], v=inputs[2])
            for each in (ops.routed_attention, reference.routed_attention)
        )
    torch.testing.assert_close(value, truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """Sums are fp32: what comes out is what fp32 gives for the same numbers, to within one rounding."""
    case = ugly("R17-narrow-values")
    inputs, weight = [x.nan_to_num().to(dtype) for x in (case.q, case.k, case.v)], weight_of(case).to(dtype)
    exact = learned(case, masked_formula, [x.double() for x in inputs], weight)
    for value, truth in zip(learned(case, attention.routed_attention, inputs, weight), exact, strict=True):
        assert value.dtype == dtype
        assert (value - truth).abs().max() <= 2 * torch.finfo(dtype).eps * max(truth.abs().max().item(), 1.0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_a_row_does_not_read_does_not_reach_it(kind: str, poison: float) -> None:
    """Nobody's route holds block 1, and the last token is read by the last row alone: both are poison."""
    case = make_case((4, 2, 2), 4, 3, [0], [12], topk=2)
    own = torch.arange(12, dtype=torch.int32) // 4
    case.routes[:] = torch.stack([torch.zeros_like(own), torch.where(own == 1, -1, own)], -1)
    inputs, weight = [case.q, case.k, case.v], weight_of(case)
    weight[:, :, 11] = 0
    clean = learned(case, attention.routed_attention, inputs, weight)
    for x in (case.k, case.v):
        x[:, :, 4:8], x[:, :, 11] = poison, poison
    poisoned = [case.q, case.k, case.v]
    out = case.attend(attention.routed_attention, q=case.q.clone().requires_grad_(True))
    torch.testing.assert_close(out[:, :, :11], clean[0][:, :, :11], rtol=1e-6, atol=1e-6)
    assert not out[:, :, 11].isfinite().any()
    # The last row is left out of the call: now nobody reads its token.
    case.new_len[:] = 11
    for value, truth in zip(learned(case, attention.routed_attention, poisoned, weight)[1:], clean[1:], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-6)


def test_gradients_of_rows_beyond_new_len_are_not_read(kind: str) -> None:
    case = ugly("R33-many-rows")
    weight = weight_of(case)
    expected = learned(case, attention.routed_attention, [case.q, case.k, case.v], weight)
    for row, length in enumerate(case.new_len.tolist()):
        weight[row, :, length:] = torch.nan
        case.q[row, :, length:] = torch.nan
    for value, truth in zip(learned(case, attention.routed_attention, [case.q, case.k, case.v], weight), expected, strict=True):
        assert torch.equal(value, truth)


def test_results_are_the_same_bits_again_and_with_more_threads(kind: str) -> None:
    case = make_case((6, 2, 2), 32, 40, [0], [1280], topk=3, width=8)
    weight, threads, results = weight_of(case), torch.get_num_threads(), []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            results.append(learned(case, attention.routed_attention, [case.q, case.k, case.v], weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1 : 2 if kind == "tiles" else 3]:  # PyTorch's own products follow the number of threads
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            self.numbers = max(self.numbers, each.numel()) if isinstance(each, Tensor) else self.numbers
        return out


@pytest.mark.parametrize("form", ["tiles", "library"])
def test_no_tensor_grows_with_the_square_of_the_length(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "tiles":
        monkeypatch.setattr(cpu_library, "covers", lambda *tensors: False)
    sizes = []
    for blocks in (32, 128):
        case = make_case((8, 8, 1), 16, blocks, [0], [16 * blocks], topk=2, width=4)
        with Largest() as largest:
            learned(case, attention.routed_attention, [case.q, case.k, case.v], weight_of(case))
        sizes.append(largest.numbers)
    assert sizes[1] < 6 * sizes[0] and sizes[1] < (16 * 128) ** 2  # four times the length; the square is sixteen times


def test_the_registered_operator_has_the_gradient_and_compiles_as_one_node() -> None:
    case = ugly("B2-Hq4-Hkv2-Hs2-R3-L5")
    case.k, case.v = case.k.nan_to_num(), case.v.nan_to_num()
    inputs, weight = [case.q, case.k, case.v], weight_of(case)
    expected = learned(case, ops.routed_attention, inputs, weight)
    compiled = torch.compile(ops.routed_attention, fullgraph=True, backend="aot_eager")
    for function in (torch.ops.bilevel.routed_attention, compiled):
        for value, truth in zip(learned(case, function, inputs, weight), expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-6)
