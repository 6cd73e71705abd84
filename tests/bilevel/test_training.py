"""Losses, schedule and evaluation of ``bilevel.training``, each against a loop written from its definition."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.config import Experts, ModelConfig, Routing
from bilevel.errors import ConfigError
from bilevel.expert_layers import ExpertMLP
from bilevel.model import CausalLM
from bilevel.operators.routing import block_mask
from bilevel.state import Trace
from bilevel.training import (
    LossWeights,
    candidate_recall,
    expert_load,
    expert_loads,
    free_blocks,
    group_distillation,
    heldout_loss,
    initialise,
    learning_rate,
    level1_distillation,
    load_balance,
    make_optimizer,
    train_step,
    training_loss,
)
from tests.support.tiny_models import make_model

VOCAB = 40


def spelled(form: str, *rows: tuple[int, ...]) -> list[Any]:
    """Parameters whose ids spell their values."""
    return [pytest.param(*row, id=form.format(*row)) for row in rows]


def tiny(preset: str = "two_level", *, heads: int = 4, kv_heads: int = 2, experts: bool = True, **routing: int) -> CausalLM:
    """A model with every part: two layers, the second one of experts."""
    torch.manual_seed(1)
    values = {"block_size": 4, "coarse_topk": 4, "topk": 3, "init_blocks": 1, "local_blocks": 1, "window": 3, "route_dim": 6}
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        tie_word_embeddings=True,
        routing=Routing(preset=preset, **{**values, **routing}),
        experts=Experts(num_experts=4, n_group=2, topk_group=1, top_k=2, intermediate_size=8, layers=(1,)) if experts else None,
    )
    return CausalLM(config)


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def traced(model: CausalLM, ids: Tensor) -> Trace:
    trace = Trace()
    model(ids, trace)
    return trace


def learners(model: CausalLM, loss: Tensor) -> set[str]:
    """Names of the parameters that the loss would move."""
    model.zero_grad()
    loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


def free_by_hand(model: CausalLM, position: int, num_blocks: int) -> list[int]:
    routing = model.config.routing
    kept = set(range(routing.init_blocks)) | {position // routing.block_size - i for i in range(routing.local_blocks)}
    return [j for j in range(num_blocks) if (j + 1) * routing.block_size - 1 <= position and j not in kept]


@pytest.mark.parametrize("init_blocks,local_blocks", spelled("init{}-local{}", (1, 1), (0, 1), (0, 3), (2, 1)))
@pytest.mark.parametrize("length", [1, 3, 4, 21])
def test_free_blocks(length: int, init_blocks: int, local_blocks: int) -> None:
    model = tiny(init_blocks=init_blocks, local_blocks=local_blocks)
    num_blocks = -(-length // 4)
    free = free_blocks(length, num_blocks, model)
    assert [row.nonzero().flatten().tolist() for row in free] == [free_by_hand(model, t, num_blocks) for t in range(length)]


def level1_by_hand(model: CausalLM, ids: Tensor) -> float:
    """The distillation loss, position by position, in fp64."""
    config, trace = model.config, traced(model, ids)
    num_blocks, losses = trace.block_key[0].shape[2], []
    group = config.num_attention_heads // config.num_key_value_heads
    for row, position in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        free = free_by_hand(model, position, num_blocks)
        if len(free) < 2:
            continue
        votes = []
        for query, key in zip(trace.query, trace.block_key, strict=True):
            for head in range(config.num_key_value_heads):
                q = query[row, head * group : (head + 1) * group, position].double().sum(0)
                scores = torch.stack([q @ key[row, head, j].double() for j in free])
                votes.append(((scores - scores.mean()) / scores.std(correction=0) / 0.5).softmax(0))
        target = torch.stack(votes).mean(0)
        assert trace.word_query is not None and trace.word_block_key is not None
        word = trace.word_query[row, 0, position].double()
        student = (torch.stack([word @ trace.word_block_key[row, 0, j].double() for j in free]) / 0.1).softmax(0)
        losses.append((target * (target / student).log()).sum().item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "rows,length,heads,kv_heads", spelled("B{}-L{}-Hq{}-Hkv{}", (1, 16, 2, 2), (2, 30, 4, 2), (3, 23, 4, 1))
)
def test_level1_distillation(rows: int, length: int, heads: int, kv_heads: int) -> None:
    model, ids = tiny(heads=heads, kv_heads=kv_heads), text(rows, length)
    assert level1_distillation(model, ids, traced(model, ids)).item() == pytest.approx(level1_by_hand(model, ids), abs=1e-5)


def test_level1_distillation_moves_only_the_projection() -> None:
    model, ids = tiny(), text(2, 30)
    assert learners(model, level1_distillation(model, ids, traced(model, ids))) == {"model.word_router.proj.weight"}


@pytest.mark.parametrize("length", [1, 3, 12], ids="L{}".format)
def test_level1_distillation_of_a_text_without_a_choice_is_zero(length: int) -> None:
    model, ids = tiny(), text(2, length)
    assert level1_distillation(model, ids, traced(model, ids)).item() == 0


def test_level1_distillation_teaches_the_projection() -> None:
    """The teacher compares the same words behind another projection; the student's candidates come to hold its choices."""
    model, teacher, ids = tiny(heads=1, kv_heads=1), tiny(heads=1, kv_heads=1), text(8, 64)
    torch.nn.init.normal_(teacher.model.word_router.proj.weight, generator=torch.Generator().manual_seed(7))
    seen = traced(teacher, ids)
    assert seen.word_query is not None and seen.word_block_key is not None
    lesson = Trace(query=[seen.word_query], block_key=[seen.word_block_key])
    optimizer, losses = torch.optim.Adam(model.model.word_router.parameters(), lr=0.02), []
    agreed = [(traced(model, ids).candidates == seen.candidates).double().mean().item()]
    for _ in range(80):
        losses.append(level1_distillation(model, ids, lesson))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    agreed.append((traced(model, ids).candidates == seen.candidates).double().mean().item())
    assert losses[-1] < 0.5 * losses[0]
    assert agreed[1] > agreed[0] + 0.1


def test_group_distillation() -> None:
    model, ids = tiny(), text(2, 9)
    trace = traced(model, ids)
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp, ExpertMLP)
    words = model.model.embed_tokens.weight.detach()[ids.flatten()].double()
    centroids = mlp.gate.group_centroid.detach().double()
    losses = []
    for token in range(len(words)):
        mass = trace.expert_logits[0][token].double().softmax(0).reshape(2, 2).sum(1)
        cosine = torch.stack([torch.cosine_similarity(words[token], centroid, dim=0) for centroid in centroids])
        losses.append((mass * (mass / (cosine / 0.1).softmax(0)).log()).sum().item())
    loss = group_distillation(model, ids, trace)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert learners(model, loss) == {"model.layers.1.mlp.gate.group_centroid"}


def test_load_balance_is_one_when_balanced_and_grows_to_the_number_of_experts() -> None:
    ids = torch.arange(12, dtype=torch.int32).reshape(6, 2) % 4
    assert load_balance(torch.zeros(6, 4), ids).item() == pytest.approx(1)
    logits = torch.tensor([[50.0, 0, 0, 0]]).expand(6, 4)
    assert load_balance(logits, torch.zeros(6, 1, dtype=torch.int32)).item() == pytest.approx(4)


def test_load_balance_pushes_the_crowded_expert_down() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    load_balance(logits, torch.tensor([[0], [0], [0], [1]], dtype=torch.int32)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 2] < 0).all()


def test_expert_load_leaves_out_absent_choices() -> None:
    assert expert_load(torch.tensor([[0, 2], [-1, 2]], dtype=torch.int32), 4).tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0])
    assert expert_load(torch.full((2, 2), -1, dtype=torch.int32), 3).tolist() == [0, 0, 0]


def test_expert_loads_do_not_depend_on_the_batch_size() -> None:
    model, ids = tiny(), text(5, 11)
    loads = expert_loads(model, ids, batch_size=2)
    assert list(loads) == [1] and sum(loads[1]) == pytest.approx(1)
    assert loads == expert_loads(model, ids, batch_size=5)
    with pytest.raises(ConfigError, match="no expert layers"):
        expert_loads(tiny(experts=False), ids)


@pytest.mark.parametrize(
    "preset,experts,expected",
    [
        ("two_level", True, {"cross_entropy", "level1", "group", "balance"}),
        ("two_level", False, {"cross_entropy", "level1"}),
        ("moba", False, {"cross_entropy"}),
        ("dense", True, {"cross_entropy", "group", "balance"}),
    ],
)
def test_training_loss_has_the_parts_that_the_model_calls_for(preset: str, experts: bool, expected: set[str]) -> None:
    model, ids = tiny(preset, experts=experts), text(2, 22)
    total, parts = training_loss(model, ids[:, :-1], ids[:, 1:], LossWeights(level1=2, group=3, balance=5))
    factors = {"cross_entropy": 1, "level1": 2, "group": 3, "balance": 5}
    assert set(parts) == expected
    assert total.item() == pytest.approx(sum(factors[name] * part.item() for name, part in parts.items()), rel=1e-5)


def test_training_loss_reaches_every_parameter() -> None:
    model, ids = tiny(), text(4, 41)
    total, _ = training_loss(model, ids[:, :-1], ids[:, 1:], LossWeights())
    assert learners(model, total) == {name for name, _ in model.named_parameters()}


def test_learning_rate() -> None:
    rates = [learning_rate(step, 300, peak=2.0, warmup=50, floor=0.1) for step in range(300)]
    assert rates[0] == pytest.approx(2 / 50) and rates[49] == pytest.approx(2) and rates[-1] == pytest.approx(0.2)
    assert rates[:50] == sorted(rates[:50]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert learning_rate(174, 300, peak=2.0, warmup=50, floor=0.1) == pytest.approx(1.1, abs=0.02)  # half-way
    assert learning_rate(0, 1, peak=1.0) > 0


@pytest.mark.parametrize("step", [-1, 300])
def test_learning_rate_outside_the_schedule(step: int) -> None:
    with pytest.raises(ConfigError, match=f"step={step} is outside the schedule of 300 steps"):
        learning_rate(step, 300, peak=1.0)


def test_make_optimizer_spares_norms_and_centroids_from_decay() -> None:
    model = tiny()
    decays = {id(p): group["weight_decay"] for group in make_optimizer(model, peak=1e-3).param_groups for p in group["params"]}
    spared = {name for name, parameter in model.named_parameters() if decays[id(parameter)] == 0}
    assert spared == {name for name, _ in model.named_parameters() if "norm" in name or "centroid" in name}


def test_initialise_makes_every_layer_the_identity() -> None:
    model, ids = tiny(), text(2, 13)
    initialise(model)
    embedded = model.model.embed_tokens(ids)
    hidden = torch.nn.functional.rms_norm(embedded, (16,), eps=model.config.rms_norm_eps)
    assert torch.allclose(model(ids), model.lm_head(hidden), atol=1e-6)


def run_steps(count: int) -> tuple[CausalLM, list[float]]:
    model, ids = tiny(), text(4, 41)
    initialise(model)
    optimizer, losses = make_optimizer(model, peak=1e-2), []
    for _ in range(count):
        losses.append(train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=1e-2, weights=LossWeights())["cross_entropy"])
    return model, losses


def test_train_step_learns_and_repeats_itself_exactly() -> None:
    model, losses = run_steps(30)
    again, _ = run_steps(30)
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.1) and losses[-1] < 0.6 * losses[0]
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("rows,length,batch_size", spelled("n{}-L{}-batch{}", (1, 1, 4), (5, 9, 2), (4, 17, 4)))
def test_heldout_loss(rows: int, length: int, batch_size: int) -> None:
    model, windows = tiny(), text(rows, length + 1)
    with torch.no_grad():
        chances = torch.cat([model(row[None, :-1])[0].double().log_softmax(-1) for row in windows])
    expected = -chances.gather(1, windows[:, 1:].reshape(-1, 1)).mean().item()
    assert heldout_loss(model, windows, batch_size=batch_size) == (pytest.approx(expected, abs=1e-5), rows * length)


def recall_by_hand(model: CausalLM, ids: Tensor, layer: int) -> list[float]:
    """all, free, contested and chance of one layer from sets of block numbers."""
    config, trace = model.config, traced(model, ids)
    unrestricted = dataclasses.replace(config, routing=dataclasses.replace(config.routing, coarse_topk=64))
    assert trace.candidates is not None
    num_blocks, group = trace.block_key[0].shape[2], config.num_attention_heads // config.num_key_value_heads
    sums = torch.zeros(4, 2, dtype=torch.float64)
    for row, head, t in itertools.product(range(ids.shape[0]), range(config.num_key_value_heads), range(ids.shape[1])):
        free = free_by_hand(model, t, num_blocks)
        q = trace.query[layer][row, head * group : (head + 1) * group, t].sum(0)
        scores = {j: (q @ trace.block_key[layer][row, head, j]).item() for j in free}
        forced = {t // config.routing.block_size} | ({0} if config.routing.init_blocks else set())
        best = set(sorted(free, key=lambda j: -scores[j])[: unrestricted.routing.topk - len(forced)])
        offered = set(trace.candidates[row, 0, t].tolist())
        sums[0] += torch.tensor([len((best | forced) & offered), len(best | forced)])
        sums[1] += torch.tensor([len(best & offered), len(best)])
        if set(free) - offered:
            sums[2] += torch.tensor([len(best & offered), len(best)])
            odds = len(set(free) & offered) / len(free)
            sums[3] += torch.tensor([len(best) * odds, len(best)], dtype=torch.float64)
    return (sums[:, 0] / sums[:, 1]).tolist()


@pytest.mark.parametrize("rows,length,heads,kv_heads", spelled("B{}-L{}-Hq{}-Hkv{}", (3, 40, 2, 2), (2, 39, 4, 2)))
def test_candidate_recall(rows: int, length: int, heads: int, kv_heads: int) -> None:
    model, ids = tiny(heads=heads, kv_heads=kv_heads), text(rows, length)
    for layer, recall in enumerate(candidate_recall(model, ids, batch_size=2)):
        assert dataclasses.astuple(recall) == pytest.approx(recall_by_hand(model, ids, layer), abs=1e-9)
        assert recall.contested < recall.free < recall.all < 1


def test_candidate_recall_is_whole_when_every_block_is_a_candidate() -> None:
    for layer in candidate_recall(tiny(coarse_topk=12), text(2, 40)):
        assert layer.all == layer.free == 1
        assert math.isnan(layer.contested) and math.isnan(layer.chance)


def test_candidate_recall_needs_level_1() -> None:
    with pytest.raises(ConfigError, match="'moba_gqa' has no level 1"):
        candidate_recall(tiny("moba_gqa"), text(1, 8))


def test_distillation_does_not_see_the_future() -> None:
    """A token after the last complete block changes neither candidates nor recall before it."""
    model, ids = tiny(), text(1, 32)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCAB
    first, second = traced(model, ids), traced(model, changed)
    assert first.candidates is not None and second.candidates is not None
    assert torch.equal(block_mask(first.candidates, 8)[:, :, :31], block_mask(second.candidates, 8)[:, :, :31])


@pytest.mark.parametrize("preset", ["two_level", "gate", "dense"])
def test_layers_that_are_computed_again_give_the_same_losses_and_gradients(preset: str) -> None:
    """Activation checkpointing changes no bit, and what a layer leaves in the trace it leaves once."""
    model = make_model(preset)
    tokens = torch.randint(0, model.config.vocab_size, (2, 22), generator=torch.Generator().manual_seed(3))
    results = []
    for again in (False, True):
        model.model.recomputes_layers = again
        total, _ = training_loss(model, tokens[:, :-1], tokens[:, 1:], LossWeights())
        model.zero_grad()
        total.backward()
        results.append([total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_that_are_computed_again_obey_a_forced_trace() -> None:
    model = make_model("two_level")
    tokens = torch.randint(0, model.config.vocab_size, (1, 21), generator=torch.Generator().manual_seed(3))
    free = Trace()
    model(tokens, free)
    forced = Trace(candidates=free.candidates, routes=[torch.where(routes == 0, -1, routes) for routes in free.routes])
    gradients = []
    for again in (False, True):
        model.model.recomputes_layers = again
        trace = Trace(forced=forced)
        model.zero_grad()
        model(tokens, trace).square().sum().backward()
        assert len(trace.routes) == len(free.routes)
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*gradients)
