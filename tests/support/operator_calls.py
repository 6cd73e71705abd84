"""Calls of the operators: valid inputs, drawn ones, and one-node models that answer them.

Scores are sums of small whole numbers: exact in fp32 in any order, so that routes must be equal bit for bit, and exact ties are
common.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import onnx
import onnxruntime as ort
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from bilevel import contract
from bilevel.bundle.cache_rows import CacheRows
from bilevel.export.graph.functions import attach_functions
from bilevel.export.graph.schemas import ONNX_OPSET, PLUGIN_NAMESPACE, register_schemas
from bilevel.operators import reference
from bilevel.operators.packed_caches import pack_rows

Inputs = dict[str, Tensor]
Attributes = dict[str, Any]
KINDS = {"uint8": TensorProto.UINT8, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT, "T": TensorProto.FLOAT}
# (Hr or Hq, Hk or Hkv, Hs), among them head groups that do not nest.
HEADS = [(1, 1, 1), (2, 1, 1), (4, 2, 2), (4, 4, 2), (4, 2, 4), (6, 3, 2), (6, 2, 3), (12, 4, 6), (12, 6, 4)]
ROUTE: Attributes = {
    "block_size": 4,
    "topk": 3,
    "num_selection_heads": 2,
    "init_blocks": 1,
    "local_blocks": 1,
    "causal": 1,
}
SELECT: Attributes = {
    "block_size": 4,
    "topk": 3,
    "scored_topk": 3,
    "init_blocks": 1,
    "local_blocks": 1,
    "partial_block": 0,
    "causal": 1,
}
SWIGLU: Attributes = {"gate_scale": 1.0, "limit": 0.0, "up_shift": 0.0}
BOUNDED: Attributes = {"gate_scale": 1.702, "limit": 0.7, "up_shift": 1.0}  # MiniMax-M3's, with a bound that is felt
PACKED: Attributes = {"bits": 4, "block_size": 32}
EXPERT: Attributes = {
    "top_k": 2,
    "topk_group": 2,
    "score_func": "sigmoid",
    "group_score": "external",
    "normalize": 1,
    "scale": 2.5,
    "norm_floor": 0.0,
    "zero_fill": 0,
}


def node_of(name: str, attributes: Attributes, suffix: str = "") -> onnx.NodeProto:
    op = contract.BY_NAME[name]
    outputs = [f"{port.name}_out{suffix}" for port in op.outputs]
    attributes = {**attributes, PLUGIN_NAMESPACE: contract.DOMAIN}
    return helper.make_node(name, [port.name for port in op.inputs], outputs, domain=contract.DOMAIN, **attributes)


def model_of(nodes: list[onnx.NodeProto], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A model of nodes of one operator that share their inputs; all sizes are free."""
    register_schemas()
    op = contract.BY_NAME[nodes[0].op_type]
    kinds = {**KINDS, "T": kind}

    def infos(ports: tuple[contract.Port, ...], names: Iterable[str]) -> list[onnx.ValueInfoProto]:
        pairs = zip(ports, names, strict=True)
        return [helper.make_tensor_value_info(name, kinds[port.dtype], [None] * len(port.shape)) for port, name in pairs]

    outputs = [info for node in nodes for info in infos(op.outputs, node.output)]
    graph = helper.make_graph(nodes, "one", infos(op.inputs, nodes[0].input), outputs)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    return attach_functions(helper.make_model(graph, opset_imports=opsets, ir_version=11))


@functools.lru_cache(maxsize=64)
def open_body(name: str, attributes: tuple[tuple[str, Any], ...], kind: int = TensorProto.FLOAT) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model_of([node_of(name, dict(attributes))], kind).SerializeToString(), options)


def run_body(name: str, inputs: Inputs, attributes: Attributes, kind: int = TensorProto.FLOAT) -> list[Tensor]:
    session = open_body(name, tuple(attributes.items()), kind)
    return [torch.from_numpy(out) for out in session.run(None, {key: value.numpy() for key, value in inputs.items()})]


def run_reference(name: str, inputs: Inputs, attributes: Attributes) -> list[Tensor]:
    result = getattr(reference, contract.BY_NAME[name].torch_name)(*inputs.values(), **attributes)
    return list(result) if isinstance(result, tuple) else [result]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Selections and bytes exactly, floats to rounding; NaN equals NaN."""
    for result, value in zip(got, expected, strict=True):
        if not result.is_floating_point():
            torch.testing.assert_close(result, value, rtol=0, atol=0)
        else:
            torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5, equal_nan=True)


def assert_equal(name: str, inputs: Inputs, attributes: Attributes) -> list[Tensor]:
    """The body's outputs, which must be the reference's."""
    got = run_body(name, inputs, attributes)
    assert_same(got, run_reference(name, inputs, attributes))
    return got


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def whole(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator).float()


def packed(experts: int, width: int, hidden: int, bits: int = 4, generator: torch.Generator | None = None) -> Inputs:
    """Random packed weights in blocks of 32; what pads a row is random too."""
    inputs: Inputs = {}
    for name, rows, depth in (("gate_up", 2 * hidden, width), ("down", width, hidden)):
        blocks = -(-depth // 32)
        draw = {"generator": generator}
        inputs[f"{name}_codes"] = torch.randint(0, 256, (experts, rows, blocks * 4 * bits), dtype=torch.uint8, **draw)
        inputs[f"{name}_scales"] = torch.randn(experts, rows, blocks, **draw) / 2**bits
        inputs[f"{name}_zeros"] = torch.randint(0, 2**bits, (experts, rows, blocks), dtype=torch.uint8, **draw)
    return inputs


def packed_cache(numbers: Tensor, form: str = "int8") -> Tensor:
    """Numbers [..., D] as rows of a packed cache."""
    return pack_rows(numbers, **CacheRows.of(form, numbers.shape[-1]).attributes)


def make_call(name: str, tokens: int = 6) -> tuple[Inputs, Attributes]:
    """Valid inputs of one operator: B2, R4, N5, two rows of different lengths; ``tokens`` is L or T."""
    lengths = {"past_len": int32(20 - tokens, 3), "new_len": int32(tokens, tokens // 2)}
    route = {"query": whole(2, 4, tokens, 3), "unit_key": whole(2, 2, 5, 3)}
    blocks = torch.randint(-1, 6, (2, 2, tokens, 4), dtype=torch.int32)
    attention = {"q": torch.randn(2, 4, tokens, 6), "k": torch.randn(2, 2, 20, 6), "v": torch.randn(2, 2, 20, 5)}
    scores = {"logits": torch.randn(tokens, 8), "group_logits": torch.randn(tokens, 4), "select_bias": torch.randn(8)}
    chosen = {"ids": torch.randint(-1, 9, (tokens, 3), dtype=torch.int32), "weights": torch.randn(tokens, 3)}
    calls: dict[str, tuple[Inputs, Attributes]] = {
        "CoarseRoute": ({**route, **lengths}, ROUTE),
        "FineRoute": ({**route, "candidates": blocks, **lengths}, ROUTE),
        "RoutedAttention": ({**attention, "routes": blocks, **lengths}, {"block_size": 4, "causal": 1, "scale": 0.4}),
        "RoutedAttentionSinks": (
            {**attention, "routes": blocks, **lengths, "sinks": torch.randn(4)},
            {"block_size": 4, "causal": 1, "scale": 0.4},
        ),
        "ExpertRoute": (scores, EXPERT),
        "RoutedExperts": (
            {"x": torch.randn(tokens, 6), **chosen, "gate_up": torch.randn(8, 10, 6), "down": torch.randn(8, 6, 5)},
            SWIGLU,
        ),
        "RoutedExpertsQuantized": ({"x": torch.randn(tokens, 40), **chosen, **packed(8, 40, 5)}, PACKED),
        "WriteCacheQuantized": (
            {
                "update": torch.randn(2, 3, tokens, 6),
                "cache": packed_cache(torch.randn(2, 3, 20, 6)),
                "start": int32(20 - tokens, 0),
            },
            {"bits": 8, "groups": 1},
        ),
        "UnpackCache": ({"rows": packed_cache(torch.randn(2, 3, tokens, 4, 6))}, {"bits": 8, "groups": 1, "width": 6}),
        "RoutedAttentionQuantized": (
            {
                "q": attention["q"],
                "k": packed_cache(attention["k"]),
                "v": packed_cache(torch.randn_like(attention["k"])),
                "routes": blocks,
                **lengths,
            },
            {"block_size": 4, "causal": 1, "scale": 0.4, "bits": 8, "groups": 1},
        ),
        # One row's update reaches over the cache's end.
        "WriteCache": ({"cache": torch.randn(2, 3, 20, 5), "update": torch.randn(2, 3, tokens, 5), "start": int32(4, 17)}, {}),
        "SelectBlocks": ({"scores": whole(2, 2, tokens, 5), **lengths}, SELECT),
    }
    return calls[name]


@st.composite
def route_calls(draw: st.DrawFn, fine: bool) -> tuple[Inputs, Attributes]:
    """Rows of different lengths (0 too), K over N, init + local over K, NaN and infinities; L on both sides of 8."""
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3]))
    block_size, num_blocks = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 8))
    length = draw(st.integers(1, min(20, block_size * num_blocks)))
    num_route_heads, num_key_heads, num_selection_heads = draw(st.sampled_from(HEADS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    inputs = {
        "query": whole(batch, num_route_heads, length, width, generator=generator),
        "unit_key": whole(batch, num_key_heads, num_blocks, width, generator=generator),
    }
    if draw(st.booleans()):
        for tensor in inputs.values():
            for value in (torch.nan, torch.inf, -torch.inf):
                tensor[torch.rand(tensor.shape, generator=generator) < 0.06] = value
    if fine:
        heads = draw(st.sampled_from([h for h in (1, 2, 3, 4, 6) if num_selection_heads % h == 0]))
        shape = (batch, heads, length, draw(st.integers(1, num_blocks + 2)))
        # Unsorted, with repeated, missing (-1) and out-of-range blocks.
        inputs["candidates"] = torch.randint(-2, num_blocks + 3, shape, generator=generator, dtype=torch.int32)
    room = block_size * num_blocks - length
    inputs["past_len"] = int32(*(draw(st.integers(0, room)) for _ in range(batch)))
    inputs["new_len"] = int32(*(draw(st.integers(0, length)) for _ in range(batch)))
    attributes = {
        "block_size": block_size,
        "topk": draw(st.integers(1, num_blocks + 2)),
        "num_selection_heads": num_selection_heads,
        "init_blocks": draw(st.integers(0, 3)),
        "local_blocks": draw(st.integers(1, 3)),
        "causal": draw(st.sampled_from([0, 1])),
    }
    return inputs, attributes


@st.composite
def select_calls(draw: st.DrawFn) -> tuple[Inputs, Attributes]:
    """Scores of every kind, more units than blocks, budgets that forced blocks exceed, whatever becomes of a partial block."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    block_size, num_blocks = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 8))
    length = draw(st.integers(1, min(20, block_size * num_blocks)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scores = whole(batch, heads, length, num_blocks + draw(st.integers(0, 2)), generator=generator)
    if draw(st.booleans()):
        for value in (torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float32).max, -0.0):
            scores[torch.rand(scores.shape, generator=generator) < 0.1] = value
    room = block_size * num_blocks - length
    inputs = {
        "scores": scores,
        "past_len": int32(*(draw(st.integers(0, room)) for _ in range(batch))),
        "new_len": int32(*(draw(st.integers(0, length)) for _ in range(batch))),
    }
    topk = draw(st.integers(1, num_blocks + 2))
    attributes = {
        "block_size": block_size,
        "topk": topk,
        "scored_topk": draw(st.integers(0, topk)),
        "init_blocks": draw(st.integers(0, 3)),
        "local_blocks": draw(st.integers(0, 3)),
        "partial_block": draw(st.integers(0, 2)),
        "causal": draw(st.sampled_from([0, 1])),
    }
    return inputs, attributes


@st.composite
def attention_calls(draw: st.DrawFn, sinks: bool = False) -> tuple[Inputs, Attributes]:
    """Values narrower, as wide and wider than keys; routes are sets: unsorted, repeated and out of range; L on both sides of 8,
    where the body changes its way."""
    batch = draw(st.integers(1, 2))
    block_size, num_blocks = draw(st.sampled_from([1, 3, 4])), draw(st.integers(1, 7))
    length = draw(st.integers(1, min(20, block_size * num_blocks)))
    num_heads, num_kv_heads, num_selection_heads = draw(st.sampled_from(HEADS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens, room = block_size * num_blocks, block_size * num_blocks - length
    shape = (batch, num_selection_heads, length, draw(st.integers(1, num_blocks + 2)))
    inputs = {
        "q": normal(batch, num_heads, length, 4) * draw(st.sampled_from([1.0, 300.0])),
        "k": normal(batch, num_kv_heads, tokens, 4),
        "v": normal(batch, num_kv_heads, tokens, draw(st.sampled_from([1, 4, 9]))),
        "routes": torch.randint(-2, num_blocks + 2, shape, generator=generator, dtype=torch.int32),
        "past_len": int32(*(draw(st.integers(0, room)) for _ in range(batch))),
        "new_len": int32(*(draw(st.integers(0, length)) for _ in range(batch))),
    }
    if sinks:
        inputs["sinks"] = normal(num_heads) * draw(st.sampled_from([1.0, 100.0]))
    return inputs, {"block_size": block_size, "causal": draw(st.sampled_from([0, 1])), "scale": 0.5}


# Of heads: less than a vector, odd ones, one group, several, and one that no group of 32 divides.
WIDTHS = {"int8": [1, 5, 6, 40, 64, 257], "int4": [2, 6, 32, 34, 40, 64, 96]}


@st.composite
def packed_attention_calls(draw: st.DrawFn, form: str) -> tuple[Inputs, Attributes]:
    """``attention_calls`` over packed caches of heads of several widths, some of whose rows are zeros."""
    inputs, attributes = draw(attention_calls())
    width = draw(st.sampled_from(WIDTHS[form]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    caches = {}
    for name in ("q", "k", "v"):
        caches[name] = torch.randn((*inputs[name].shape[:3], width), generator=generator)
        if name != "q":
            caches[name][torch.rand(caches[name].shape[:3], generator=generator) < 0.1] = 0
            caches[name] = packed_cache(caches[name], form)
    return {**inputs, **caches}, {**attributes, **CacheRows.of(form, width).attributes}


@st.composite
def cache_writes(draw: st.DrawFn, form: str) -> tuple[Inputs, Attributes]:
    """Numbers of any magnitude, whole steps and halves of them, zeros, too small ones, NaN and infinities."""
    batch, heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows = CacheRows.of(form, draw(st.sampled_from(WIDTHS[form])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    capacity = length + draw(st.integers(0, 5))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    update = torch.randn((batch, heads, length, rows.width), generator=generator)
    update = update * 10 ** (uniform(batch, heads, length, 1) * 78 - 42)
    whole_steps = (update.sign() * (uniform(*update.shape) * 254).round() / 2).clamp(-127, 127)
    whole_steps[..., 0] = 2.0 ** (rows.bits - 1) - 1
    update = torch.where(uniform(batch, heads, length, 1) < 0.3, whole_steps, update)
    update[uniform(batch, heads, length) < 0.1] = 0
    for value in (torch.nan, torch.inf, torch.finfo(torch.float32).max, 2.0**-100):
        update[uniform(*update.shape) < 0.01] = value
    cache = torch.randint(0, 256, (batch, heads, capacity, rows.num_bytes), generator=generator, dtype=torch.uint8)
    start = int32(*(draw(st.integers(0, capacity - length)) for _ in range(batch)))
    return {"update": update, "cache": cache, "start": start}, rows.attributes


@st.composite
def packed_blocks(draw: st.DrawFn, form: str) -> tuple[Inputs, Attributes]:
    """Blocks as :func:`cache_writes` leaves them."""
    inputs, attributes = draw(cache_writes(form))
    rows = pack_rows(inputs["update"], **attributes)[:, :, None]
    return {"rows": rows}, {**attributes, "width": inputs["update"].shape[-1]}


# Sums of two of these scores never lie within rounding of one another unless they are equal, whatever whole bias is added.
LOGITS = torch.tensor([-2.0, 0.0, 1.0, 3.0])


@st.composite
def expert_calls(draw: st.DrawFn, score_func: str, group_score: str) -> tuple[Inputs, Attributes]:
    """Ties, negative biases, groups and experts masked by -inf, NaN; more kept than finite scores are left."""
    num_tokens = draw(st.integers(1, 6))
    num_experts, num_groups = draw(st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 3), (8, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def pick(values: Tensor, *shape: int) -> Tensor:
        picked = values[torch.randint(len(values), shape, generator=generator)]
        if masks:
            for value in (torch.nan, torch.inf, -torch.inf, -torch.inf):
                picked[torch.rand(shape, generator=generator) < 0.08] = value
        return picked

    masks = draw(st.booleans())
    inputs = {
        "logits": pick(LOGITS, num_tokens, num_experts),
        "group_logits": pick(LOGITS, num_tokens, num_groups),
        "select_bias": pick(torch.tensor([-3.0, 0.0, 1.0]), num_experts),
    }
    topk_group = draw(st.integers(1, num_groups))
    attributes = {
        "top_k": draw(st.integers(1, topk_group * num_experts // num_groups)),
        "topk_group": topk_group,
        "score_func": score_func,
        "group_score": group_score,
        "normalize": draw(st.sampled_from([0, 1])),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "norm_floor": draw(st.sampled_from([0.0, 1e-12, 1.5])),
        "zero_fill": draw(st.sampled_from([0, 1])),
    }
    return inputs, attributes


@st.composite
def experts_calls(draw: st.DrawFn) -> tuple[Inputs, Attributes]:
    """Ids -1, out of range and repeated (which count twice); T on both sides of 4, where the body changes its way."""
    tokens, experts = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    kept, width = draw(st.integers(1, 4)), draw(st.sampled_from([1, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    inputs = {
        "x": torch.randn(tokens, width, generator=generator),
        "ids": torch.randint(-1, experts + 1, (tokens, kept), generator=generator, dtype=torch.int32),
        "weights": torch.randn(tokens, kept, generator=generator),
        "gate_up": torch.randn(experts, 6, width, generator=generator),
        "down": torch.randn(experts, width, 3, generator=generator),
    }
    return inputs, BOUNDED if tokens % 2 else SWIGLU


@st.composite
def packed_calls(draw: st.DrawFn, bits: int) -> tuple[Inputs, Attributes]:
    """The same over packed weights: rows of less than a block, of whole blocks and of more."""
    (inputs, _), width, hidden = (
        draw(experts_calls()),
        draw(st.sampled_from([1, 20, 32, 70])),
        draw(st.sampled_from([1, 5, 64])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tokens, experts = len(inputs["x"]), len(inputs["down"])
    chosen = {name: inputs[name] for name in ("ids", "weights")}
    x = torch.randn(tokens, width, generator=generator)
    return {"x": x, **chosen, **packed(experts, width, hidden, bits, generator)}, {"bits": bits, "block_size": 32}
