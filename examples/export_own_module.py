"""Export a module of your own: a two-level attention block inside an encoder that knows nothing of this project's decoder.

    python examples/export_own_module.py [FOLDER]

Calling ``bilevel.ops`` is all that a module needs to do. The result is one ONNX file in which each operator is a node of domain
``bilevel`` with a portable body; this script runs it in ONNX Runtime and compares it with PyTorch.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from bilevel import ops
from bilevel.export.graph.module import save_onnx

BLOCK, COARSE, KEPT = 8, 6, 3  # tokens per block, level 1's candidates, blocks that each token reads


class TwoLevelAttention(nn.Module):
    """Every token reads the ``KEPT`` blocks that level 2 picks among the ``COARSE`` that level 1 proposes. Not causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, words: Tensor, length: Tensor) -> Tensor:
        """x, words: [B, L, width]; words are the embeddings that level 1 compares. length: int32 [B], valid tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        start = torch.zeros_like(length)
        common = {"block_size": BLOCK, "init_blocks": 1, "local_blocks": 1, "causal": 0}
        words = nn.functional.normalize(words, dim=-1)[:, None]
        candidates = ops.coarse_route(
            words, self.block_means(words), start, length, topk=COARSE, num_selection_heads=1, **common
        )
        routes = ops.fine_route(
            q, self.block_means(k), candidates, start, length, topk=KEPT, num_selection_heads=self.heads, **common
        )
        k, v = ops.pad_to_blocks(k, BLOCK), ops.pad_to_blocks(v, BLOCK)
        out = ops.routed_attention(q, k, v, routes, start, length, block_size=BLOCK, causal=0, scale=float(q.shape[-1]) ** -0.5)
        return self.out(out.transpose(1, 2).flatten(2))

    @staticmethod
    def block_means(tokens: Tensor) -> Tensor:
        """[B, H, L, D] -> [B, H, blocks, D]."""
        return ops.pad_to_blocks(tokens, BLOCK).unflatten(2, (-1, BLOCK)).mean(3)


class SentenceEncoder(nn.Module):
    """Somebody's own encoder: token ids to one vector per text."""

    def __init__(self, vocabulary: int = 100, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = nn.ModuleList(TwoLevelAttention(width, heads=4) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, token_ids: Tensor, length: Tensor) -> Tensor:
        """token_ids: int64 [B, L], right-padded. length: int32 [B]. Returns [B, width]."""
        words = x = self.embed(token_ids)
        for attention, norm in zip(self.attention, self.norms, strict=False):
            x = x + attention(norm(x), words, length)
        valid = torch.arange(token_ids.shape[1]) < length[:, None]
        return (x * valid[..., None]).sum(1) / length[:, None]


def main(folder: Path) -> float:
    """Export, run in ONNX Runtime on other sizes than the example's, return the largest difference from PyTorch."""
    torch.manual_seed(0)
    encoder = SentenceEncoder().eval()
    folder.mkdir(parents=True, exist_ok=True)
    example = {"token_ids": torch.zeros(2, 37, dtype=torch.int64), "length": torch.tensor([37, 20], dtype=torch.int32)}
    model = save_onnx(
        encoder,
        example,
        folder / "encoder.onnx",
        output_names=["vector"],
        dynamic={"token_ids": {0: "batch", 1: "tokens"}, "length": {0: "batch"}},
    )
    print("routed nodes:", [node.op_type for node in model.graph.node if node.domain == "bilevel"])
    session = ort.InferenceSession(str(folder / "encoder.onnx"))
    worst = 0.0
    for lengths in ([1], [7, 8, 9], [200, 64, 130, 3]):
        token_ids = torch.randint(0, 100, (len(lengths), max(lengths)))
        length = torch.tensor(lengths, dtype=torch.int32)
        (got,) = session.run(None, {"token_ids": token_ids.numpy(), "length": length.numpy()})
        with torch.no_grad():
            worst = max(worst, float(np.abs(got - encoder(token_ids, length).numpy()).max()))
        print(f"texts of {lengths} tokens: largest difference so far {worst:.1e}")
    return worst


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/own-module")) > 1e-5)
