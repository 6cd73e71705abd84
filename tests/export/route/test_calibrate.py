"""Budgets, the ranking of layers, and what is judged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bilevel.config import Routing
from bilevel.errors import ConfigError
from bilevel.export.route.calibrate import Questioner, budget, calibrate, rank_layers, share_read
from bilevel.export.route.facts import answer_nats, evaluate, pack
from bilevel.export.route.needles import needles
from bilevel.export.route.rows import Case, evaluation_case
from bilevel.export.route.walk import ask, make_choosers, read
from bilevel.export.route.words import WordLevel, fit_words, with_words
from tests.doubles.bundle import make_tokenizer
from tests.export.route.models import BLOCK_SIZE, CONFIG, make_model, routing
from tests.export.route.test_rows import DOCUMENTS

CONTEXT = 60 * BLOCK_SIZE


def make_cases() -> list[Case]:
    return [evaluation_case(DOCUMENTS, make_tokenizer(), CONTEXT, 0, index, facts=4, passages=2) for index in range(2)]


@pytest.mark.parametrize("dense", [0, 1, 3])
@pytest.mark.parametrize("share", [0.13, 0.22, 0.5])
def test_budget_keeps_the_share(dense: int, share: float) -> None:
    """The most blocks that fit, and not one more."""
    topk = budget(share, 30, dense, 4096, 64)
    chosen = routing("mean", topk=max(topk, 3), block_size=64, dense_layers=tuple(range(dense)))
    if topk >= 3:
        assert share_read(chosen, 30, 4096) <= share + 1e-9
    assert share_read(routing("mean", topk=max(topk, 3) + 1, block_size=64, dense_layers=tuple(range(dense))), 30, 4096) > share


def test_whole_context_in_budget_is_dense() -> None:
    assert share_read(routing("mean", topk=64, block_size=64), 30, 4096) == 1


def test_ranking_is_by_nats() -> None:
    """The first layer is the one that alone, dense, leaves least nats."""
    model, cases = make_model(), make_cases()
    questioner, choosers = Questioner(model, cases), make_choosers(CONFIG, routing("mean"))
    nats = {
        layer: questioner.score({other: chooser for other, chooser in choosers.items() if other != layer}).nats
        for layer in choosers
    }
    ranked = rank_layers(questioner, choosers, 2)
    assert ranked[0] == min(nats, key=lambda layer: nats[layer]) and len(set(ranked)) == 2


def test_calibration_keeps_share_and_takes_the_best() -> None:
    model, stages = make_model(), list[str]()
    candidates = [routing("bounds"), routing("mean"), routing("mean", block_size=8, local_blocks=3)]
    found = calibrate(model, make_cases(), candidates, share=0.4, max_dense=2, on_stage=stages.append)
    assert found.share <= 0.4
    assert found.routing == min(found.tried, key=lambda each: each.score.nats).routing
    assert {each.routing.key for each in found.tried} == {"bounds", "mean"}
    assert any("trying layer 2" in stage for stage in stages)


def test_dense_layers_are_chosen_with_level_1_in_front() -> None:
    """Level 1 restricts routed layers and no dense ones, so that how many of them pay is another question behind it."""
    model, cases = make_model(), make_cases()
    table = model.model.embed_tokens.weight
    texts = [case.context.tolist() for case in cases]

    def words(chosen: Routing) -> tuple[Routing, WordLevel]:
        config = dataclasses.replace(CONFIG, routing=with_words(chosen, CONFIG, 0.5, CONTEXT))
        return config.routing, WordLevel.of(config, fit_words(table, texts, config), table)

    found = calibrate(model, cases, [routing("mean")], share=0.5, max_dense=2, words=words)
    behind = [each for each in found.tried if each.routing.is_two_level]
    assert sorted(len(each.routing.dense_layers) for each in behind) == [0, 1]
    best = min(behind, key=lambda each: each.score.nats)
    assert found.whole == best.routing and found.whole == words(found.routing)[0]
    whole, level = words(found.routing)
    assert Questioner(model, cases).score(make_choosers(CONFIG, whole, None, level)) == best.score
    assert best.score != next(each.score for each in found.tried if each.routing == found.routing)
    assert found.whole.coarse_topk == 30 and share_read(found.whole, 3, CONTEXT) == found.share <= 0.5


def test_named_layers_are_kept() -> None:
    found = calibrate(make_model(), make_cases(), [routing("mean")], share=0.6, max_dense=2, dense_layers=(1,))
    assert found.routing.dense_layers == (1,) and len(found.tried) == 1


@pytest.mark.parametrize(
    "share, layers, message",
    [
        (0.01, None, r"--share 0\.01 of 960 tokens is less than 4 blocks of 16"),
        (0.4, (0, 1), r"blocks of 16 in every layer beside 2 dense ones"),
    ],
)
def test_refusals(share: float, layers: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(make_model(), make_cases(), [routing("mean")], share=share, max_dense=1, dense_layers=layers)


def test_found_is_what_greedy_decoding_writes() -> None:
    """A model's own greedy text as the answer is found; another answer is not."""
    model, case = make_model(), make_cases()[0]
    question = case.questions[0]
    ids = question.ids[: -question.num_answer].tolist()
    for _ in range(question.num_answer):
        logits = model(torch.tensor([[*case.context.tolist(), *ids]]))
        ids.append(int(logits[0, -1].argmax()))
    for answer, expected in ((ids, True), ([*ids[:-1], (ids[-1] + 1) % CONFIG.vocab_size], False)):
        asked = Case(case.context, (type(question)(torch.tensor(answer).numpy(), question.num_answer, question.sources),))
        packed = pack(asked)
        prefix = read(model, torch.from_numpy(case.context), {})
        ((is_fact, nats, found),) = answer_nats(model, ask(model, prefix, packed, {}), asked, packed)
        assert is_fact and found == expected and nats > 0
        score = evaluate(model, [asked], {})
        assert (score.found, score.asked) == (int(expected), 1) and score.fact_nats == pytest.approx(nats, rel=1e-4)


def test_needles() -> None:
    """All blocks keep all of the mass, few blocks less, and a dense layer everything."""
    model, cases = make_model(), make_cases()
    whole = needles(model, cases, make_choosers(CONFIG, routing("mean", topk=CONTEXT // BLOCK_SIZE + 4)))
    few = needles(model, cases, make_choosers(CONFIG, routing("mean", dense_layers=(1,))))
    assert whole.total == pytest.approx(1) and few.total < 0.9
    assert torch.allclose(whole.mass, few.mass) and torch.allclose(few.kept[1], torch.ones(4))
    layer, head = few.strongest(1)[0]
    assert float(few.mass[layer, head]) == float(few.mass.max())


def test_needle_mass_is_attention() -> None:
    """Of one question's last word, from the layer's own queries and keys."""
    model, case = make_model(), make_cases()[0]
    question = case.questions[0]
    one = type(question)(question.ids[: len(question.ids) - question.num_answer + 1], 1, question.sources[:1])
    found = needles(model, [Case(case.context, (one,))], make_choosers(CONFIG, routing("mean")))
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    ids = torch.cat([torch.from_numpy(case.context), torch.from_numpy(one.ids[:-1])])
    read(model, ids, {}, lambda index, plain_q, plain_k, q, k: seen.update({index: (q, k)}))
    block = int(one.sources[0]) // BLOCK_SIZE
    for layer, (q, k) in seen.items():
        for head in range(4):
            weights = (q[0, head, -1] @ k[0, head // 2].T * CONFIG.attention_scale).softmax(-1)
            expected = float(weights[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].sum())
            assert float(found.mass[layer, head]) == pytest.approx(expected, abs=1e-5)
