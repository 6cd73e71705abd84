"""A module of one's own against its graph: what is planted in the graph is found at its operator, what is harmless passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.errors import BundleError, ExportError
from bilevel.export.check.module import check_module
from bilevel.export.graph.bodies import routes
from bilevel.export.graph.module import save_onnx
from tests.export.check.surgery import body


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Layer(nn.Module):
    """Level 1 proposes, scores of its own choose, experts follow. x: [B, L, 8]; ``keys``: the cache [B, 1, M, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))
        self.gate = nn.Linear(8, 4)
        self.gate_up, self.down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 3))

    def forward(self, x: Tensor, keys: Tensor, past_len: Tensor, new_len: Tensor) -> tuple[Tensor, Tensor]:
        keys = ops.write_cache(keys, x[:, None], past_len)
        blocks = keys.unflatten(2, (-1, 4)).mean(3)
        size: dict[str, Any] = {"block_size": 4, "causal": 1}
        shared = {**size, "init_blocks": 1, "local_blocks": 1}
        first = ops.coarse_route(x[:, None], blocks, past_len, new_len, topk=6, num_selection_heads=1, **shared)
        allowed = (first[..., None] == torch.arange(blocks.shape[2])).any(3)
        scores = torch.tanh(x[:, None] @ blocks.mT) * self.slope
        scores = torch.where(allowed, scores, -torch.inf)
        chosen = ops.select_blocks(scores, past_len, new_len, topk=3, scored_topk=3, partial_block=0, **shared)
        out = ops.routed_attention(x[:, None], keys, keys, chosen, past_len, new_len, scale=0.35, **size)[:, 0]
        flat = out.flatten(0, 1)
        scoring: dict[str, Any] = {"score_func": "softmax", "group_score": "max", "normalize": 1, "scale": 1.0}
        logits = self.gate(flat)
        ids, weights = ops.expert_route(logits, logits[:, :1] * 0, torch.zeros(4), top_k=2, topk_group=1, **scoring)
        return ops.routed_experts(flat, ids, weights, self.gate_up, self.down).unflatten(0, out.shape[:2]), chosen


def inputs(length: int, past: tuple[int, int] = (40, 3)) -> dict[str, Tensor]:
    lengths = {"past_len": int32(*past), "new_len": int32(length, length - 1)}
    return {"x": torch.randn(2, length, 8), "keys": torch.randn(2, 1, 64, 8), **lengths}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layer, Path]:
    torch.manual_seed(3)
    layer, path = Layer(), tmp_path_factory.mktemp("layer") / "layer.onnx"
    save_onnx(layer, inputs(5), path, output_names=["out", "routes"], dynamic={"x": {1: "tokens"}})
    return layer, path


@pytest.mark.parametrize("length", [2, 17])
def test_a_module_and_its_graph_agree(exported: tuple[Layer, Path], length: int) -> None:
    layer, path = exported
    given = inputs(length)
    before = given["keys"].clone()
    verdict = check_module(layer, given, path)
    assert verdict.passed and verdict.executions == ("portable bodies", "CPU kernels")
    assert torch.equal(given["keys"], before), "the caller's cache is not written"
    assert {name: (one.rows, one.unexcused) for name, one in verdict.selections.items()} == {
        "0 CoarseRoute": (2 * (2 * length - 1), 0),
        "1 SelectBlocks": (2 * (2 * length - 1), 0),
        "3 ExpertRoute": (2 * 2 * length, 0),
    }
    assert "output out" in verdict.computations and "2 RoutedAttention out" in verdict.computations


def test_exact_ties_pass(exported: tuple[Layer, Path]) -> None:
    """Equal rows everywhere: every score ties, and every execution takes the canonical blocks."""
    given = {**inputs(9), "x": torch.ones(2, 9, 8), "keys": torch.ones(2, 1, 64, 8)}
    assert check_module(exported[0], given, exported[1]).passed


def _attribute(graph: ir.Graph, op_type: str, name: str, value: int) -> None:
    node = next(node for node in graph if node.op_type == op_type)
    node.attributes[name] = ir.AttrInt64(name, value)


def _roll(graph: ir.Graph) -> None:
    """Every word gets the scores of the block before."""
    node = next(node for node in graph if node.op_type == "SelectBlocks")
    scores = node.inputs[0]
    assert scores is not None
    start, end, axis = (ir.node("Constant", [], attributes={"value_ints": [n]}) for n in (0, -1, 3))
    head = ir.node("Slice", [scores, start.outputs[0], end.outputs[0], axis.outputs[0]])
    pads = ir.node("Constant", [], attributes={"value_ints": [0, 0, 0, 1, 0, 0, 0, 0]})
    moved = ir.node("Pad", [head.outputs[0], pads.outputs[0]])
    for each in (start, end, axis, head, pads, moved):
        graph.insert_before(node, each)
    node.replace_input_with(0, moved.outputs[0])


def _negate_slope(graph: ir.Graph) -> None:
    slope = graph.initializers["slope"]
    assert slope.const_value is not None
    slope.const_value = ir.tensor(-slope.const_value.numpy(), name="slope")


FAULTS: dict[str, tuple[Callable[[ir.Graph], None], str]] = {
    "another-budget": (
        lambda g: _attribute(g, "SelectBlocks", "scored_topk", 1),
        "1 SelectBlocks: scored_topk is 1 in the graph, 3",
    ),
    "an-open-block-scored": (lambda g: _attribute(g, "SelectBlocks", "partial_block", 2), "1 SelectBlocks: partial_block is 2"),
    "scores-of-the-block-before": (_roll, "1 SelectBlocks scores"),
    "a-weight-with-the-other-sign": (_negate_slope, "1 SelectBlocks scores"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_its_operator(exported: tuple[Layer, Path], tmp_path: Path, fault: str) -> None:
    layer, path = exported
    change, expected = FAULTS[fault]
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    change(model.graph)
    broken = tmp_path / "broken.onnx"
    ir.save(model, broken)
    verdict = check_module(layer, inputs(17), broken)
    failing = [name for name, one in verdict.computations.items() if not one.passed]
    assert not verdict.passed
    assert (verdict.attributes or failing)[0].startswith(expected)
    assert all("CoarseRoute" not in name for name in failing), "what comes before the fault is not blamed"


BODY_FAULTS = {
    "a-local-block-too-many": ("op.And(block > own - local, block <= own)", "op.And(block >= own - local, block <= own)"),
    "no-initial-block": ("op.Equal(block, partial)), op.Or(is_local, is_init))", "op.Equal(block, partial)), is_local)"),
    "the-lower-score-wins": ("padded, topk, axis=-1, largest=1", "padded, topk, axis=-1, largest=0"),
    "one-scored-block-too-few": ("+ scored_topk", "+ scored_topk - 3"),
    "an-index-off-by-one": ("ascending(index, op.And(best > lowest, op.R", "ascending(index + 1, op.And(best > lowest, op.R"),
}


@pytest.mark.parametrize("fault", BODY_FAULTS)
def test_a_fault_of_the_body_is_found_in_the_body(exported: tuple[Layer, Path], tmp_path: Path, fault: str) -> None:
    """And in no other operator; the CPU kernels are right."""
    layer, path = exported
    model = onnx.load(path)
    body("SelectBlocks", routes, BODY_FAULTS[fault])(model)
    onnx.save(model, tmp_path / "broken.onnx")
    verdict = check_module(layer, inputs(17), tmp_path / "broken.onnx")
    wrong = {name: judged.example for name, judged in verdict.selections.items() if not judged.passed}
    assert list(wrong) == ["1 SelectBlocks"] and wrong["1 SelectBlocks"].startswith("portable bodies")
    assert all(judged.passed for judged in verdict.computations.values())


def test_another_modules_graph_is_refused(exported: tuple[Layer, Path], tmp_path: Path) -> None:
    class Other(Layer):
        def forward(self, x: Tensor, keys: Tensor, past_len: Tensor, new_len: Tensor) -> tuple[Tensor, Tensor]:
            out, _ = super().forward(x, keys, past_len, new_len)
            return out, ops.select_blocks(
                x[:, None], past_len, new_len, block_size=8, topk=2, scored_topk=2, init_blocks=0, local_blocks=0,
                partial_block=1, causal=1,
            )  # fmt: skip

    with pytest.raises(ExportError, match="but the module calls .*'RoutedExperts', 'SelectBlocks'.; export the module again"):
        check_module(Other(), inputs(5), exported[1])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"broken.onnx is no readable ONNX file; export it again"):
        check_module(exported[0], inputs(5), broken)
