"""The routers against transformers' own classes with the same weights: the same index sets, the same outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV32Config, MiniMaxM3VLTextConfig, Qwen4ExpTextConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextAttention

from bilevel import ops
from tests.support.router_layers import (
    HEAD_DIM,
    KV_HEADS,
    LATENT,
    QUERY_HEADS,
    ROTARY,
    WIDTH,
    Dsa,
    Msa,
    Qsa,
    empty_caches,
    lengths,
    randomise,
)

LENGTH = 83
SHAPE = {"hidden_size": WIDTH, "num_attention_heads": QUERY_HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": ROTARY / HEAD_DIM}


def angles(batch: int) -> tuple[Tensor, Tensor]:
    """cos and sin as transformers lays them out, [B, L, ROTARY]."""
    frequency = 1.0 / 1e4 ** (torch.arange(0, ROTARY, 2) / ROTARY)
    angle = (torch.arange(LENGTH)[:, None] * frequency).repeat(1, 2).expand(batch, -1, -1)
    return angle.cos(), angle.sin()


def blocks_of_mask(mask: Tensor, size: int) -> Tensor:
    """bool [..., tokens] -> bool [..., blocks]: blocks of which some token may be read."""
    return torch.nn.functional.pad(mask, (0, -mask.shape[-1] % size)).unflatten(-1, (-1, size)).any(-1)


def as_mask(routes: Tensor, count: int) -> Tensor:
    return (routes[..., None] == torch.arange(count)).any(-2)


def run(layer: Msa | Qsa | Dsa, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, scores, routes)."""
    with torch.no_grad(), ops.recorded() as calls:
        out, _ = layer(x, empty_caches(layer, len(x)), *lengths([0] * len(x), [LENGTH] * len(x)))
    call = next(call for call in calls if call.op.name == "SelectBlocks")
    return out, call.tensors[0], call.outputs[0]


def equal_rows(ours: Tensor, theirs: Tensor, scores: Tensor) -> Tensor:
    """bool [B, H, L]: rows of equal sets. In every other row the blocks that differ must tie exactly (torch.topk takes any)."""
    different = (ours ^ theirs).any(-1)
    for row, other, score in zip(ours[different], theirs[different], scores[different], strict=True):
        kept, dropped = score[: len(row)][row & ~other], score[: len(row)][other & ~row]
        assert len(kept) == len(dropped) and (torch.cat([kept, dropped]) == kept[0]).all()
    assert different.float().mean() < 0.2
    return ~different


def test_msa_is_minimax_m3s_attention() -> None:
    index = {"index_n_heads": 2, "index_head_dim": HEAD_DIM, "index_block_size": 8, "index_topk_blocks": 3}
    config = MiniMaxM3VLTextConfig(
        **SHAPE, **index, rotary_dim=ROTARY, rope_parameters=ROPE, num_hidden_layers=1, layer_types=["minimax_m3_sparse"]
    )
    config._attn_implementation = "eager"
    released, layer = MiniMaxM3VLAttention(config, 0), randomise(Msa())
    released.load_state_dict(layer.attention.state_dict())
    x = torch.randn(2, LENGTH, WIDTH)
    out, scores, routes = run(layer, x)
    with torch.no_grad():
        position = torch.arange(LENGTH).expand(2, -1)
        expected, _ = released(x, angles(2), None, position_ids=position)
        indices = released.indexer(x, angles(2), None, position)
    assert equal_rows(as_mask(routes, 11), as_mask(indices, 11), scores).all()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_qsa_is_qwen4_exps_attention() -> None:
    index = {"indexer_n_heads": 3, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM}
    index |= {"indexer_budget": 12, "indexer_compress_ratio": 4}
    config = Qwen4ExpTextConfig(**SHAPE, **index, rope_parameters=ROPE, num_hidden_layers=4)
    config._attn_implementation = "eager"
    released, layer = Qwen4ExpTextAttention(config, 3), randomise(Qsa())
    released.load_state_dict(layer.attention.state_dict())
    x = torch.randn(2, LENGTH, WIDTH)
    out, scores, routes = run(layer, x)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected, _ = released(x, angles(2), additive)
        chosen = released.indexer(x, angles(2), additive, None)
    rows = equal_rows(as_mask(routes, 21), blocks_of_mask(chosen, 4), scores)[:, 0]
    torch.testing.assert_close(out[rows], expected[rows], rtol=1e-5, atol=1e-5)


def test_dsa_is_deepseek_v32s_indexer() -> None:
    config = DeepseekV32Config(
        hidden_size=WIDTH, q_lora_rank=LATENT, index_n_heads=3, index_head_dim=HEAD_DIM, index_topk=7, qk_rope_head_dim=ROTARY
    )
    released, layer = DeepseekV32Indexer(config, 0), randomise(Dsa())
    released.load_state_dict(layer.indexer.state_dict())
    x = torch.randn(2, LENGTH, WIDTH)
    _, scores, routes = run(layer, x)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, -1, -1)
    with torch.no_grad():
        indices = released(x, layer.latent(x), angles(2), causal, torch.arange(LENGTH)[None])
    rows = equal_rows(as_mask(routes[:, 0], LENGTH), as_mask(indices, LENGTH) & causal, scores[:, 0])
    assert rows.float().mean() > 0.9
