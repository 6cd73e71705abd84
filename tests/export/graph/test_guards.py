"""What would make an export silently wrong is refused, by a sentence that names the remedy. One module per guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bilevel import ops
from bilevel.config import Routing
from bilevel.errors import BilevelError, ConfigError, ContractError, ExportError
from bilevel.export.graph.module import save_onnx

ROUTE: dict[str, Any] = {"block_size": 4, "num_selection_heads": 2, "init_blocks": 1, "local_blocks": 1, "causal": 1}
WITHOUT_HEADS = {name: value for name, value in ROUTE.items() if name != "num_selection_heads"}
ATTEND: dict[str, Any] = {"block_size": 4, "causal": 1, "scale": 0.5}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Attention(nn.Module):
    """Two-level attention as it should be; the tests break one thing each. q [B, 4, L, 4], k [B, 2, M, 4]."""

    coarse_topk, topk = 4, 2

    def forward(self, q: Tensor, k: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        block_key = k.unflatten(2, (-1, 4)).mean(3)
        candidates = ops.coarse_route(q, block_key, past_len, new_len, topk=self.coarse_topk, **ROUTE)
        routes = self.refine(q, block_key, self.obey(candidates), past_len, new_len)
        return self.attend(q, k, self.obey(routes), past_len, new_len)

    def refine(self, q: Tensor, block_key: Tensor, candidates: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        return ops.fine_route(q, block_key, candidates, past_len, new_len, topk=self.topk, **ROUTE)

    def obey(self, routes: Tensor) -> Tensor:
        return routes

    def attend(self, q: Tensor, k: Tensor, routes: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        return ops.routed_attention(q, k, k, routes, past_len, new_len, **ATTEND)


class TooManyKept(Attention):
    coarse_topk = 3841


class MoreThanCandidates(Attention):
    coarse_topk, topk = 3, 4


class FrozenConstant(Attention):
    """Level 2 reads candidates that were worked out beforehand."""

    def obey(self, routes: Tensor) -> Tensor:
        return torch.zeros(routes.shape, dtype=torch.int32)


class FrozenByNumpy(Attention):
    def obey(self, routes: Tensor) -> Tensor:
        return torch.from_numpy(routes.numpy().copy())


class FrozenByList(Attention):
    def obey(self, routes: Tensor) -> Tensor:
        return torch.tensor(routes.tolist(), dtype=torch.int32)


class DenseInstead(Attention):
    """The routes are worked out, returned by nobody, and attention is dense."""

    def attend(self, q: Tensor, k: Tensor, routes: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        mask = routes.new_zeros(()).float() * routes.sum().float()
        return scaled_dot_product_attention(q, k.repeat_interleave(2, 1), k.repeat_interleave(2, 1)) + mask


class LevelOneIgnored(Attention):
    """Level 2 works among all blocks: level 1's choice reaches the output, but nothing routed obeys it."""

    def forward(self, q: Tensor, k: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        block_key = k.unflatten(2, (-1, 4)).mean(3)
        candidates = ops.coarse_route(q, block_key, past_len, new_len, topk=self.coarse_topk, **ROUTE)
        routes = ops.coarse_route(q, block_key, past_len, new_len, topk=self.topk, **ROUTE)
        return self.attend(q, k, routes, past_len, new_len) + 0.0 * candidates.sum()


class OwnScores(Attention):
    """A router of one's own, behind level 1's choice as a mask."""

    scored_topk = 2

    def refine(self, q: Tensor, block_key: Tensor, candidates: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        allowed = (candidates[..., None] == torch.arange(block_key.shape[2])).any(3)
        scores = torch.where(allowed, self.scores(q[:, ::2] @ block_key.mT), -torch.inf)
        return ops.select_blocks(
            scores, past_len, new_len, topk=2, scored_topk=self.scored_topk, partial_block=0, **WITHOUT_HEADS
        )

    def scores(self, products: Tensor) -> Tensor:
        return products.relu()


class FrozenScores(OwnScores):
    def refine(self, q: Tensor, block_key: Tensor, candidates: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        scores = torch.arange(4.0).expand(2, 2, q.shape[2], 4)
        options = {"topk": 2, "scored_topk": self.scored_topk, "partial_block": 0, **WITHOUT_HEADS}
        return ops.select_blocks(scores, past_len, new_len, **options)

    def forward(self, q: Tensor, k: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        return self.attend(q, k, self.refine(q, k, k, past_len, new_len), past_len, new_len)


class WindowOnly(FrozenScores):
    """Nothing is kept for its score: there is nothing to freeze."""

    scored_topk = 0


class SelectionIgnored(OwnScores):
    def forward(self, q: Tensor, k: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        block_key = k.unflatten(2, (-1, 4)).mean(3)
        candidates = ops.coarse_route(q, block_key, past_len, new_len, topk=self.coarse_topk, **ROUTE)
        routes = self.refine(q, block_key, candidates, past_len, new_len)
        return self.attend(q, k, candidates, past_len, new_len) + 0.0 * routes.sum()


class DroppedRouter(Attention):
    """A learned router whose projection nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 4, bias=False)


EXAMPLE = {"q": torch.randn(2, 4, 5, 4), "k": torch.randn(2, 2, 16, 4), "past_len": int32(0, 3), "new_len": int32(5, 4)}


def test_guards_pass_the_module_as_it_should_be(tmp_path: Path) -> None:
    model = save_onnx(Attention(), EXAMPLE, tmp_path / "x.onnx", output_names=["out"])
    assert [n.op_type for n in model.graph.node if n.domain == "bilevel"] == ["CoarseRoute", "FineRoute", "RoutedAttention"]


@pytest.mark.parametrize(
    ("kind", "operators"),
    [
        (OwnScores, ["CoarseRoute", "SelectBlocks", "RoutedAttention"]),
        (WindowOnly, ["SelectBlocks", "RoutedAttention"]),
    ],
)
def test_guards_pass_given_scores(tmp_path: Path, kind: type[Attention], operators: list[str]) -> None:
    model = save_onnx(kind(), EXAMPLE, tmp_path / "x.onnx", output_names=["out"])
    assert [n.op_type for n in model.graph.node if n.domain == "bilevel"] == operators


def test_scores_in_sixteen_bits_are_refused(tmp_path: Path) -> None:
    example = {name: x.half() if x.is_floating_point() else x for name, x in EXAMPLE.items()}
    with pytest.raises(ContractError, match="SelectBlocks: scores must be float32, got float16"):
        save_onnx(OwnScores(), example, tmp_path / "x.onnx", output_names=["out"])


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (TooManyKept, ContractError, "topk=3841.* 3840"),
        (MoreThanCandidates, ExportError, "keeps topk=4 blocks, but its candidates hold 3; raise the level-1 topk or lower"),
        (FrozenConstant, ExportError, "depend on no input.*froze the selection.*no .item"),
        (FrozenByNumpy, ExportError, "could not trace the module.*numpy"),
        (FrozenByList, ExportError, "fixes axis 2 of q to 5.*compute with the tensor's shape"),
        (
            DenseInstead,
            ExportError,
            "nothing obeys the selection of FineRoute.*run densely; pass its output to RoutedAttention",
        ),
        (FrozenScores, ExportError, "SelectBlocks .* has scores that depend on no input: tracing froze the selection"),
        (SelectionIgnored, ExportError, "nothing obeys the selection of SelectBlocks.*pass its output to RoutedAttention"),
        (LevelOneIgnored, ExportError, "nothing obeys the selection of CoarseRoute"),
        (DroppedRouter, ExportError, "never reads 1 parameter.*'router.weight'.*make forward use it, or delete it"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_guards_refuse(tmp_path: Path, kind: type[Attention], error: type[BilevelError], message: str) -> None:
    with pytest.raises(error, match=message):
        save_onnx(kind(), EXAMPLE, tmp_path / "x.onnx", output_names=["out"], dynamic={"q": {2: "tokens"}})
    assert not list(tmp_path.iterdir()), "a refused export leaves no file"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Attention, ""),
        (FrozenConstant, "froze the selection"),
        (DenseInstead, "nothing obeys the selection of FineRoute"),
        (DroppedRouter, "never reads 1 parameter"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_guards_in_16_bits(tmp_path: Path, kind: type[Attention], message: str, dtype: torch.dtype) -> None:
    """The same guards; what passes has routed nodes of that type."""
    example = {name: x.to(dtype) if x.is_floating_point() else x for name, x in EXAMPLE.items()}
    if message:
        with pytest.raises(ExportError, match=message):
            save_onnx(kind().to(dtype), example, tmp_path / "x.onnx", output_names=["out"])
        assert not list(tmp_path.iterdir())
        return
    model = save_onnx(kind().to(dtype), example, tmp_path / "x.onnx", output_names=["out"])
    number = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input[:2], *model.graph.output)] == [number] * 3
    assert [n.op_type for n in model.graph.node if n.domain == "bilevel"] == ["CoarseRoute", "FineRoute", "RoutedAttention"]


class ExpertLayer(nn.Module):
    """Experts as they should be, or run densely although they were routed; x [T, 4]."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 6)
        self.gate_up, self.down = nn.Parameter(torch.randn(6, 10, 4)), nn.Parameter(torch.randn(6, 4, 5))
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        scoring: dict[str, Any] = {"score_func": "softmax", "group_score": "max", "normalize": 1, "scale": 1.0}
        bias, groups = torch.zeros(6), torch.zeros(x.shape[0], 2)
        ids, weights = ops.expert_route(logits, groups, bias, top_k=2, topk_group=1, **scoring)
        if not self.dense:
            return ops.routed_experts(x, ids, weights, self.gate_up, self.down)
        gate, up = torch.einsum("td,efd->tef", x, self.gate_up).chunk(2, -1)
        every = torch.einsum("tef,edf->ted", nn.functional.silu(gate) * up, self.down)
        return (every * logits.softmax(-1)[..., None]).sum(1) + weights.sum()


def test_guards_pass_routed_experts(tmp_path: Path) -> None:
    save_onnx(ExpertLayer(dense=False), {"x": torch.randn(5, 4)}, tmp_path / "x.onnx", output_names=["out"])


def test_guards_refuse_experts_run_densely(tmp_path: Path) -> None:
    message = (
        "nothing obeys the selection of ExpertRoute.*this expert layer would run densely; pass its output to RoutedExperts"
    )
    with pytest.raises(ExportError, match=message):
        save_onnx(ExpertLayer(dense=True), {"x": torch.randn(5, 4)}, tmp_path / "x.onnx", output_names=["out"])


def test_guards_accept_a_selection_that_is_an_output(tmp_path: Path) -> None:
    """A module may hand its routes to the caller."""

    class Router(nn.Module):
        def forward(self, q: Tensor, key: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
            return ops.coarse_route(q, key, past_len, new_len, topk=2, **ROUTE)

    feeds = {"q": EXAMPLE["q"], "key": torch.randn(2, 2, 4, 4), "past_len": int32(0, 3), "new_len": int32(5, 4)}
    model = save_onnx(Router(), feeds, tmp_path / "x.onnx", output_names=["routes"])
    assert [node.op_type for node in model.graph.node if node.domain == "bilevel"] == ["CoarseRoute"]


def test_guards_shared_parameter_counts_as_read(tmp_path: Path) -> None:
    """Tied weights are one tensor under two names; reading it under one of them is enough."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x)

    save_onnx(Tied(), {"x": torch.randn(3, 4)}, tmp_path / "x.onnx", output_names=["out"])


@pytest.mark.parametrize("name", ["coarse_topk", "topk"])
def test_guards_topk_limit_in_the_config(name: str) -> None:
    """The same limit, before anything is traced."""
    with pytest.raises(ConfigError, match=f"routing.{name}=3841 exceeds 3840.*use larger blocks or keep fewer"):
        Routing(**{"coarse_topk": 3840, "topk": 3840, name: 3841})
