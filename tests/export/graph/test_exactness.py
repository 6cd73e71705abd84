"""What a body computes is the same before and after every pass over its graph, on values that passes like to round away.

The passes: our own folding for one geometry, onnxscript's optimiser as anybody may run it on the file, ONNX Runtime's at each
of its levels. The values: tiny and huge ones, signed zeros, infinities, NaN, logits whose scores underflow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from onnxscript import optimizer
from torch import Tensor, nn

from bilevel import contract, ops
from bilevel.export.graph.module import save_onnx
from bilevel.export.graph.specialise import specialise_functions
from tests.support.cpu_library import run_kernel, sets_here
from tests.support.operator_calls import (
    EXPERT,
    KINDS,
    Attributes,
    Inputs,
    make_call,
    model_of,
    node_of,
    run_reference,
)
from tests.support.triton_calls import run_kernels

LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
NUMBERS = torch.tensor([0.0, -0.0, 1e-30, -1e-20, 1e-9, 1.0, 1.000001, -3.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
SPANS = [(-20, -19), (-12, -10), (-86, -80), (-100, -90), (-1, 1), (17, 25), (-100, 100), (-1e4, 1e4)]

CLOSE = {"rtol": 2e-6, "atol": 1e-37}
# Scores of 1e3 are rounded to 1e-4; sums of values of 1e-25 cancel.
TOLERANCES = {"RoutedAttention": {"rtol": 1e-4, "atol": 0.0}, "RoutedExpertsQuantized": {"rtol": 1e-5, "atol": 1e-30}}


def run(model: onnx.ModelProto, inputs: Inputs, level: ort.GraphOptimizationLevel) -> list[Tensor]:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return [torch.from_numpy(out) for out in session.run(None, {key: value.numpy() for key, value in inputs.items()})]


def passed(name: str, inputs: Inputs, attributes: Attributes) -> dict[str, onnx.ModelProto]:
    """{pass: the model behind it}."""
    general = model_of([node_of(name, attributes)])
    folded = onnx.ModelProto()
    folded.CopyFrom(general)
    free = {"B": "batch", "L": "tokens", "U": "num_blocks", "M": "capacity", "T": "tokens"}
    for value, port in zip(folded.graph.input, contract.BY_NAME[name].inputs, strict=True):
        sizes = [free.get(dim.symbol, size) for dim, size in zip(port.shape, inputs[port.name].shape, strict=True)]
        value.CopyFrom(helper.make_tensor_value_info(port.name, KINDS[port.dtype], sizes))
    folded = specialise_functions(folded)
    return {"as written": general, "folded": folded, "optimised by others": optimizer.optimize(folded, inline=False)}


def drawn(*shape: int) -> Tensor:
    return NUMBERS[torch.randint(len(NUMBERS), shape)]


def route_call(name: str, tokens: int) -> tuple[Inputs, Attributes]:
    """One product a score, so that there is one right score."""
    inputs, attributes = make_call(name, tokens)
    inputs["query"], inputs["unit_key"] = drawn(2, 2, tokens, 1), drawn(2, 2, 5, 1)
    return inputs, attributes


def attention_call(tokens: int, scale: float) -> tuple[Inputs, Attributes]:
    """Scores up to 1e4, and values of one sign, so that nothing cancels."""
    inputs, attributes = make_call("RoutedAttention", tokens)
    inputs["k"] *= 1e3
    inputs["v"] = (inputs["v"].abs() + 1) * scale
    return inputs, attributes


def gate_call(score_func: str, normalize: int) -> tuple[Inputs, Attributes]:
    logits = torch.cat([torch.empty(12, 8).uniform_(*span) for span in SPANS])
    logits = torch.cat([logits, torch.full((1, 8), -200.0), drawn(12, 8)])
    attributes = {**EXPERT, "group_score": "max", "score_func": score_func, "normalize": normalize, "scale": 1.000001}
    return {"logits": logits, "group_logits": torch.zeros(len(logits), 4), "select_bias": torch.zeros(8)}, attributes


def swiglu_call(tokens: int) -> tuple[Inputs, Attributes]:
    """An expert's gate and up are x itself."""
    x = torch.cat([torch.empty(tokens, 1).uniform_(*span) for span in SPANS[:-1]] + [NUMBERS[:-5, None]])[-tokens:]
    chosen = {"ids": torch.zeros(tokens, 1, dtype=torch.int32), "weights": torch.ones(tokens, 1)}
    return {"x": x, **chosen, "gate_up": torch.ones(2, 2, 1), "down": torch.ones(2, 1, 1)}, {}


def packed_call(tokens: int, scale: float) -> tuple[Inputs, Attributes]:
    inputs, attributes = make_call("RoutedExpertsQuantized", tokens)
    return {**inputs, "down_scales": inputs["down_scales"] * scale}, attributes


CALLS: dict[str, Callable[[], tuple[Inputs, Attributes]]] = {
    **{f"{name} of {n}": lambda name=name, n=n: route_call(name, n) for name in ("CoarseRoute", "FineRoute") for n in (20,)},
    **{
        f"RoutedAttention of {n}, values of {scale:g}": lambda n=n, scale=scale: attention_call(n, scale)
        for n, scale in ((3, 1e-30), (20, 1e30))
    },
    **{
        f"ExpertRoute by {f}, {'normalised' if n else 'plain'}": lambda f=f, n=n: gate_call(f, n)
        for f in contract.SCORE_FUNCS
        for n in (0, 1)
    },
    **{f"RoutedExperts of {n}": lambda n=n: swiglu_call(n) for n in (4, 90)},
    "RoutedExpertsQuantized of 6": lambda: packed_call(6, 1e-25),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_pass_changes_what_a_body_computes(call: str) -> None:
    """Choices exactly, numbers to a few units in the last place of their own size (not of the largest)."""
    torch.manual_seed(0)
    name = call.split()[0]
    inputs, attributes = CALLS[call]()
    expected = run_reference(name, inputs, attributes)
    models = passed(name, inputs, attributes)
    for stage, level in [*(("folded", level) for level in LEVELS), ("as written", "none"), ("optimised by others", "all")]:
        for got, value in zip(run(models[stage], inputs, LEVELS[level]), expected, strict=True):
            tolerance = {"rtol": 0, "atol": 0} if value.dtype == torch.int32 else TOLERANCES.get(name, CLOSE)
            torch.testing.assert_close(got, value, equal_nan=True, **tolerance)


class TinyAddends(nn.Module):
    """What onnxscript's rules take for a sum with 0 and a product with 1."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + 1e-20, x * 1.000004, x - 5e-9


def test_an_exported_module_keeps_tiny_addends_and_factors_close_to_1(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    x = torch.tensor([[0.0, 1e-9], [1e-25, 3.0]])
    save_onnx(TinyAddends(), {"x": x}, path, output_names=["sum", "product", "difference"])
    for level in LEVELS.values():
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        got = ort.InferenceSession(str(path), options).run(None, {"x": x.numpy()})
        for result, value in zip(got, TinyAddends()(x), strict=True):
            assert np.array_equal(result, value.numpy())


def test_the_sum_of_weights_that_all_underflow_is_not_0() -> None:
    inputs = {"logits": torch.full((1, 8), -200.0), "group_logits": torch.zeros(1, 4), "select_bias": torch.zeros(8)}
    for model in passed("ExpertRoute", inputs, EXPERT).values():
        ids, weights = run(model, inputs, LEVELS["all"])
        assert ids.tolist() == [[0, 1]] and weights.tolist() == [[0.0, 0.0]]


def exact_scores(logits: Tensor, score_func: str) -> Tensor:
    """fp64, written out otherwise than by the operators."""
    x = logits.double()
    if score_func == "sigmoid":
        return torch.exp(x.clamp(max=0) - torch.log1p(torch.exp(-x.abs())))
    return (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).sqrt()


@pytest.mark.parametrize("score_func", ["sigmoid", "sqrtsoftplus"])
def test_scores_are_exact_to_a_few_units_over_the_range_of_logits(score_func: str) -> None:
    """Unnormalised weights are scores: in every execution against fp64, in units of their own last place."""
    lowest = -87 if score_func == "sigmoid" else -170
    logits = torch.cat([torch.linspace(lowest, 89, 40_000), torch.linspace(-21, -8, 8_000)])[:, None]
    attributes = {**EXPERT, "top_k": 1, "topk_group": 1, "score_func": score_func, "group_score": "max", "normalize": 0}
    attributes["scale"] = 1.0
    inputs = {"logits": logits, "group_logits": torch.zeros(len(logits), 1), "select_bias": torch.zeros(1)}
    exact = exact_scores(logits, score_func)[:, 0]
    answers = {stage: run(model, inputs, LEVELS["all"]) for stage, model in passed("ExpertRoute", inputs, attributes).items()}
    answers |= {isa: run_kernel("ExpertRoute", inputs, attributes, isa) for isa in sets_here()}
    answers["PyTorch"] = list(ops.expert_route(*inputs.values(), **attributes))
    some = {**inputs, "logits": logits[::240].contiguous(), "group_logits": torch.zeros(len(logits[::240]), 1)}
    answers["GPU kernel"] = run_kernels("ExpertRoute", some, attributes)["rows"]
    for execution, (_, weights) in answers.items():
        meant = exact if len(weights) == len(exact) else exact[::240]
        worst = float(((weights[:, 0].double() - meant).abs() / meant).max()) * 2**24
        assert worst <= 6, f"{execution}: off by {worst} units"


def test_gradients_of_scores_are_finite_over_the_range_of_logits() -> None:
    logits = torch.tensor([[-torch.inf, -1e4, -200.0, -104.0, -20.0, 0.0, 88.0, 1e4]], requires_grad=True)
    for score_func in ("sigmoid", "sqrtsoftplus"):
        attributes = {**EXPERT, "top_k": 8, "topk_group": 1, "group_score": "max", "score_func": score_func}
        ops.expert_route(logits, torch.zeros(1, 1), torch.zeros(8), **attributes)[1].sum().backward()
        assert logits.grad is not None and logits.grad.isfinite().all()
