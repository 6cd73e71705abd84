"""Attention sinks: a logit a query head that joins the softmax. PyTorch's form against the loops and gpt-oss's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import ops
from bilevel.errors import ContractError
from bilevel.export.graph.module import save_onnx
from bilevel.export.graph.sessions import open_session
from bilevel.operators import reference
from tests.support.cpu_library import required_library, run_kernel, sets_here
from tests.support.operator_calls import Attributes, Inputs, attention_calls, int32, make_call, run_body, run_reference
from tests.support.poison import attention_reads, poison_attention


@given(call=attention_calls(sinks=True))
def test_pytorch_equals_the_loops(call: tuple[Inputs, Attributes]) -> None:
    inputs, attributes = call
    out = ops.routed_attention_sinks(*inputs.values(), **attributes)
    torch.testing.assert_close(out, reference.routed_attention_sinks(*inputs.values(), **attributes), rtol=1e-5, atol=1e-5)


def formula(inputs: Inputs, attributes: Attributes) -> Tensor:
    """As transformers' GptOssAttention computes it: the sink is one more column of logits, dropped behind the softmax."""
    q, k, v, sinks = (inputs[name] for name in ("q", "k", "v", "sinks"))
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    reads = attention_reads(inputs, attributes)
    logits = torch.where(reads, q @ k.mT * attributes["scale"], -torch.inf)
    joined = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
    return joined.softmax(-1)[..., :-1] @ v


@given(call=attention_calls(sinks=True), seed=st.integers(0, 2**16))
def test_value_and_gradients_equal_the_formula_s(call: tuple[Inputs, Attributes], seed: int) -> None:
    """Also the gradient of the sinks themselves, and those of values of another width than keys."""
    inputs, attributes = call
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    gradients = []
    for function in (formula, lambda x, a: ops.routed_attention_sinks(*x.values(), **a)):
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("q", "k", "v", "sinks")}
        out = function({**inputs, **leaves}, attributes)
        factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (out * factor).sum().backward()
        gradients.append([out.detach(), *(leaf.grad for leaf in leaves.values())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all() -> None:
    inputs, attributes = make_call("RoutedAttentionSinks", 7)
    plain = ops.routed_attention(*list(inputs.values())[:-1], **attributes)
    inputs["sinks"] = torch.full((4,), -torch.inf)
    torch.testing.assert_close(ops.routed_attention_sinks(*inputs.values(), **attributes), plain)
    inputs["sinks"] = torch.full((4,), 1e4)
    assert (ops.routed_attention_sinks(*inputs.values(), **attributes) == 0).all()


def test_rows_that_read_nothing_are_0_whatever_the_sink() -> None:
    inputs, attributes = make_call("RoutedAttentionSinks", 7)
    inputs["new_len"] = int32(0, 3)
    out = ops.routed_attention_sinks(*inputs.values(), **attributes)
    assert (out[0] == 0).all() and (out[1, :, 3:] == 0).all()


@pytest.mark.parametrize("length", [3, 17], ids=["few", "many"])
@pytest.mark.parametrize("single", [False, True], ids=["nobody reads", "one row does not read"])
def test_every_execution_reads_its_routes_only(length: int, single: bool) -> None:
    inputs, attributes = make_call("RoutedAttentionSinks", length)
    inputs["routes"][:, :, :, 0] = 3  # blocks that some rows of a tile see in part
    (expected,) = run_reference("RoutedAttentionSinks", inputs, attributes)
    poisoned, judged, _ = poison_attention(inputs, attributes, 0, single=single)
    answers = {isa: run_kernel("RoutedAttentionSinks", poisoned, attributes, isa) for isa in sets_here()}
    answers["body"] = run_body("RoutedAttentionSinks", poisoned, attributes)
    answers["PyTorch"] = [ops.routed_attention_sinks(*poisoned.values(), **attributes)]
    for execution, (out,) in answers.items():
        torch.testing.assert_close(out[judged], expected[judged], msg=lambda text, e=execution: f"{e}: {text}")


def test_a_module_with_sinks_exports_and_runs(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = nn.Parameter(torch.randn(4))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
            size = {"block_size": 4, "causal": 1}
            route = {**size, "topk": 2, "num_selection_heads": 2, "init_blocks": 1, "local_blocks": 1}
            routes = ops.coarse_route(q, k[:, :, ::4], past_len, new_len, **route)
            return ops.routed_attention_sinks(q, k, v, routes, past_len, new_len, self.sinks, **size, scale=0.3)

    inputs, _ = make_call("RoutedAttention", 6)
    del inputs["routes"]
    inputs["v"] = torch.randn(2, 2, 20, 5)
    module = Attention()
    save_onnx(module, inputs, tmp_path / "model.onnx", output_names=["out"])
    for library in (None, required_library()):
        session = open_session(tmp_path / "model.onnx", library=library)
        (out,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(out), module(**inputs).detach())


def test_wrong_sizes_are_named() -> None:
    inputs, attributes = make_call("RoutedAttentionSinks", 7)
    with pytest.raises(ContractError, match="sinks has Hq=3, but an earlier input has Hq=4"):
        ops.routed_attention_sinks(*{**inputs, "sinks": torch.zeros(3)}.values(), **attributes)
    with pytest.raises(ContractError, match="v has M=16"):
        ops.routed_attention_sinks(*{**inputs, "v": inputs["v"][:, :, :16]}.values(), **attributes)
