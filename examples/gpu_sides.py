"""What ``examples/gpu_bench.py`` compares: routed attention, PyTorch's dense attention, FlexAttention with the same blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bilevel import ops
from bilevel.operators import attention

Work = Callable[[], Tensor]
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_TILE = 128  # positions in a row of FlexAttention's block mask


@dataclass(frozen=True)
class Case:
    """heads: Hq, Hkv. width: D. correlation: of neighbouring tokens' vectors; 0: independent, the worst for tiles."""

    phase: str
    heads: tuple[int, int]
    width: int
    context: int
    batch: int
    correlation: float
    dtype: torch.dtype
    block_size: int
    coarse_topk: int
    topk: int
    route_dim: int

    @property
    def length(self) -> int:
        return 1 if self.phase == "decode" else self.context


@dataclass(frozen=True)
class Tensors:
    """q [B, Hq, L, D]; k, v [B, Hkv, M, D]; words [B, 1, L, Dr], descriptors [B, 1, N, Dr]; block_keys [B, Hkv, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    words: Tensor
    descriptors: Tensor
    block_keys: Tensor
    past_len: Tensor
    new_len: Tensor


def correlated(shape: tuple[int, ...], correlation: float, random: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal numbers [B, ...]; along the axis before the last, those n apart are correlated by ``correlation`` ** n."""
    rows = []
    for _ in range(shape[0]):  # one at a time: the temporaries are in fp32
        x = torch.randn(shape[1:], generator=random, device=random.device)
        factor, step = correlation, 1
        while factor > 1e-3 and step < shape[-2]:  # 1 / (1 - az) = (1 + az)(1 + a^2 z^2)(1 + a^4 z^4)...
            x[..., step:, :] += factor * x[..., :-step, :].clone()
            factor, step = factor * factor, 2 * step
        rows.append((x * (1 - correlation**2) ** 0.5).to(dtype))
    return torch.stack(rows)


def make_tensors(case: Case, device: torch.device) -> Tensors:
    random = torch.Generator(device).manual_seed(7)
    blocks = case.context // case.block_size

    def make(heads: int, count: int, width: int, correlation: float = case.correlation) -> Tensor:
        return correlated((case.batch, heads, count, width), correlation, random, case.dtype)

    k = make(case.heads[1], case.context, case.width)
    if case.phase == "decode":
        descriptors, words = make(1, blocks, case.route_dim, 0.0), make(1, 1, case.route_dim)
    else:
        words = make(1, case.context, case.route_dim)
        descriptors = _means(words, case.block_size)
    lengths = [
        torch.full((case.batch,), n, dtype=torch.int32, device=device) for n in (case.context - case.length, case.length)
    ]
    q, v = make(case.heads[0], case.length, case.width), make(case.heads[1], case.context, case.width)
    return Tensors(q, k, v, words, F.normalize(descriptors, dim=-1), _means(k, case.block_size), *lengths)


def _means(x: Tensor, block_size: int) -> Tensor:
    return torch.stack([row.unflatten(1, (-1, block_size)).float().mean(2).to(x.dtype) for row in x])


class Routed:
    """Our side: both levels and the attention, by ``bilevel.ops``."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self.case, self.t = case, tensors
        self.scale = case.width**-0.5
        self._route = {"block_size": case.block_size, "init_blocks": 1, "local_blocks": 1, "causal": 1}
        self.candidates = self.coarse()
        self.routes = self.fine()

    def coarse(self) -> Tensor:
        t, case = self.t, self.case
        given = {**self._route, "topk": case.coarse_topk, "num_selection_heads": 1}
        return ops.coarse_route(t.words, t.descriptors, t.past_len, t.new_len, **given)

    def fine(self, candidates: Tensor | None = None) -> Tensor:
        t, case = self.t, self.case
        given = {**self._route, "topk": case.topk, "num_selection_heads": case.heads[1]}
        candidates = self.candidates if candidates is None else candidates
        return ops.fine_route(t.q, t.block_keys, candidates, t.past_len, t.new_len, **given)

    def attend(self, routes: Tensor | None = None) -> Tensor:
        t, routes = self.t, self.routes if routes is None else routes
        return ops.routed_attention(
            t.q, t.k, t.v, routes, t.past_len, t.new_len, block_size=self.case.block_size, causal=1, scale=self.scale
        )

    def all(self) -> Tensor:
        return self.attend(self.fine(self.coarse()))

    def error(self, out: Tensor, samples: int = 16) -> float:
        """The largest error against fp64 at sampled positions, relative to the largest value there."""
        random = torch.Generator().manual_seed(3)
        worst, largest = 0.0, 1e-30
        for _ in range(samples):
            b, i = (int(torch.randint(n, (1,), generator=random)) for n in (self.case.batch, self.case.length))
            truth = self._exact(b, i)
            worst = max(worst, float((out[b, :, i].double() - truth).abs().max()))
            largest = max(largest, float(truth.abs().max()))
        return worst / largest

    def _exact(self, b: int, i: int) -> Tensor:
        """fp64 [Hq, D]: one position's attention over the gathered tokens of its route."""
        t, size = self.t, self.case.block_size
        routes = self.routes[b, :, i].long()
        tokens = (routes[..., None] * size + torch.arange(size, device=routes.device)).flatten(1)
        seen = (routes >= 0).repeat_interleave(size, 1) & (tokens <= int(t.past_len[b]) + i)
        index = tokens.clamp(min=0)[..., None].expand(-1, -1, self.case.width)
        k, v = (x[b].gather(1, index).double() for x in (t.k, t.v))
        q = t.q[b, :, i].double().unflatten(0, (self.case.heads[1], -1))
        mask = attention.AttentionMask.of(seen[None, :, None])
        return attention.masked_attention(q[None], k[None], v[None], mask, self.scale)[0].flatten(0, 1)


def dense_sides(case: Case, t: Tensors, compiled: bool) -> Iterator[tuple[str, Work]]:
    """PyTorch's ways to attend to everything. In decode the heads of a group may also stand as the rows of one head."""
    cuda = t.q.device.type == "cuda"
    packed = t.q.unflatten(1, (case.heads[1], -1)).flatten(2, 3) if case.phase == "decode" else None

    def sdpa(q: Tensor, backend: SDPBackend) -> Work:
        grouped = q.shape[1] != t.k.shape[1]

        def work() -> Tensor:
            with sdpa_kernel(backend):
                causal = case.phase != "decode"
                return F.scaled_dot_product_attention(q, t.k, t.v, is_causal=causal, enable_gqa=grouped)

        return work

    for name, backend in _BACKENDS.items():
        if (name == "math") == cuda:  # on a GPU it writes the whole score matrix
            continue
        yield name, sdpa(t.q, backend)
        if packed is not None:
            yield f"{name}, heads as rows", sdpa(packed, backend)
    if compiled and packed is not None:
        run = torch.compile(flex_attention, dynamic=False)
        yield "FlexAttention", lambda: run(packed, t.k, t.v)


def block_mask(case: Case, t: Tensors, routes: Tensor) -> tuple[BlockMask, Tensor]:
    """(the mask, the queries that it is for). A row of blocks is what _TILE positions keep together, a bit for each reader."""
    size, blocks = case.block_size, case.context // case.block_size
    group = case.heads[0] // case.heads[1]
    bits = _bits(routes, blocks)
    if case.phase == "decode":
        q = t.q.unflatten(1, (case.heads[1], group)).flatten(2, 3)
        kept, repeat = _kept(routes, blocks, 1), 1
        end = t.past_len + 1

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            block = j // size
            return (((bits[b, h, 0, block // 32] >> (block % 32)) & 1) == 1) & (j < end[b])

    else:
        q, kept, repeat = t.q, _kept(routes, blocks, _TILE), group

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            block = j // size
            return (((bits[b, h // group, i, block // 32] >> (block % 32)) & 1) == 1) & (j <= i)

    counts = torch.stack([row.sum(-1) for row in kept]).to(torch.int32)
    order = torch.stack([row.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32) for row in kept])
    counts, order = counts.repeat_interleave(repeat, 1), order.repeat_interleave(repeat, 1)
    lengths = (q.shape[2], case.context)
    mask = BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=(_TILE, size), mask_mod=mask_mod, seq_lengths=lengths, compute_q_blocks=False
    )
    return mask, q


def _kept(routes: Tensor, blocks: int, tile: int) -> list[Tensor]:
    """For every row of the batch bool [Hkv, tiles, N]: the blocks that some position of a tile kept."""
    padded = F.pad(routes, (0, 0, 0, -routes.shape[2] % tile), value=-1)
    found = []
    for row in padded:
        index = torch.where(row >= 0, row, blocks).long().reshape(row.shape[0], row.shape[1] // tile, -1)
        read = torch.zeros(*index.shape[:2], blocks + 1, dtype=torch.bool, device=row.device)
        found.append(read.scatter_(2, index, True)[..., :-1])
    return found


def _bits(routes: Tensor, blocks: int) -> Tensor:
    """int32 [B, Hkv, L, ceil(N/32)]: a bit for every block that a position kept."""
    made = torch.zeros(*routes.shape[:3], blocks // 32 + 1, dtype=torch.int32, device=routes.device)
    for row, into in zip(routes, made, strict=True):
        bit = torch.where(row >= 0, 1 << (row.clamp(min=0) % 32), 0)  # 1 << 31 is the lowest int32, as it should be
        into.scatter_add_(2, (row.clamp(min=0) // 32).long(), bit.to(torch.int32))
    return made


def flex_side(case: Case, t: Tensors, routes: Tensor, compiled: bool) -> Work:
    """FlexAttention over the routed blocks, with the first kernel options that this GPU takes."""
    mask, q = block_mask(case, t, routes)
    run: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    choices: list[dict[str, Any] | None] = [None]
    if compiled:
        rows = [{"BLOCK_M": m} for m in (128, 64)] if case.phase != "decode" else [{}]
        choices = [{**row, "BLOCK_N": min(64, case.block_size)} for row in rows] + [None]
    problem: Exception | None = None
    for options in choices:

        def work(options: dict[str, Any] | None = options) -> Tensor:
            out = run(q, t.k, t.v, block_mask=mask, enable_gqa=q.shape[1] != t.k.shape[1], kernel_options=options)
            return out.reshape(t.q.shape)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work()
            return work
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (a compiler's: which types it raises is not documented)
            problem = error
    assert problem is not None
    raise problem
