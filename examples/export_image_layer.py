"""Two-level routing on images: a BiFormer block whose regions choose the regions that their pixels read, exported and checked.

    python examples/export_image_layer.py [FOLDER]

The block is that of the released BiFormer models (a depthwise convolution for positions, bi-level routing attention, an MLP),
with random weights; checkpoints' names fit. Nothing in it is causal, and no block is forced: ``bilevel.ops.select_blocks``
picks the best regions by their scores alone.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from bilevel.export.check.module import ModuleVerdict, check_module
from bilevel.export.graph.module import save_onnx
from bilevel.routers.bra import BiLevelRoutingAttention

HEIGHT, WIDTH, CHANNELS = 20, 23, 24  # pixels are padded to whole regions


class Block(nn.Module):
    """One block on maps [B, CHANNELS, height, width]."""

    def __init__(self, channels: int = CHANNELS, regions: int = 4, topk: int = 3) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1, self.norm2 = (nn.LayerNorm(channels, eps=1e-6) for _ in range(2))
        self.attn = BiLevelRoutingAttention(channels, heads=3, regions=regions, topk=topk)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 3 * channels), nn.Identity(), nn.GELU(), nn.Linear(3 * channels, channels), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


def main(folder: Path) -> list[ModuleVerdict]:
    """Export with a free batch; check on noise, and on an image without features, whose regions tie."""
    torch.manual_seed(0)
    block, path = Block().eval(), folder / "block.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    image = torch.randn(2, CHANNELS, HEIGHT, WIDTH)
    save_onnx(block, {"x": image}, path, output_names=["out"], dynamic={"x": {0: "batch"}})
    verdicts = []
    for name, images in (("noise", torch.randn(3, *image.shape[1:])), ("nothing", torch.zeros(1, *image.shape[1:]))):
        verdicts.append(check_module(block, {"x": images}, path))
        print(f"{name}: {'equal' if verdicts[-1].passed else 'DIFFERENT'} in {', '.join(verdicts[-1].executions)}")
        print("\n".join(f"  {line}" for line in verdicts[-1].lines()))
    return verdicts


if __name__ == "__main__":
    judged = main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/image-layer"))
    sys.exit(not all(verdict.passed for verdict in judged))
