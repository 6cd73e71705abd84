"""The operators as modules call them: the contract is enforced, and what tracing sees agrees with what runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import contract, ops
from bilevel.errors import ContractError
from tests.support.operator_calls import PACKED, packed, packed_cache

ROUTE: dict[str, Any] = {
    "block_size": 3,
    "topk": 4,
    "num_selection_heads": 2,
    "init_blocks": 1,
    "local_blocks": 1,
    "causal": 1,
}
SELECT: dict[str, Any] = {
    "block_size": 3,
    "topk": 4,
    "scored_topk": 2,
    "init_blocks": 1,
    "local_blocks": 0,
    "partial_block": 1,
    "causal": 1,
}
EXPERT: dict[str, Any] = {
    "top_k": 3,
    "topk_group": 2,
    "score_func": "sigmoid",
    "group_score": "external",
    "normalize": 1,
    "scale": 2.5,
    "norm_floor": 0.0,
    "zero_fill": 0,
}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_call(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Valid inputs and attributes of one operator: B2, L5, R3, N4, two rows of different lengths."""
    lengths = {"past_len": int32(4, 0), "new_len": int32(5, 2)}
    route = {"query": torch.randn(2, 4, 5, 6), "unit_key": torch.randn(2, 2, 4, 6)}
    k, v = torch.randn(2, 2, 12, 6), torch.randn(2, 2, 12, 6)
    routes = torch.arange(4, dtype=torch.int32).expand(2, 2, 5, 4)
    scores = {"logits": torch.randn(7, 8), "group_logits": torch.randn(7, 4), "select_bias": torch.randn(8)}
    chosen = {"ids": torch.randint(0, 8, (7, 3), dtype=torch.int32), "weights": torch.randn(7, 3)}
    experts = {"gate_up": torch.randn(8, 10, 6), "down": torch.randn(8, 6, 5)}
    return {
        "CoarseRoute": ({**route, **lengths}, ROUTE),
        "FineRoute": ({**route, "candidates": routes[:, :1], **lengths}, ROUTE),
        "SelectBlocks": ({"scores": torch.randn(2, 2, 5, 4), **lengths}, SELECT),
        "RoutedAttention": (
            {"q": torch.randn(2, 4, 5, 6), "k": k, "v": v, "routes": routes, **lengths},
            {"block_size": 3, "causal": 1, "scale": 0.5},
        ),
        "RoutedAttentionSinks": (
            {"q": torch.randn(2, 4, 5, 6), "k": k, "v": v, "routes": routes, **lengths, "sinks": torch.randn(4)},
            {"block_size": 3, "causal": 1, "scale": 0.5},
        ),
        "ExpertRoute": (scores, EXPERT),
        "RoutedExperts": ({"x": torch.randn(7, 6), **chosen, **experts}, {"gate_scale": 1.7, "limit": 0.5, "up_shift": 1.0}),
        "RoutedExpertsQuantized": ({"x": torch.randn(7, 40), **chosen, **packed(8, 40, 5)}, PACKED),
        "WriteCacheQuantized": (
            {"update": torch.randn(2, 2, 5, 6), "cache": packed_cache(k), "start": int32(4, 0)},
            {"bits": 8, "groups": 1},
        ),
        "UnpackCache": ({"rows": packed_cache(k.unflatten(2, (4, 3)))}, {"bits": 8, "groups": 1, "width": 6}),
        "RoutedAttentionQuantized": (
            {"q": torch.randn(2, 4, 5, 6), "k": packed_cache(k), "v": packed_cache(v), "routes": routes, **lengths},
            {"block_size": 3, "causal": 1, "scale": 0.5, "bits": 8, "groups": 1},
        ),
    }[name]


def call(name: str, inputs: dict[str, Tensor], attributes: dict[str, Any]) -> Any:
    return getattr(ops, contract.BY_NAME[name].torch_name)(*inputs.values(), **attributes)


@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
def test_operator_node_equals_eager_call(name: str) -> None:
    inputs, attributes = make_call(name)
    assert list(inputs) == [port.name for port in contract.BY_NAME[name].inputs]
    node = getattr(torch.ops.bilevel, contract.BY_NAME[name].torch_name)
    results, expected = node(*inputs.values(), **attributes), call(name, inputs, attributes)
    for result, value in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, expected)), strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
def test_operator_schema_and_fake(name: str, dtype: torch.dtype) -> None:
    """PyTorch's own checks: the schema is honest, and the shape function agrees with the result."""
    inputs, attributes = make_call(name)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    node = getattr(torch.ops.bilevel, contract.BY_NAME[name].torch_name).default
    torch.library.opcheck(node, tuple(inputs.values()), attributes, test_utils=("test_schema", "test_faketensor"))
    declared = [port.name for port in contract.BY_NAME[name].inputs]
    declared += [attribute.name for attribute in contract.BY_NAME[name].attributes]
    assert [argument.name for argument in node._schema.arguments] == declared


@pytest.mark.parametrize("name", [op.name for op in contract.OPS])
def test_operator_exports_as_one_node(name: str) -> None:
    inputs, attributes = make_call(name)

    class Caller(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Any:
            return call(name, inputs, attributes)

    program = torch.export.export(Caller(), (inputs,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function" and "getitem" not in str(node)]
    assert targets == [f"bilevel.{contract.BY_NAME[name].torch_name}.default"]


@pytest.mark.parametrize("name", [op.name for op in contract.OPS if op.inputs[0].dtype != "uint8"])
def test_operator_in_fp64_is_not_exported(name: str) -> None:
    """fp64 is for reference computations: no device runs it, and the ONNX operators do not have it."""
    inputs, attributes = make_call(name)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}

    class Caller(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Any:
            return call(name, inputs, attributes)

    first = contract.BY_NAME[name].inputs[0].name
    with pytest.raises(
        ContractError, match=f"{name}: {first} is float64, .*; export the module in float32, float16 or bfloat16"
    ):
        torch.export.export(Caller(), (inputs,), strict=False)


Change = Callable[[dict[str, Any]], Any]
BAD_INPUTS: dict[str, tuple[str, Change, str]] = {
    # id: operator, change of its inputs, expected message
    "rank": (
        "CoarseRoute",
        lambda i: i.update(query=i["query"][0]),
        r"query must have shape \[B, Hr, L, Dr\], got \[4, 5, 6\]",
    ),
    "batch": ("CoarseRoute", lambda i: i.update(past_len=int32(1)), "past_len has B=1, but an earlier input has B=2"),
    "width": ("FineRoute", lambda i: i.update(unit_key=torch.randn(2, 2, 4, 5)), "unit_key has Dr=5, .* has Dr=6"),
    "candidate-length": ("FineRoute", lambda i: i.update(candidates=i["candidates"][:, :, :4]), "candidates has L=4, .* L=5"),
    "key-heads": ("CoarseRoute", lambda i: i.update(unit_key=torch.randn(2, 3, 4, 6)), "Hr=4 heads are not divisible by Hk=3"),
    "candidate-heads": (
        "FineRoute",
        lambda i: i.update(candidates=i["candidates"].expand(2, 3, 5, 4)),
        "Hs=2 heads are not divisible by Hc=3",
    ),
    "kv-heads": (
        "RoutedAttention",
        lambda i: i.update(k=torch.randn(2, 3, 12, 6), v=torch.randn(2, 3, 12, 6)),
        "Hq=4 heads are not divisible by Hkv=3",
    ),
    "selection-heads": (
        "RoutedAttention",
        lambda i: i.update(routes=torch.zeros(2, 3, 5, 1, dtype=torch.int32)),
        "Hq=4 heads are not divisible by Hs=3",
    ),
    "value-capacity": ("RoutedAttention", lambda i: i.update(v=i["v"][:, :, :9]), "v has M=9, but an earlier input has M=12"),
    "whole-blocks": (
        "RoutedAttention",
        lambda i: i.update(k=i["k"][:, :, :10], v=i["v"][:, :, :10]),
        "hold 10 tokens, not a multiple of block_size=3; pad them with bilevel.ops.pad_to_blocks",
    ),
    "int64-routes": ("RoutedAttention", lambda i: i.update(routes=i["routes"].long()), "routes must be int32, got int64"),
    "int64-lengths": ("CoarseRoute", lambda i: i.update(new_len=i["new_len"].long()), "new_len must be int32, got int64"),
    "mixed-types": (
        "RoutedAttention",
        lambda i: i.update(k=i["k"].half()),
        "k is float16, but q is float32; give both one type",
    ),
    "whole-number-query": (
        "CoarseRoute",
        lambda i: i.update(query=i["query"].int()),
        "query must be of a float type, got int32",
    ),
    "half-scores": ("SelectBlocks", lambda i: i.update(scores=i["scores"].half()), "scores must be float32, got float16"),
    "half-logits": ("ExpertRoute", lambda i: i.update(logits=i["logits"].half()), "logits must be float32, got float16"),
    "float-weights-of-fp64": (
        "RoutedExperts",
        lambda i: i.update({key: x.double() for key, x in i.items() if key in ("x", "gate_up", "down")}),
        "weights must be float64, got float32",
    ),
    "fp64-logits-only": (
        "ExpertRoute",
        lambda i: i.update(logits=i["logits"].double()),
        "group_logits must be float64, got float32",
    ),
    "bias-size": ("ExpertRoute", lambda i: i.update(select_bias=torch.zeros(7)), "select_bias has E=7, .* has E=8"),
    "groups": ("ExpertRoute", lambda i: i.update(group_logits=torch.zeros(7, 3)), "8 experts are not divisible into 3 groups"),
    "few-groups": ("ExpertRoute", lambda i: i.update(group_logits=torch.zeros(7, 1)), "topk_group=2 exceeds the 1 groups"),
    "gate-up-rows": ("RoutedExperts", lambda i: i.update(gate_up=torch.randn(8, 9, 6)), "gate_up has 2f=9, but f=5 elsewhere"),
    "expert-count": ("RoutedExperts", lambda i: i.update(down=torch.randn(7, 6, 5)), "down has E=7, .* has E=8"),
    "choices": (
        "RoutedExperts",
        lambda i: i.update(weights=torch.randn(7, 2)),
        "weights has k=2, but an earlier input has k=3",
    ),
    "odd-rows": (
        "RoutedExpertsQuantized",
        lambda i: i.update({key: x[:, :9] for key, x in i.items() if key.startswith("gate_up")}),
        "gate_up_codes has R=9 rows, but gate and up have as many each; give an even number",
    ),
    "packed-row": (
        "RoutedExpertsQuantized",
        lambda i: i.update(gate_up_codes=i["gate_up_codes"][..., :20]),
        "Pd=20, but d=40 in 4 bits and blocks of 32 takes 32; pad every row to whole blocks",
    ),
    "packed-blocks": (
        "RoutedExpertsQuantized",
        lambda i: i.update(down_scales=torch.randn(8, 40, 2)),
        "down_zeros has Sf=1, but an earlier input has Sf=2",
    ),
    "codes-of-floats": (
        "RoutedExpertsQuantized",
        lambda i: i.update(down_codes=i["down_codes"].float()),
        "down_codes must be uint8, got float32",
    ),
    "missing-input": ("RoutedExperts", lambda i: i.pop("down"), "RoutedExperts takes 5 inputs, got 4"),
}
BAD_ATTRIBUTES: dict[str, tuple[str, dict[str, Any], str]] = {
    "K0": ("CoarseRoute", {"topk": 0}, "topk=0 must lie between 1 and 3840"),
    "K3841": ("FineRoute", {"topk": 3841}, "topk=3841 must lie between 1 and 3840"),
    "block-size-0": ("RoutedAttention", {"block_size": 0}, "block_size=0 must lie between 1 and 2147483647"),
    "block-size-2^31": ("RoutedAttention", {"block_size": 2**31}, "block_size=2147483648 must lie between"),
    "no-own-block": ("CoarseRoute", {"local_blocks": 0}, "local_blocks=0 must lie between 1"),
    "negative-init": ("CoarseRoute", {"init_blocks": -1}, "init_blocks=-1 must lie between 0"),
    "causal-2": ("CoarseRoute", {"causal": 2}, "causal=2 must lie between 0 and 1"),
    "causal-bool": ("CoarseRoute", {"causal": True}, "causal=True must be of type int"),
    "partial-3": ("SelectBlocks", {"partial_block": 3}, "partial_block=3 must lie between 0 and 2"),
    "negative-budget": ("SelectBlocks", {"scored_topk": -1}, "scored_topk=-1 must lie between 0 and 3840"),
    "no-scale-of-scores": ("SelectBlocks", {"num_selection_heads": 2}, "SelectBlocks has no attribute num_selection_heads"),
    "float-topk": ("CoarseRoute", {"topk": 4.0}, "topk=4.0 must be of type int"),
    "selection-heads": ("CoarseRoute", {"num_selection_heads": 3}, "Hr=4 heads are not divisible by Hs=3"),
    "unknown": ("CoarseRoute", {"stride": 1}, "CoarseRoute has no attribute stride"),
    "string-scale": ("RoutedAttention", {"scale": "0.5"}, "scale='0.5' must be of type float"),
    "score-func": ("ExpertRoute", {"score_func": "relu"}, "score_func='relu' must be one of sigmoid, softmax, sqrtsoftplus"),
    "group-score": ("ExpertRoute", {"group_score": 1}, "group_score=1 must be of type string"),
    "top-k": ("ExpertRoute", {"top_k": 5}, "top_k=5 exceeds the 4 experts that 2 groups hold"),
    "three-bits": ("RoutedExpertsQuantized", {"bits": 3}, "bits=3 must be one of 4, 8"),
    "packed-in-eight": ("RoutedExpertsQuantized", {"bits": 8}, "Pd=32, but d=40 in 8 bits and blocks of 32 takes 64"),
    "small-blocks": ("RoutedExpertsQuantized", {"block_size": 16}, "block_size=16 must be one of 32, 64, 128"),
    "norm-floor": ("ExpertRoute", {"norm_floor": -0.5}, "norm_floor=-0.5 must be a finite number of at least 0"),
    "norm-floor-inf": ("ExpertRoute", {"norm_floor": float("inf")}, "norm_floor=inf must be a finite number of at least 0"),
    "norm-floor-nan": ("ExpertRoute", {"norm_floor": float("nan")}, "norm_floor=nan must be a finite number of at least 0"),
    "zero-fill": ("ExpertRoute", {"zero_fill": 2}, "zero_fill=2 must lie between 0 and 1"),
    "topk-group": ("ExpertRoute", {"topk_group": 5}, "topk_group=5 exceeds the 4 groups there are"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_operator_refuses_inputs(case: str) -> None:
    name, change, message = BAD_INPUTS[case]
    inputs, attributes = make_call(name)
    call(name, inputs, attributes)
    change(inputs)
    with pytest.raises(ContractError, match=message):
        call(name, inputs, attributes)


@pytest.mark.parametrize("case", BAD_ATTRIBUTES)
def test_operator_refuses_attributes(case: str) -> None:
    name, changes, message = BAD_ATTRIBUTES[case]
    inputs, attributes = make_call(name)
    with pytest.raises(ContractError, match=message):
        call(name, inputs, {**attributes, **changes})


@pytest.mark.parametrize("name", [op.name for op in contract.OPS if op.attributes])
def test_operator_attributes_have_no_defaults_but_those_that_came_later(name: str) -> None:
    inputs, attributes = make_call(name)
    later = {each.name: each.default for each in contract.BY_NAME[name].attributes if each.default is not None}
    expected = {"ExpertRoute": {"norm_floor", "zero_fill"}, "RoutedExperts": {"gate_scale", "limit", "up_shift"}}
    assert set(later) == expected.get(name, set())
    older = call(name, inputs, {key: value for key, value in attributes.items() if key not in later})
    for got, want in zip(older, call(name, inputs, {**attributes, **later}), strict=True):
        assert torch.equal(got, want)
    for missing in attributes.keys() - later:
        rest = {key: value for key, value in attributes.items() if key != missing}
        with pytest.raises(ContractError, match=f"{name} needs the attribute {missing} \\("):
            call(name, inputs, rest)


@pytest.mark.parametrize("shape", [(3, 2, 8, 5), (3, 8)], ids=["B3-H2-M8-D5", "B3-M8"])
def test_write_cache(shape: tuple[int, ...]) -> None:
    """Every row at its own position; eager in place, exported as a function; nothing else is touched."""
    axis = 2 if len(shape) > 2 else 1
    cache, update = torch.randn(shape), torch.randn(*shape[:axis], 3, *shape[axis + 1 :])
    before, start = cache.clone(), int32(0, 5, 2)
    functional = torch.ops.bilevel.write_cache(cache, update, start, update.shape[min(2, update.dim() - 1)])
    assert torch.equal(cache, before)
    written = ops.write_cache(cache, update, start)
    assert written is cache and torch.equal(functional, written)
    for row, first in enumerate(start.tolist()):
        assert torch.equal(cache[row].narrow(axis - 1, first, 3), update[row])
        kept = [t for t in range(8) if not first <= t < first + 3]
        index = torch.tensor(kept)
        assert torch.equal(cache[row].index_select(axis - 1, index), before[row].index_select(axis - 1, index))


def test_write_cache_refuses_what_does_not_fit() -> None:
    cache = torch.zeros(2, 1, 8, 2)
    with pytest.raises(ContractError, match="3 tokens do not fit at 6 in a cache of 8; make the cache larger"):
        ops.write_cache(cache, torch.ones(2, 1, 3, 2), int32(0, 6))
    assert cache.count_nonzero() == 0  # the row that fits is not written either


BLOCKS = pytest.mark.parametrize("block_size, num_blocks", [(1, 5), (3, 1), (4, 2)], ids=["R1-N5", "R3-N1", "R4-N2"])


@BLOCKS
def test_gather_blocks(block_size: int, num_blocks: int) -> None:
    tokens, first = torch.randn(3, 2, 6 * block_size, 5), int32(0, 6 - num_blocks, 1)
    blocks = ops.gather_blocks(tokens, first, num_blocks, block_size)
    assert blocks.shape == (3, 2, num_blocks, block_size, 5)
    for b, start in enumerate(first.tolist()):
        row = tokens[b, :, start * block_size : (start + num_blocks) * block_size]
        assert torch.equal(blocks[b].flatten(1, 2), row)
    node = torch.ops.bilevel.gather_blocks.default
    assert torch.equal(node(tokens, first, num_blocks, block_size), blocks)
    torch.library.opcheck(node, (tokens, first, num_blocks, block_size), test_utils=("test_schema", "test_faketensor"))


@BLOCKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_blocks(block_size: int, num_blocks: int, dtype: torch.dtype) -> None:
    tokens, first = torch.randn(3, 2, 6 * block_size, 5).to(dtype), int32(0, 6 - num_blocks, 1)
    pooled = ops.pool_blocks(tokens, first, num_blocks, block_size)
    assert pooled.dtype == dtype and pooled.shape == (3, 2, num_blocks, 5)
    for b, start in enumerate(first.tolist()):
        for j in range(num_blocks):
            mean = tokens[b, :, (start + j) * block_size :][:, :block_size].double().mean(1)
            torch.testing.assert_close(pooled[b, :, j], mean.to(dtype))


@pytest.mark.parametrize("length, padded", [(1, 4), (4, 4), (5, 8), (0, 0)])
def test_pad_to_blocks(length: int, padded: int) -> None:
    tokens = torch.randn(2, 3, length, 5)
    out = ops.pad_to_blocks(tokens, 4)
    assert out.shape == (2, 3, padded, 5)
    assert torch.equal(out[:, :, :length], tokens) and out[:, :, length:].count_nonzero() == 0
