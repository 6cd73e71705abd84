"""Checks of ``make gpu-test``, first part: the kernels as Triton compiles them for PyTorch, every plan, and ``bilevel.ops``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import contract, gpu_kernels, ops
from bilevel.plugins.kernels import launch as triton_launch
from bilevel.plugins.launch.launches import choose_plan
from tests.gpu import cases as gpu_cases
from tests.gpu.cases import Attention, Cache, ExpertRoute, Experts, Route
from tests.gpu.judges import judge, wrong_rows
from tests.gpu.machine import Attributes, Inputs, Machine, dtype_name
from tests.gpu.result import Result

_GIB = 2**30
_SPLIT_MOST = 16  # tokens up to which every plan of an operator is run, whichever one calls of that size take


def _title(name: str, inputs: Inputs, attributes: Attributes) -> str:
    sizes = contract.BY_NAME[name].bind_shapes([x.shape for x in inputs.values()])
    kept = {"K": attributes.get("topk"), "k": attributes.get("top_k")}
    sizes = {**sizes, **{key: value for key, value in kept.items() if value}}
    order = ("L", "T", "Hq", "Hr", "Hkv", "Hk", "Hs", "D", "Dv", "Dr", "M", "U", "K", "E", "Gp", "k", "d", "f", "H", "W")
    return f"{dtype_name(next(iter(inputs.values())))} " + " ".join(f"{key}={sizes[key]}" for key in order if key in sizes)


def check_call(machine: Machine, name: str, inputs: Inputs, attributes: Attributes) -> Iterator[Result]:
    """Every plan that suits the call's size, and what ``bilevel.ops`` gives, which must be the same bits."""
    op = contract.BY_NAME[name]
    inputs = {key: machine.put(x) for key, x in inputs.items()}
    plans, sizes = triton_launch.plans_for(op, list(inputs.values()), attributes)
    chosen, few = choose_plan(plans, sizes), sizes.get("L", sizes.get("T", 0)) <= _SPLIT_MOST
    for plan in plans:
        if plan is not chosen and not few:
            continue
        outputs = machine.outputs(op, inputs, attributes)
        workspace = machine.bytes(plan.workspace_bytes(sizes))
        triton_launch.run_plan(op, plan, list(inputs.values()), outputs, workspace, sizes, attributes)
        intact = machine.intact()
        measure, right = judge(name, outputs, inputs, attributes)
        if plan is chosen and op in contract.OPS:
            right, measure = _same_by_ops(machine, op, inputs, attributes, outputs, right, measure)
        measure += "" if intact else "; WROTE BEHIND A TENSOR"
        yield Result(f"{name} {plan.name}", _title(name, inputs, attributes), measure, right and intact)


def _same_by_ops(
    machine: Machine,
    op: contract.Op,
    inputs: Inputs,
    attributes: Attributes,
    outputs: Sequence[Tensor],
    right: bool,
    measure: str,
) -> tuple[bool, str]:
    kernels: Any = gpu_kernels.kernels_for(machine.device.type)
    if kernels is None or not kernels.covers(op, list(inputs.values()), attributes):
        return False, f"{measure}; bilevel.ops would not use the kernel"
    found = getattr(ops, op.torch_name)(*inputs.values(), **attributes)
    found = found if isinstance(found, tuple) else (found,)
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, outputs, strict=True))
    return right and same, measure if same else f"{measure}; bilevel.ops gives something else"


def attention(machine: Machine, cases: Sequence[Attention] = gpu_cases.ATTENTION) -> Iterator[Result]:
    for case in cases:
        for dtype in case.dtypes:
            for length in case.lengths:
                yield from check_call(machine, "RoutedAttention", *case.call(machine.random(), length, dtype))


def routes(machine: Machine, cases: Sequence[Route] = gpu_cases.ROUTES) -> Iterator[Result]:
    for case in cases:
        for length in case.lengths:
            yield from check_call(machine, "SelectBlocks", *case.given(machine.random(), length))
        for dtype in case.dtypes:
            for length in case.lengths:
                yield from check_call(machine, "CoarseRoute", *case.call(machine.random(), length, dtype, fine=False))
                yield from check_call(machine, "FineRoute", *case.call(machine.random(), length, dtype, fine=True))


def expert_route(
    machine: Machine, cases: Sequence[ExpertRoute] = gpu_cases.EXPERT_ROUTES, tokens: int = 33
) -> Iterator[Result]:
    for case in cases:
        yield from check_call(machine, "ExpertRoute", *case.call(machine.random(), tokens))


def experts(machine: Machine, cases: Sequence[Experts] = gpu_cases.EXPERTS) -> Iterator[Result]:
    for case in cases:
        for dtype in case.dtypes:
            for tokens in case.tokens:
                yield from check_call(machine, "RoutedExperts", *case.call(machine.random(), tokens, dtype))


def caches(machine: Machine, cases: Sequence[Cache] = gpu_cases.CACHES) -> Iterator[Result]:
    for case in cases:
        for dtype in case.dtypes:
            for length in case.lengths:
                yield from check_call(machine, "WriteCache", *case.call(machine.random(), length, dtype))


def margins(machine: Machine, length: int = 500, blocks: int = 1500, width: int = 128) -> Iterator[Result]:
    """Routes by ordinary scores: wrong only where a score left out beats one kept by more than fp32 sums may be off."""
    attributes = {"block_size": 1, "topk": 16, "num_selection_heads": 2, "init_blocks": 0, "local_blocks": 1, "causal": 1}
    for dtype in gpu_cases.ALL:
        random = machine.random(1)
        query = torch.randn((1, 8, length, width), generator=random, device=machine.device).to(dtype)
        unit_key = torch.randn((1, 2, blocks, width), generator=random, device=machine.device).to(dtype)
        past_len, new_len = (machine.put(torch.tensor([n], dtype=torch.int32)) for n in (blocks - length, length))
        found = ops.coarse_route(machine.put(query), machine.put(unit_key), past_len, new_len, **attributes)
        scores = (query.double().unflatten(1, (2, 4)).sum(2) @ unit_key.double().mT)[0]
        sums = (query.double().abs().unflatten(1, (2, 4)).sum(2) @ unit_key.double().abs().mT).max()
        block = torch.arange(blocks, device=machine.device)
        own = torch.arange(blocks - length, blocks, device=machine.device)[:, None]
        scores = torch.where(block == own, torch.inf, torch.where(block < own, scores, -torch.inf))
        tolerance = 4 * width * 2.0**-24 * float(sums)
        wrong = wrong_rows(found[0].flatten(0, 1), scores.flatten(0, 1), tolerance)
        shifted = wrong_rows(found[0].roll(1, 1).flatten(0, 1), scores.flatten(0, 1), tolerance)
        measure = f"{wrong} of {2 * length} choices outside the margin of {tolerance:.0e} ({shifted} with rows shifted by one)"
        yield Result("CoarseRoute by score", f"{dtype_name(query)} U={blocks} K=16", measure, wrong == 0 and shifted > length)


def far_offsets(machine: Machine) -> Iterator[Result]:
    """Tensors of more than 2^31 elements, of which only the far end is looked at; the rest is memory as it was."""
    for name, needed, check in (
        ("a cache of 1,048,576 tokens", 5, _far_cache),
        ("queries and outputs", 10, _far_queries),
        ("experts' weights", 7, _far_experts),
    ):
        if machine.free_bytes() < needed * _GIB:
            yield Result("64-bit offsets", name, f"needs {needed} GiB of free GPU memory", None)
            continue
        try:
            yield from check(machine, name)
        finally:
            torch.cuda.empty_cache()


def _far_cache(machine: Machine, what: str) -> Iterator[Result]:
    heads, capacity, width, size, random = 9, 2**20, 256, 64, machine.random(2)
    k = torch.empty(1, heads, capacity, width, dtype=torch.float16, device=machine.device)
    last = capacity // size - 1
    for j in (3, last):
        k[0, -1, j * size : (j + 1) * size] = torch.randn((size, width), generator=random, device=machine.device).half()
    q = torch.randn((1, heads, 1, width), generator=random, device=machine.device).half()
    kept = torch.full((1, heads, 1, 2), -1, dtype=torch.int32, device=machine.device)
    kept[0, -1, 0, 0], kept[0, -1, 0, 1] = last, 3
    past_len, new_len = (torch.tensor([n], dtype=torch.int32, device=machine.device) for n in (capacity - 1, 1))
    inputs, attributes = [q, k, k, kept, past_len, new_len], {"block_size": size, "causal": 1, "scale": 0.05}
    keys = torch.cat([k[0, -1, j * size : (j + 1) * size] for j in (3, last)]).double()
    truth = torch.softmax(keys @ q[0, -1, 0].double() * 0.05, 0) @ keys
    plans, sizes = triton_launch.plans_for(contract.ROUTED_ATTENTION, inputs, attributes)
    for plan in plans:
        out = torch.full_like(q, torch.nan)
        workspace = machine.bytes(plan.workspace_bytes(sizes))
        triton_launch.run_plan(contract.ROUTED_ATTENTION, plan, inputs, [out], workspace, sizes, attributes)
        error = float((out[0, -1, 0].double() - truth).abs().max() / truth.abs().max())
        right = error < 2e-3 and bool((out[0, :-1] == 0).all()) and machine.intact()
        yield Result("64-bit offsets", f"{what}, plan {plan.name}", f"largest error {error:.1e}", right)


def _far_queries(machine: Machine, what: str) -> Iterator[Result]:
    heads, length, width, size = 32, 2**19 + 64, 128, 64
    q = torch.empty(1, heads, length, width, dtype=torch.float16, device=machine.device)
    q[0, -1, -size:] = torch.randn((size, width), generator=machine.random(3), device=machine.device).half()
    k = torch.randn((1, 1, length, width), generator=machine.random(4), device=machine.device).half()
    kept = (torch.arange(length, device=machine.device, dtype=torch.int32) // size).view(1, 1, length, 1)
    past_len, new_len = (torch.tensor([n], dtype=torch.int32, device=machine.device) for n in (0, length))
    out = ops.routed_attention(q, k, k, kept, past_len, new_len, block_size=size, causal=1, scale=0.1)
    keys = k[0, 0, -size:].double()
    scores = (q[0, -1, -size:].double() @ keys.mT * 0.1).masked_fill(
        torch.ones(size, size, device=machine.device).triu(1) > 0, -torch.inf
    )
    truth = torch.softmax(scores, -1) @ keys
    error = float((out[0, -1, -size:].double() - truth).abs().max() / truth.abs().max())
    yield Result("64-bit offsets", f"{what} of {length:,} tokens", f"largest error {error:.1e}", error < 2e-3)


def _far_experts(machine: Machine, what: str) -> Iterator[Result]:
    count, width, inner, random = 64, 4128, 4096, machine.random(5)
    gate_up = torch.empty(count, 2 * inner, width, dtype=torch.float16, device=machine.device)
    gate_up[-1] = torch.randn(gate_up[-1].shape, generator=random, device=machine.device).half() * width**-0.5
    down = torch.empty(count, width, inner, dtype=torch.float16, device=machine.device)
    down[-1] = torch.randn(down[-1].shape, generator=random, device=machine.device).half() * inner**-0.5
    for tokens in (1, 40):
        x = torch.randn((tokens, width), generator=random, device=machine.device).half()
        ids = torch.full((tokens, 1), count - 1, dtype=torch.int32, device=machine.device)
        weights = torch.ones(tokens, 1, device=machine.device)
        out = ops.routed_experts(x, ids, weights, gate_up, down)
        gate, up = (x.double() @ gate_up[-1].double().mT).chunk(2, -1)
        truth = (torch.nn.functional.silu(gate) * up) @ down[-1].double().mT
        error = float((out.double() - truth).abs().max() / truth.abs().max())
        yield Result("64-bit offsets", f"{what}, T={tokens}", f"largest error {error:.1e}", error < 5e-3)
