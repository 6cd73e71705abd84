"""What attention must move and compute at least, and what a GPU could do in the time: for ``examples/gpu_bench.py``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Name as PyTorch gives it -> (memory bandwidth in bytes/s, dense 16-bit matrix products with fp32 sums in flop/s), from
# NVIDIA's data sheets; the first that is a word of a GPU's name counts.
PEAKS = {
    "B200": (8.0e12, 2.25e15),
    "GH200": (4.0e12, 9.89e14),
    "H200": (4.8e12, 9.89e14),
    "H100 PCIe": (2.0e12, 7.56e14),
    "H100 NVL": (3.9e12, 8.35e14),
    "H100": (3.35e12, 9.89e14),
    "A100-SXM4-40GB": (1.555e12, 3.12e14),
    "A100-PCIE-40GB": (1.555e12, 3.12e14),
    "A100": (2.0e12, 3.12e14),
    "L40S": (8.64e11, 3.62e14),
    "L40": (8.64e11, 1.81e14),
    "L4": (3.0e11, 1.21e14),
    "RTX 4090": (1.008e12, 1.65e14),
    "RTX 3090": (9.36e11, 7.1e13),
}


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations that a computation cannot do without."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Roofline:
    """bandwidth in bytes/s, flops in flop/s; source: where the two come from."""

    bandwidth: float
    flops: float
    source: str

    def seconds(self, work: Work) -> float:
        return max(work.bytes / self.bandwidth, work.flops / self.flops)


def find_roofline(name: str, measure: Callable[[Callable[[], object]], float], device: torch.device) -> Roofline:
    """A known GPU's, else measured. measure(work): seconds."""
    for known, (bandwidth, flops) in PEAKS.items():
        if re.search(rf"\b{known}\b", name):
            return Roofline(bandwidth, flops, f"data sheet of {known}")
    size = 2**28 if device.type == "cuda" else 2**22
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copied = 2 * size / measure(lambda: target.copy_(source))
    width = 8192 if device.type == "cuda" else 256
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return Roofline(copied, 2 * width**3 / measure(lambda: a @ b), "measured: a copy and a matrix product")


def routed_work(q: Tensor, k: Tensor, routes: Tensor, past_len: Tensor, block_size: int) -> Work:
    """Of RoutedAttention: every token that anybody kept is read once, q and routes too, the output is written.

    q [B, Hq, L, D]; k [B, Hkv, M, D]; routes int32 [B, Hkv, L, K]; every row is full and causal.
    """
    batch, heads, length, width = q.shape
    position = past_len.long()[:, None, None] + torch.arange(length, device=q.device)[None, :, None]
    kept = distinct = 0
    for b in range(batch):
        blocks = routes[b].long()
        tokens = (position[b] + 1 - blocks * block_size).clamp(0, block_size)
        kept += int(torch.where(blocks >= 0, tokens, 0).sum())
        read = torch.zeros(routes.shape[1], k.shape[2] // block_size + 1, dtype=torch.bool, device=q.device)
        read.scatter_(1, torch.where(blocks >= 0, blocks, read.shape[1] - 1).flatten(1), True)
        distinct += int(read[:, :-1].sum()) * block_size
    moved = (2 * distinct * width + 2 * q.numel()) * q.element_size() + routes.numel() * 4
    return Work(moved, 4 * width * kept * (heads // routes.shape[1]))


def dense_work(q: Tensor, k: Tensor, past: int) -> Work:
    """Of causal attention of L tokens that follow ``past`` others."""
    batch, heads, length, width = q.shape
    pairs = length * past + length * (length + 1) // 2
    moved = 2 * batch * k.shape[1] * (past + length) * width + 2 * q.numel()
    return Work(moved * q.element_size(), 4 * width * batch * heads * pairs)


def union_factor(routes: Tensor, num_blocks: int, tile: int) -> float:
    """Blocks that the positions of a tile keep together, over those that one keeps: 1 where all agree. Of the first row."""
    kept = routes[0, :, : routes.shape[2] // tile * tile]
    if kept.shape[1] == 0:
        return 1.0
    grouped = torch.where(kept >= 0, kept, num_blocks).long().reshape(kept.shape[0], -1, tile * kept.shape[2])
    read = torch.zeros(*grouped.shape[:2], num_blocks + 1, dtype=torch.bool, device=routes.device).scatter_(2, grouped, True)
    return float(read[..., :-1].sum() * tile / (kept >= 0).sum())
