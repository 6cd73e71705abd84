"""The routers of decoders: any cut into calls, nothing read that must not be, every execution the same choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.errors import ContractError
from bilevel.export.check.module import check_module
from bilevel.export.graph.module import save_onnx
from bilevel.operators import reference
from bilevel.routers.infllm_v2 import InfLlmV2Router
from bilevel.routers.msa import MsaRouter
from bilevel.routers.qsa import QsaRouter
from tests.support.router_layers import HEAD_DIM, LAYERS, WIDTH, empty_caches, lengths, randomise
from tests.support.triton_calls import check as check_kernels

NAMES = pytest.mark.parametrize("name", LAYERS)


def run(layer: nn.Module, text: Tensor, cuts: Sequence[int], fill: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """(outputs [B, L, WIDTH], routes of every call) of a text [B, L, WIDTH] in calls of these lengths."""
    caches, parts, routes, past = empty_caches(layer, len(text), fill), [], [], 0
    with torch.no_grad(), ops.recorded() as calls:
        for count in cuts:
            step = text[:, past : past + count]
            out, caches = layer(step, caches, *lengths([past] * len(text), [count] * len(text)))
            parts.append(out)
            past += count
    routes = [call.outputs[0] for call in calls if call.op.name == "SelectBlocks"]
    return torch.cat(parts, 1), routes


@NAMES
@pytest.mark.parametrize("cuts", [[1] * 90, [37, 1, 1, 16, 35], [3, 29, 58]], ids=["words", "chunks", "other-chunks"])
def test_any_cut_gives_the_routes_and_outputs_of_one_call(name: str, cuts: list[int]) -> None:
    layer, text = randomise(LAYERS[name]()), torch.randn(2, 90, WIDTH)
    whole, (routes,) = run(layer, text, [90])
    parts, pieces = run(layer, text, cuts)
    assert torch.equal(torch.cat(pieces, 2), routes)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@NAMES
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_nothing_reads_what_its_word_may_not_see(name: str, poison: float) -> None:
    """What lies behind the text in the caches, and what the words behind a word are."""
    layer, text = randomise(LAYERS[name]()), torch.randn(1, 60, WIDTH)
    whole, (routes,) = run(layer, text, [60])
    spoilt, pieces = run(layer, text, [41, 19], fill=poison)
    assert torch.equal(torch.cat(pieces, 2), routes)
    torch.testing.assert_close(spoilt, whole, rtol=1e-5, atol=1e-5)
    text = text.clone()
    text[:, 30:] = poison
    changed, (others,) = run(layer, text, [60])
    assert torch.equal(others[:, :, :30], routes[:, :, :30])
    torch.testing.assert_close(changed[:, :30], whole[:, :30], rtol=1e-5, atol=1e-5)


@NAMES
def test_rows_of_different_lengths(name: str) -> None:
    """Each row is as alone; idle tokens have no routes."""
    layer, text = randomise(LAYERS[name]()), torch.randn(2, 50, WIDTH)
    caches = empty_caches(layer, 2)
    with torch.no_grad(), ops.recorded() as calls:
        out, _ = layer(text, caches, *lengths([0, 0], [50, 23]))
        alone, _ = layer(text[1:, :23], empty_caches(layer, 1), *lengths([0], [23]))
    both, one = (call.outputs[0] for call in calls if call.op.name == "SelectBlocks")
    assert torch.equal(both[1:, :, :23], one) and (both[1, :, 23:] == -1).all()
    torch.testing.assert_close(out[1:, :23], alone, rtol=1e-5, atol=1e-5)


@NAMES
def test_loops_and_gpu_kernels_choose_alike(name: str) -> None:
    """What the router really hands to SelectBlocks, in the loop reference and in both plans of the interpreted kernels."""
    layer, text = randomise(LAYERS[name]()), torch.randn(1, 70, WIDTH)
    for rounded in (text, text.round()):  # whole inputs make ties
        with torch.no_grad(), ops.recorded() as calls:
            layer(rounded, empty_caches(layer, 1), *lengths([0], [70]))
        (call,) = (call for call in calls if call.op.name == "SelectBlocks")
        assert torch.equal(call.outputs[0], reference.select_blocks(*call.tensors, **call.attributes))
    scores, past_len, _ = call.tensors
    few = {"scores": scores[:, :, -3:].contiguous(), "past_len": past_len + 67, "new_len": past_len + 3}
    (routes,) = check_kernels("SelectBlocks", few, call.attributes)
    assert torch.equal(routes, call.outputs[0][:, :, -3:])


@NAMES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_layers_in_other_types(name: str, dtype: torch.dtype) -> None:
    """Scores are fp32, or fp64 in a model of fp64; rows whose choices are the same differ by rounding only."""
    layer, text = randomise(LAYERS[name]()), torch.randn(1, 40, WIDTH).to(dtype)
    whole, (routes,) = run(layer, text.float(), [40])
    caches = [cache.to(dtype) for cache in empty_caches(layer, 1)]
    with torch.no_grad(), ops.recorded() as calls:
        out, _ = layer.to(dtype)(text, caches, *lengths([0], [40]))
    (call,) = (call for call in calls if call.op.name == "SelectBlocks")
    assert out.dtype == dtype and call.tensors[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    same = (call.outputs[0] == routes).all(-1).all(1)
    least, tolerance = {torch.float64: (0.99, 1e-4), torch.float16: (0.8, 0.05), torch.bfloat16: (0.3, 0.4)}[dtype]
    assert same.float().mean() > least
    torch.testing.assert_close(out[same].float(), whole[same], rtol=tolerance, atol=tolerance)


class All(nn.Module):
    """Every layer on the same text: one graph with several routers of different attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in LAYERS.values())

    def forward(self, x: Tensor, caches: list[Tensor], past_len: Tensor, new_len: Tensor) -> list[Tensor]:
        outputs, given = [], list(caches)
        for layer in self.layers:
            count = len(layer.cache_heads)
            out, written = layer(x, given[:count], past_len, new_len)
            outputs, given = [*outputs, out, *written], given[count:]
        return outputs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[All, Path]:
    module, path = randomise(All()), tmp_path_factory.mktemp("routers") / "all.onnx"
    assert isinstance(module, All)
    caches = [cache for layer in module.layers for cache in empty_caches(layer, 2)]
    names = [f"{name}.{part}" for name, kind in LAYERS.items() for part in ("out", *map(str, range(len(kind.cache_heads))))]
    past_len, new_len = lengths([3, 0], [5, 4])
    inputs = {"x": torch.randn(2, 5, WIDTH), "caches": caches, "past_len": past_len, "new_len": new_len}
    save_onnx(module, inputs, path, output_names=names, dynamic={"x": {1: "tokens"}})
    return module, path


@pytest.mark.parametrize("kind", ["prefill", "decode", "ties"])
def test_graphs_make_the_modules_choices(exported: tuple[All, Path], kind: str) -> None:
    """Portable bodies and CPU kernels, router by router; exact ties (whole, repeated inputs) take the canonical blocks."""
    module, path = exported
    length = 1 if kind == "decode" else 44
    caches = [torch.randn_like(cache) for layer in module.layers for cache in empty_caches(layer, 2)]
    x = torch.ones(2, length, WIDTH) if kind == "ties" else torch.randn(2, length, WIDTH)
    caches = [torch.ones_like(cache) for cache in caches] if kind == "ties" else caches
    past_len, new_len = lengths([95 - length, 9], [length, max(1, length - 7)])
    verdict = check_module(module, {"x": x, "caches": caches, "past_len": past_len, "new_len": new_len}, path)
    assert verdict.passed, verdict.lines()
    assert [name.split()[1] for name in verdict.selections] == ["SelectBlocks"] * len(LAYERS)
    assert all(judged.unexcused == 0 and judged.exact >= judged.rows - 2 for judged in verdict.selections.values())
    assert max(judged.error for judged in verdict.computations.values()) < 1e-5


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ContractError, match="budget of 10 tokens is no multiple of block_size=4; give whole blocks"):
        QsaRouter(8, heads=1, head_dim=4, block_size=4, budget=10, rotary_channels=2)
    with pytest.raises(ContractError, match="window=10 must be a multiple of stride=4, and block_size=16 one of 16"):
        InfLlmV2Router(block_size=16, window=10, stride=4, scale=1.0)
    router = MsaRouter(WIDTH, heads=1, head_dim=HEAD_DIM, block_size=8, topk=2, rotary_channels=4)
    with pytest.raises(ContractError, match="the cache holds 20 tokens, not a multiple of block_size=8; pad it"):
        router(torch.randn(1, 2, WIDTH), torch.zeros(1, 1, 20, HEAD_DIM), *lengths([0], [2]))
