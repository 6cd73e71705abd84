"""BiFormer's layer against its definition in loops over regions; its graph is examples/export_image_layer.py's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bilevel.errors import ContractError
from bilevel.routers.bra import BiLevelRoutingAttention
from tests.support.router_layers import randomise


def layer_of(**sizes: int) -> BiLevelRoutingAttention:
    layer = randomise(BiLevelRoutingAttention(12, **{"heads": 3, "regions": 3, "topk": 4, "convolution": 3, **sizes}))
    assert isinstance(layer, BiLevelRoutingAttention)
    return layer


def slow_layer(layer: BiLevelRoutingAttention, image: Tensor) -> Tensor:
    """One image [H, W, C]: regions as lists of pixels, one head and one pixel at a time."""
    height, width, channels = image.shape
    regions, size = layer.regions, channels // layer.heads
    padded = torch.zeros(-(-height // regions) * regions, -(-width // regions) * regions, channels)
    padded[:height, :width] = image
    rows, columns = padded.shape[0] // regions, padded.shape[1] // regions
    q, k, v = (padded @ layer.qkv.qkv.weight.T + layer.qkv.qkv.bias).split(channels, -1)
    pixels = [
        [(i * rows + y, j * columns + x) for y in range(rows) for x in range(columns)]
        for i in range(regions)
        for j in range(regions)
    ]

    def gather(tensor: Tensor, region: int) -> Tensor:
        return torch.stack([tensor[pixel] for pixel in pixels[region]])

    out = torch.zeros_like(padded)
    for region, own in enumerate(pixels):
        mean = gather(q, region).mean(0) * channels**-0.5
        scores = [(-float(mean @ gather(k, other).mean(0)), other) for other in range(regions**2)]
        kept = [other for _, other in sorted(scores)[: layer.topk]]
        keys, values = (torch.cat([gather(x, other) for other in kept]) for x in (k, v))
        for pixel in own:
            for h in range(layer.heads):
                part = slice(h * size, (h + 1) * size)
                weights = torch.softmax(keys[:, part] @ q[pixel][part] * channels**-0.5, 0)
                out[pixel][part] = weights @ values[:, part]
    local = torch.nn.functional.conv2d(
        v.permute(2, 0, 1)[None], layer.lepe.weight, layer.lepe.bias, padding=layer.lepe.padding, groups=channels
    )[0].permute(1, 2, 0)
    return ((out + local) @ layer.wo.weight.T + layer.wo.bias)[:height, :width]


@pytest.mark.parametrize("shape", [(6, 9), (7, 5), (3, 3)], ids=["whole-regions", "padded", "one-pixel-regions"])
@pytest.mark.parametrize("topk", [1, 4, 9])
def test_layer_equals_the_definition(shape: tuple[int, int], topk: int) -> None:
    layer, images = layer_of(topk=topk), torch.randn(2, *shape, 12)
    with torch.no_grad():
        out = layer(images)
        expected = torch.stack([slow_layer(layer, image) for image in images])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ContractError, match="topk=10 of 9 regions and 12 channels in 3 heads do not fit together"):
        layer_of(topk=10)
