"""``save_onnx`` on modules written from scratch: dense parts, operators, caches; free sizes stay free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from bilevel import contract, ops
from bilevel.errors import ContractError, ExportError
from bilevel.export.graph.module import save_onnx
from bilevel.export.graph.schemas import ONNX_OPSET
from tests import ROOT

BLOCK = 4


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Everything(nn.Module):
    """All five operators and a cache between dense layers: x [B, L, 8] and a cache [B, 2, M, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(16, 8)
        self.gate = nn.Linear(8, 6)
        self.group = nn.Linear(8, 3)
        self.gate_up, self.down = nn.Parameter(torch.randn(6, 10, 8)), nn.Parameter(torch.randn(6, 8, 5))

    def forward(self, x: Tensor, cache: Tensor, past_len: Tensor, new_len: Tensor) -> tuple[Tensor, Tensor]:
        q = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
        cache = ops.write_cache(cache, self.key(x).unflatten(-1, (2, 4)).transpose(1, 2), past_len)
        block_key = ops.pool_blocks(cache, torch.zeros_like(past_len), cache.shape[2] // BLOCK, BLOCK)
        shared: dict[str, Any] = {"block_size": BLOCK, "init_blocks": 1, "local_blocks": 1, "causal": 1}
        candidates = ops.coarse_route(q, block_key, past_len, new_len, topk=4, num_selection_heads=1, **shared)
        routes = ops.fine_route(q, block_key, candidates, past_len, new_len, topk=2, num_selection_heads=2, **shared)
        x = self.out(
            ops.routed_attention(q, cache, cache, routes, past_len, new_len, block_size=BLOCK, causal=1, scale=0.5)
            .transpose(1, 2)
            .flatten(2)
        )
        flat = x.flatten(0, 1)
        scoring: dict[str, Any] = {"score_func": "softmax", "group_score": "external", "normalize": 0, "scale": 1.0}
        ids, weights = ops.expert_route(self.gate(flat), self.group(flat), torch.zeros(6), top_k=2, topk_group=2, **scoring)
        return ops.routed_experts(flat, ids, weights, self.gate_up, self.down).reshape(x.shape), cache


def inputs(batch: int, length: int, capacity: int, past: int = 0) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, length, 8),
        "cache": torch.randn(batch, 2, capacity, 4),
        "past_len": int32(*(past * (b % 2) for b in range(batch))),
        "new_len": int32(*(max(length - b, 0) for b in range(batch))),
    }


DYNAMIC: dict[str, Mapping[int, str]] = {
    "x": {0: "batch", 1: "tokens"},
    "cache": {0: "batch", 2: "capacity"},
    "past_len": {0: "batch"},
    "new_len": {0: "batch"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Everything, onnx.ModelProto, Path]:
    torch.manual_seed(0)
    module = Everything()
    path = tmp_path_factory.mktemp("module") / "everything.onnx"
    return module, save_onnx(module, inputs(2, 7, 12), path, output_names=["y", "present"], dynamic=DYNAMIC), path


def test_save_onnx_one_node_per_call(saved: tuple[Everything, onnx.ModelProto, Path]) -> None:
    _, model, path = saved
    nodes = [node for node in model.graph.node if node.domain == contract.DOMAIN]
    assert [node.op_type for node in nodes] == ["CoarseRoute", "FineRoute", "RoutedAttention", "ExpertRoute", "RoutedExperts"]
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes.pop("plugin_namespace") == b"bilevel"
        assert set(attributes) == {a.name for a in contract.BY_NAME[node.op_type].attributes}
    fine = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[1].attribute}
    assert (fine["block_size"], fine["topk"], fine["num_selection_heads"], fine["causal"]) == (BLOCK, 2, 2, 1)
    assert {f.name for f in model.functions} == {node.op_type for node in nodes}
    assert {"", contract.DOMAIN} == {opset.domain for opset in model.opset_import}
    assert next(o.version for o in model.opset_import if not o.domain) == ONNX_OPSET
    onnx.checker.check_model(str(path), full_check=True)


def test_save_onnx_names_and_files(saved: tuple[Everything, onnx.ModelProto, Path]) -> None:
    module, model, path = saved
    assert [value.name for value in model.graph.input] == ["x", "cache", "past_len", "new_len"]
    assert [value.name for value in model.graph.output] == ["y", "present"]
    sizes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    assert sizes["x"] == ["batch", "tokens", 8] and sizes["cache"] == ["batch", 2, "capacity", 4]
    assert sorted(file.name for file in path.parent.iterdir()) == ["everything.data", "everything.onnx"]
    weights = sum(p.numel() * 4 for p in module.parameters())
    assert path.with_suffix(".data").stat().st_size >= 0.8 * weights, "all but a few biases"
    assert module.training, "the module is given back as it was"


@pytest.mark.parametrize(
    ("batch", "length", "capacity", "past"),
    [(1, 1, 4, 0), (3, 1, 8, 7), (2, 7, 12, 5), (1, 3, 8, 0), (4, 50, 100, 31)],
    ids=["B1-L1-M4", "B3-L1-M8", "as the example", "shorter than a block", "B4-L50-M100"],
)
def test_save_onnx_free_sizes(
    saved: tuple[Everything, onnx.ModelProto, Path], batch: int, length: int, capacity: int, past: int
) -> None:
    module, _, path = saved
    feeds = inputs(batch, length, capacity, past)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    got = ort.InferenceSession(path, options).run(None, {name: value.numpy() for name, value in feeds.items()})
    with torch.no_grad():
        expected = module(**feeds)  # writes into the cache, so it runs last
    valid = (torch.arange(length) < feeds["new_len"][:, None]).numpy()
    np.testing.assert_allclose(got[0][valid], expected[0].numpy()[valid], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1].numpy(), rtol=1e-5, atol=1e-6)


class Small(nn.Module):
    """A module without routing, quick to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.linear(x), others[0] + others[1]


SMALL = {"x": torch.ones(2, 4), "others": [torch.ones(3, 5), torch.ones(3, 5)]}


def test_save_onnx_tells_nothing_of_the_machine(saved: tuple[Everything, onnx.ModelProto, Path]) -> None:
    """No stack traces, no paths: the same module gives the same bytes wherever it is exported."""
    _, _, path = saved
    written = path.read_bytes()
    assert b".py" not in written and str(ROOT).encode() not in written and b"stack_trace" not in written


def test_save_onnx_module_without_operators(tmp_path: Path) -> None:
    """No routed node: no foreign opset is imported. A list of tensors becomes numbered inputs."""
    model = save_onnx(Small(), SMALL, tmp_path / "small.onnx", output_names=["a", "b"], dynamic={"x": {0: "rows"}})
    assert [value.name for value in model.graph.input] == ["x", "others.0", "others.1"]
    assert [opset.domain for opset in model.opset_import] == [""] and not model.functions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_names": ["a"]}, "2 output tensors, but 1 output names"),
        ({"output_names": ["a", "b", "c"]}, "2 output tensors, but 3 output names"),
        ({"dynamic": {"y": {0: "rows"}}}, "dynamic names the input 'y', but the inputs are x, others.0, others.1"),
        ({"dynamic": {"others": {0: "rows"}}}, "dynamic names the input 'others', but the inputs are"),
    ],
    ids=["too few names", "too many names", "unknown dynamic input", "a list as dynamic input"],
)
def test_save_onnx_names_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        save_onnx(Small(), SMALL, tmp_path / "small.onnx", **{"output_names": ["a", "b"], **changes})
    assert not list(tmp_path.iterdir())


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(6, 4) * 2


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Frozen(), "fixes axis 0 of x to 6.*compute with the tensor's shape"),
        (Branch(), "torch.export could not trace the module"),
    ],
    ids=["size taken from the example", "branch on a value"],
)
def test_save_onnx_module_that_cannot_be_traced(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        save_onnx(module, {"x": torch.ones(6, 4)}, tmp_path / "x.onnx", output_names=["y"], dynamic={"x": {0: "rows"}})


def test_save_onnx_equal_example_sizes(tmp_path: Path) -> None:
    """Two free sizes that a module makes equal cannot carry two names."""

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    feeds = {"x": torch.ones(6, 4), "y": torch.ones(6, 4)}
    with pytest.raises(ExportError, match="'rows' and 'lines' the same size.*use different example sizes"):
        save_onnx(Sum(), feeds, tmp_path / "x.onnx", output_names=["z"], dynamic={"x": {0: "rows"}, "y": {0: "lines"}})


def test_save_onnx_contract_is_checked_while_tracing(tmp_path: Path) -> None:
    """A wrong shape is the operator's own sentence, not torch's."""

    class Wrong(nn.Module):
        def forward(self, q: Tensor, k: Tensor, routes: Tensor, n: Tensor) -> Tensor:
            return ops.routed_attention(q, k, k, routes, n, n, block_size=4, causal=1, scale=1.0)

    feeds = {
        "q": torch.ones(2, 2, 3, 4),
        "k": torch.ones(2, 2, 10, 4),
        "routes": torch.zeros(2, 2, 3, 1, dtype=torch.int32),
        "n": int32(3, 3),
    }
    with pytest.raises(ContractError, match="10 tokens, not a multiple of block_size=4.*pad_to_blocks"):
        save_onnx(Wrong(), feeds, tmp_path / "x.onnx", output_names=["y"])


def test_save_onnx_inputs_that_are_one_tensor(tmp_path: Path) -> None:
    """Two caches may share their example: they are two inputs all the same."""

    class Difference(nn.Module):
        def forward(self, keys: Tensor, values: Tensor) -> Tensor:
            return keys - values

    one = torch.zeros(2, 3)
    save_onnx(Difference(), {"keys": one, "values": one}, tmp_path / "x.onnx", output_names=["out"])
    feeds = {"keys": np.ones((2, 3), np.float32), "values": np.zeros((2, 3), np.float32)}
    (out,) = ort.InferenceSession(str(tmp_path / "x.onnx")).run(None, feeds)
    assert (out == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_save_onnx_a_norm_that_is_written_out(tmp_path: Path, dtype: torch.dtype) -> None:
    """In fp32 over 16-bit vectors: torch's exporter joins cast and norm to one node."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (scaled * (1.0 + self.weight.float())).to(x.dtype)

    norm, x = Norm().to(dtype), torch.randn(3, 8).to(dtype)
    save_onnx(norm, {"x": x}, tmp_path / "x.onnx", output_names=["out"])
    (out,) = ort.InferenceSession(str(tmp_path / "x.onnx")).run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), norm(x), rtol=2e-3, atol=2e-3)
