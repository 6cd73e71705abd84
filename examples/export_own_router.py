"""Export a router of your own: attention whose blocks are chosen by scores that plain PyTorch computes.

    python examples/export_own_router.py [FOLDER]

The router below is nobody's published one: a small network scores every earlier block from the word's query and the block's
mean and largest key, and blocks lose score with their distance. ``bilevel.ops.select_blocks`` turns the scores into routes by
the same rules as every other router here; nothing else is needed. This script exports the module once, runs it in prefill and
word by word, and checks both executions of the graph (portable bodies, CPU kernels) against PyTorch, choice by choice.
"""

import sys
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.export.check.module import ModuleVerdict, check_module
from bilevel.export.graph.module import save_onnx

BLOCK, KEPT, CAPACITY = 8, 4, 96  # tokens per block, blocks that each word reads, tokens that the caches hold


class OwnRouter(nn.Module):
    """Scores of every block for every word and key/value head; any operators may stand here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.block = nn.Linear(width, 16), nn.Linear(2 * width, 16)
        self.out = nn.Linear(16, 1)
        self.slope = nn.Parameter(torch.tensor(0.05))

    def forward(self, q: Tensor, k: Tensor, past_len: Tensor, new_len: Tensor) -> Tensor:
        """q: [B, H, L, D]. k: [B, Hkv, M, D], the cache. Returns routes int32 [B, Hkv, L, KEPT]."""
        groups = q.unflatten(1, (k.shape[1], -1)).mean(2)
        blocks = k.unflatten(2, (-1, BLOCK))
        summary = torch.cat([blocks.mean(3), blocks.amax(3)], dim=-1)
        joined = torch.tanh(self.query(groups)[:, :, :, None] + self.block(summary)[:, :, None])
        position = past_len[:, None, None] + torch.arange(q.shape[2])[:, None]
        distance = position - torch.arange(summary.shape[2]) * BLOCK
        scores = self.out(joined)[..., 0] - self.slope * distance[:, None]
        # The scores of unfinished blocks are garbage (their keys are not all there), which partial_block=2 never looks at: the
        # word's own block is read while it is open, and competes with the others once it is complete.
        return ops.select_blocks(
            scores,
            past_len,
            new_len,
            block_size=BLOCK,
            topk=KEPT,
            scored_topk=KEPT,
            init_blocks=1,
            local_blocks=0,
            partial_block=2,
            causal=1,
        )


class Attention(nn.Module):
    """Causal attention with caches over the blocks that the router keeps."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * kv_heads * self.head_dim)
        self.router = OwnRouter(self.head_dim)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, past_len: Tensor, new_len: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, L, width]. keys, values: [B, Hkv, CAPACITY, D]. past_len, new_len: int32 [B]. Returns (out, keys, values)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = ops.write_cache(keys, k, past_len), ops.write_cache(values, v, past_len)
        routes = self.router(q, keys, past_len, new_len)
        scale = float(self.head_dim) ** -0.5
        out = ops.routed_attention(q, keys, values, routes, past_len, new_len, block_size=BLOCK, causal=1, scale=scale)
        return self.out(out.transpose(1, 2).flatten(2)), keys, values


def inputs_of(layer: Attention, x: Tensor, keys: Tensor, values: Tensor, past: list[int]) -> dict[str, Tensor]:
    """The layer's inputs for ``x`` [B, L, width] behind ``past`` tokens that the caches hold."""
    past_len, new_len = torch.tensor(past, dtype=torch.int32), torch.full((len(past),), x.shape[1], dtype=torch.int32)
    return {"x": x, "keys": keys, "values": values, "past_len": past_len, "new_len": new_len}


def main(folder: Path) -> tuple[float, ModuleVerdict]:
    """Export, check, decode word by word; returns the largest difference of prefill and decode, and the verdict."""
    torch.manual_seed(0)
    layer = Attention().eval()
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "attention.onnx", torch.randn(2, 75, 32)
    empty = torch.zeros(2, layer.kv_heads, CAPACITY, layer.head_dim)
    save_onnx(
        layer,
        inputs_of(layer, text[:, :5], empty, empty, [3, 0]),
        path,
        output_names=["out", "present_keys", "present_values"],
        dynamic={
            "x": {0: "batch", 1: "tokens"},
            **{name: {0: "batch"} for name in ("keys", "values", "past_len", "new_len")},
        },
    )
    cached = [torch.randn(empty.shape) for _ in range(2)]
    verdict = check_module(layer, inputs_of(layer, text[:, :19], *cached, [70, 5]), path)
    whole = inputs_of(layer, text, empty, empty, [0, 0])
    session = ort.InferenceSession(str(path))
    (prefill, *_) = session.run(None, {name: value.numpy() for name, value in whole.items()})
    keys, values, worst = empty, empty, 0.0
    for t in range(text.shape[1]):
        step = inputs_of(layer, text[:, t : t + 1], torch.as_tensor(keys), torch.as_tensor(values), [t, t])
        out, keys, values = session.run(None, {name: value.numpy() for name, value in step.items()})
        worst = max(worst, float(abs(out[:, 0] - prefill[:, t]).max()))
    print(f"word by word and in one call: largest difference {worst:.1e}")
    print(f"against PyTorch ({', '.join(verdict.executions)}): {'equal' if verdict.passed else 'DIFFERENT'}")
    print("\n".join(f"  {line}" for line in verdict.lines()))
    return worst, verdict


if __name__ == "__main__":
    difference, judged = main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/own-router"))
    sys.exit(difference > 1e-5 or not judged.passed)
