"""The decoder: decode equals prefill for any cut, no route sees the future, and each preset is what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel.config import Experts, ModelConfig, Routing
from bilevel.errors import ContractError
from bilevel.model import CausalLM, last_valid
from bilevel.operators import reference
from bilevel.state import DecoderState, Trace

EXPERTS = Experts(num_experts=8, top_k=3, intermediate_size=12, layers=(1,), n_group=4, topk_group=2)
DEEPSEEK = Experts.deepseek_v3(layers=(0, 1), num_experts=12, n_group=4, topk_group=2, top_k=3, intermediate_size=12)
# id: routing, other changes of the config
MODELS: dict[str, tuple[Routing, dict[str, Any]]] = {
    "two_level-R4-window1": (Routing(block_size=4, coarse_topk=5, topk=3), {}),
    "two_level-R3-window5-Dr6-experts": (
        Routing(block_size=3, coarse_topk=4, topk=3, window=5, route_dim=6, init_blocks=0, local_blocks=2),
        {"experts": EXPERTS},
    ),
    "two_level-R1-Hkv4-deepseek": (
        Routing(block_size=1, coarse_topk=12, topk=6, window=2),
        {"num_key_value_heads": 4, "experts": DEEPSEEK},
    ),
    "moba-R4-Hkv1": (Routing(preset="moba", block_size=4, topk=2), {"num_key_value_heads": 1}),
    "moba_gqa-R5": (Routing(preset="moba_gqa", block_size=5, topk=3), {"model_type": "llama"}),
    "moba_gqa-R4-gate-dense0": (
        Routing(preset="moba_gqa", block_size=4, topk=3, key="gate", dense_layers=(0,)),
        {"rotary_dim": 6, "num_hidden_layers": 3, "nope_layers": (2,)},
    ),
    "two_level-R3-bounds-local2": (
        Routing(block_size=3, coarse_topk=5, topk=3, key="bounds", coarse_local_blocks=2, dense_layers=(1,)),
        {},
    ),
    "moba-R4-bounds": (Routing(preset="moba", block_size=4, topk=3, key="bounds"), {}),
    "dense-experts": (Routing(preset="dense", block_size=4), {"experts": EXPERTS, "tie_word_embeddings": True}),
}
ROUTED = [name for name in MODELS if not name.startswith("dense")]


def make_model(name: str, **changes: Any) -> CausalLM:
    """A model with weights large enough that every part of it matters."""
    routing, more = MODELS[name]
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "model_type": "qwen3",
        "routing": routing,
    }
    torch.manual_seed(1)
    model = CausalLM(ModelConfig(**{**values, **more, **changes})).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(7))


def run_in_calls(model: CausalLM, ids: Tensor, calls: list[list[int]], state: DecoderState) -> tuple[Tensor, list[Trace]]:
    """Feed row b ``calls[i][b]`` tokens in call i, right-padded with garbage; returns logits [B, L, V] and the traces.

    Only positions that end a row's share of a call have logits; the others are NaN.
    """
    batch = ids.shape[0]
    logits, traces = torch.full((*ids.shape, model.config.vocab_size), torch.nan), []
    past_len = torch.zeros(batch, dtype=torch.int32)
    for shares in calls:
        new = torch.full((batch, max(max(shares), 1)), 96)
        for b, share in enumerate(shares):
            new[b, :share] = ids[b, past_len[b] : past_len[b] + share]
        traces.append(Trace())
        out, state = model.step(new, past_len, torch.tensor(shares, dtype=torch.int32), state, traces[-1])
        for b, share in enumerate(shares):
            past_len[b] += share
            if share:
                logits[b, past_len[b] - 1] = out[b]
    assert past_len.tolist() == [ids.shape[1]] * batch
    return logits, traces


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A length, and for two rows an independent cut of it into calls; a row may wait while the other proceeds."""
    length = draw(st.sampled_from([1, 2, 5, 23]))
    left, calls = [length, length], []
    while any(left):
        shares = [draw(st.integers(0, min(n, draw(st.sampled_from([1, 2, 9]))))) for n in left]
        if not any(shares):
            shares = [min(n, 1) for n in left]
        left = [n - share for n, share in zip(left, shares, strict=True)]
        calls.append(shares)
    return length, calls


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(cut=cuts())
@torch.no_grad()
def test_step_equals_forward_for_any_cut(name: str, cut: tuple[int, list[list[int]]]) -> None:
    """Logits, candidates, routes and chosen experts are those of one call over the whole text."""
    length, calls = cut
    model, ids = make_model(name), random_ids(2, length)
    whole = Trace()
    expected = model(ids, whole)
    size = model.config.routing.block_size
    state = DecoderState.empty(model.config, 2, -(-(length + 9) // size) * size)
    logits, traces = run_in_calls(model, ids, calls, state)
    seen = ~logits[..., 0].isnan()
    torch.testing.assert_close(logits[seen], expected[seen], atol=1e-4, rtol=1e-4)

    past = [0, 0]
    for shares, trace in zip(calls, traces, strict=True):
        for b, share in enumerate(shares):
            now = slice(past[b], past[b] + share)
            for mine, theirs in zip(trace.routes, whole.routes, strict=True):
                assert torch.equal(mine[b, :, :share], theirs[b, :, now])
                assert (mine[b, :, share:] == -1).all()
            if whole.candidates is not None and trace.candidates is not None:
                assert torch.equal(trace.candidates[b, :, :share], whole.candidates[b, :, now])
            for mine, theirs in zip(trace.expert_ids, whole.expert_ids, strict=True):
                assert torch.equal(mine.unflatten(0, (2, -1))[b, :share], theirs.unflatten(0, (2, -1))[b, now])
            past[b] += share


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_step_does_not_read_beyond_the_text(name: str) -> None:
    """Whatever lies in the caches beyond a row's tokens changes nothing: a runtime may reuse them without clearing."""
    model, ids = make_model(name), random_ids(2, 23)
    state = DecoderState.empty(model.config, 2, 60)
    for layer in state.layers:
        for cache in (layer.key, layer.value, layer.block_key):
            if cache is not None:
                cache.fill_(torch.nan)
    if state.token_ids is not None and state.word_block_key is not None:
        state.token_ids.fill_(96)
        state.word_block_key.fill_(torch.nan)
    logits, _ = run_in_calls(model, ids, [[3, 0], [5, 7], [0, 1], [9, 6], [6, 9]], state)
    seen = ~logits[..., 0].isnan()
    torch.testing.assert_close(logits[seen], model(ids)[seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10)
@given(position=st.integers(1, 22))
@torch.no_grad()
def test_forward_does_not_see_the_future(name: str, position: int) -> None:
    """Another token at ``position`` moves no earlier candidate, route, expert or logit, bit for bit."""
    model, ids = make_model(name), random_ids(1, 23)
    changed = ids.clone()
    changed[:, position:] = (changed[:, position:] + 1 + torch.arange(23 - position)) % 96
    before, after = Trace(), Trace()
    logits, other = model(ids, before), model(changed, after)
    torch.testing.assert_close(other[:, :position], logits[:, :position], atol=1e-5, rtol=1e-5)
    assert not torch.equal(other[:, position], logits[:, position])
    for mine, theirs in zip(before.routes, after.routes, strict=True):
        assert torch.equal(mine[:, :, :position], theirs[:, :, :position])
    for mine, theirs in zip(before.expert_ids, after.expert_ids, strict=True):
        assert torch.equal(mine[:position], theirs[:position])
    if before.candidates is not None and after.candidates is not None:
        assert torch.equal(before.candidates[:, :, :position], after.candidates[:, :, :position])


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("length", [1, 2, 23])
@torch.no_grad()
def test_forward_keeping_every_block_equals_dense(name: str, length: int) -> None:
    routing = MODELS[name][0]
    wide = make_model(name, routing=Routing(**{**vars(routing), "coarse_topk": 30, "topk": 29}))
    dense = CausalLM(ModelConfig(**{**vars(wide.config), "routing": Routing(preset="dense")})).eval()
    routers = ("word_router", "block_keys")
    dense.load_state_dict({key: value for key, value in wide.state_dict().items() if not any(r in key for r in routers)})
    ids = random_ids(2, length)
    torch.testing.assert_close(wide(ids), dense(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("two_level")])
@torch.no_grad()
def test_word_router_definition(name: str) -> None:
    """Level 1 written out: unit word embeddings, their mean over a window and over a block, cosine, the best blocks."""
    model, ids = make_model(name), random_ids(1, 23)
    routing, trace = model.config.routing, Trace()
    model(ids, trace)
    words = model.model.embed_tokens(ids[0])
    if routing.route_dim:
        words = words @ model.model.word_router.proj.weight.T
    words = words / words.norm(dim=-1, keepdim=True)
    windows = [words[max(0, t + 1 - routing.window) : t + 1].mean(0) for t in range(23)]
    blocks = [words[j : j + routing.block_size].mean(0) for j in range(0, 23, routing.block_size)]
    query, key = (F.normalize(torch.stack(x), dim=-1)[None, None] for x in (windows, blocks))
    assert trace.word_query is not None and trace.word_block_key is not None and trace.candidates is not None
    complete = 23 // routing.block_size
    torch.testing.assert_close(trace.word_query, query)
    torch.testing.assert_close(trace.word_block_key[:, :, :complete], key[:, :, :complete])
    lengths = torch.tensor([0], dtype=torch.int32), torch.tensor([23], dtype=torch.int32)
    forced = {
        "init_blocks": routing.init_blocks,
        "local_blocks": routing.coarse_local_blocks or routing.local_blocks,
        "causal": 1,
    }
    expected = reference.coarse_route(
        query, key, *lengths, block_size=routing.block_size, topk=routing.coarse_topk, num_selection_heads=1, **forced
    )
    assert torch.equal(trace.candidates, expected)


@torch.no_grad()
def test_two_level_routes_lie_within_the_candidates() -> None:
    model, trace = make_model("two_level-R4-window1"), Trace()
    model(random_ids(2, 61), trace)
    assert trace.candidates is not None
    narrowed = 0
    for routes, query, block_key in zip(trace.routes, trace.query, trace.block_key, strict=True):
        kept = (routes[..., :, None] == trace.candidates[:, :, :, None, :]).any(-1)
        assert (kept | (routes == -1)).all()
        lengths = torch.zeros(2, dtype=torch.int32), torch.full((2,), 61, dtype=torch.int32)
        attributes = {"block_size": 4, "topk": 3, "num_selection_heads": 2, "init_blocks": 1, "local_blocks": 1, "causal": 1}
        assert torch.equal(routes, reference.fine_route(query, block_key, trace.candidates, *lengths, **attributes))
        narrowed += int((routes != reference.coarse_route(query, block_key, *lengths, **attributes)).sum())
    assert narrowed > 0  # level 1 does decide something here


def moba(q: Tensor, k: Tensor, v: Tensor, block_size: int, topk: int, shared: int) -> Tensor:
    """MoBA (arXiv 2502.13189, section 2.2) for whole texts: q, k, v [H, L, D]. ``shared`` heads choose together."""
    length = q.shape[1]
    own, block = torch.arange(length) // block_size, torch.arange(-(-length // block_size))
    means = torch.stack([part.mean(1) for part in k.split(block_size, dim=1)], dim=1)
    gate = (q @ means.mT).unflatten(0, (-1, shared)).sum(1).repeat_interleave(shared, dim=0)
    gate = gate.masked_fill(block >= own[:, None], -torch.inf)  # history only: the own block is always taken
    rank = gate.argsort(dim=-1, descending=True).argsort(dim=-1)
    taken = (rank < topk - 1) & (block < own[:, None]) | (block == own[:, None])
    mask = taken[..., own] & torch.ones(length, length, dtype=torch.bool).tril()
    score = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return score.softmax(-1) @ v


@pytest.mark.parametrize("length", [1, 3, 4, 29])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("preset, topk", [("moba", 1), ("moba", 3), ("moba_gqa", 3), ("moba", 99)])
@torch.no_grad()
def test_moba_presets_equal_the_paper(preset: str, topk: int, num_key_value_heads: int, length: int) -> None:
    routing = Routing(preset=preset, block_size=4, topk=topk, init_blocks=0)
    model, trace = make_model("moba-R4-Hkv1", routing=routing, num_key_value_heads=num_key_value_heads), Trace()
    ids, past_len = random_ids(2, length), torch.zeros(2, dtype=torch.int32)
    _, state = model.model(ids, past_len, torch.full_like(past_len, length), None, trace)
    group = 4 // num_key_value_heads
    for query, out, layer in zip(trace.query, trace.attention, state.layers, strict=True):
        for b in range(2):
            k, v = (x[b, :, :length].repeat_interleave(group, dim=0) for x in (layer.key, layer.value))
            expected = moba(query[b], k, v, 4, topk, shared=1 if preset == "moba" else group)
            torch.testing.assert_close(out[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_forward_gradients_reach_every_weight(name: str) -> None:
    """All but those of the choices themselves: a top-k passes no gradient to level 1, to a gate and to the centroids."""
    model = make_model(name).train()
    F.cross_entropy(model(random_ids(2, 23)).flatten(0, 1), random_ids(2, 23).flatten()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    choosers = ("word_router.", "group_centroid", ".block_keys.")
    assert [key for key in without if not any(part in key for part in choosers)] == []
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_expert_groups_depend_on_the_word_alone() -> None:
    """Level 1's group scores are those of the token id, wherever it stands: the cosine with each group's centroid."""
    model, trace = make_model("two_level-R3-window5-Dr6-experts"), Trace()
    ids = torch.tensor([[5, 6, 7, 5, 8, 5]])
    model(ids, trace)
    (scores,) = trace.group_logits
    assert torch.equal(scores[0], scores[3]) and torch.equal(scores[0], scores[5])
    word, centroid = model.model.embed_tokens.weight[5], model.model.layers[1].mlp.gate.group_centroid
    torch.testing.assert_close(scores[0], F.cosine_similarity(word[None], centroid), atol=1e-6, rtol=1e-5)
    kept_groups = scores.argsort(dim=1, descending=True)[:, :2]
    assert ((trace.expert_ids[0][:, :, None] // 2) == kept_groups[:, None]).any(-1).all()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_forward_in_bfloat16(name: str) -> None:
    model, ids = make_model(name), random_ids(2, 23)
    expected = model(ids)
    out = model.to(torch.bfloat16)(ids)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    if MODELS[name][0].is_dense:  # a rounded score may pick another block, and then everything differs
        assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_last_valid() -> None:
    hidden = torch.arange(12.0).reshape(3, 4, 1)
    assert last_valid(hidden, torch.tensor([4, 1, 0], dtype=torch.int32)).flatten().tolist() == [3, 4, 8]


def test_decoder_state_empty_refuses_part_of_a_block() -> None:
    model = make_model("two_level-R4-window1")
    with pytest.raises(ContractError, match="capacity=22 must be a multiple of routing.block_size=4"):
        DecoderState.empty(model.config, 1, 22)


@torch.no_grad()
def test_step_refuses_more_than_the_capacity() -> None:
    model = make_model("two_level-R4-window1")
    state, zero = DecoderState.empty(model.config, 1, 8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ContractError, match="9 tokens do not fit at 0 in a cache of 8"):
        model.step(random_ids(1, 9), zero, zero + 9, state)
