"""The stack of gates against the gate of a layer, and its training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bilevel.block_keys import GateKeys
from bilevel.export.route.distil import free_blocks, loss, measure, step
from bilevel.export.route.gates import GateStack
from bilevel.export.route.rows import Row
from bilevel.export.route.teacher import block_peaks, lesson, pick_rows
from bilevel.export.route.walk import make_choosers, read, shared_step
from bilevel.training import free_blocks as decoder_free_blocks
from tests.export.route.models import BLOCK_SIZE, CONFIG, make_model, routing

LENGTH = 20 * BLOCK_SIZE


def make_row(seed: int = 0) -> Row:
    rng = np.random.default_rng(seed)
    answers = np.arange(LENGTH - 40, LENGTH - 20)
    return Row(rng.integers(2, CONFIG.vocab_size, LENGTH), answers, answers - 200)


@pytest.mark.parametrize("norm", [True, False])
def test_scores_are_those_of_the_layer(norm: bool) -> None:
    config = dataclasses.replace(CONFIG, nope_layers=(2,), routing=routing("gate", gate_norm=norm, dense_layers=(1,)))
    stack = GateStack(config, (0, 2))
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model, row = make_model(dataclasses.replace(CONFIG, nope_layers=(2,))), make_row()
    taught = lesson(model, config, row, 30, np.random.default_rng(0))
    scores = stack(*(taught[name][[0, 2]].float() for name in ("query", "pooled")), taught["rows"])
    choosers = make_choosers(config, config.routing, {layer: stack.state(layer) for layer in (0, 2)})
    seen = {}
    prefix = read(model, torch.from_numpy(row.ids), {}, lambda i, plain_q, plain_k, q, k: seen.update({i: (plain_q, q)}))
    for place, layer in enumerate((0, 2)):
        keys = choosers[layer].keys
        assert isinstance(keys, GateKeys)
        pooled = choosers[layer].pool(prefix.keys[layer])
        with torch.no_grad():
            query = keys.query(*seen[layer], shared_step(config, torch.arange(LENGTH)[None]))
        expected = query[0, :, taught["rows"]] @ pooled[0].mT * config.head_dim**-0.5
        torch.testing.assert_close(scores[place], expected, rtol=1e-2, atol=2e-2)  # lessons are fp16


def test_free_blocks_are_the_decoder_s() -> None:
    config = dataclasses.replace(CONFIG, routing=routing("gate", init_blocks=2))
    model = make_model(config)
    expected = decoder_free_blocks(LENGTH, LENGTH // BLOCK_SIZE, model)
    # A block that ends with the word itself is its own one, which is local.
    assert torch.equal(free_blocks(torch.arange(LENGTH), LENGTH // BLOCK_SIZE, config), expected)


def test_peaks_are_the_greatest_weights() -> None:
    config = dataclasses.replace(CONFIG, routing=routing("gate"))
    q, k = torch.randn(1, 4, 48, 8), torch.randn(1, 2, 48, 8)
    rows = torch.tensor([5, 40])
    peaks = block_peaks(q, k, rows, config)
    for place, row in enumerate(rows.tolist()):
        for head in range(4):
            weights = (q[0, head, row] @ k[0, head // 2, : row + 1].T * config.attention_scale).softmax(-1)
            for block in range(3):
                part = weights[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
                greatest = float(part.max()) if len(part) else 0.0
                assert float(peaks[head // 2, place, block]) >= greatest - 1e-6
    assert float(peaks[:, 0, 1:].max()) == 0  # the future has no weight


def test_rows_that_teach() -> None:
    """Answers first, words without a choice never, and each answer with the place it stands at."""
    config = dataclasses.replace(CONFIG, routing=routing("gate"))
    rows, sources = pick_rows(make_row(), config, 60, np.random.default_rng(1))
    assert len(rows) == 60 and (np.diff(rows) > 0).all() and rows[0] >= 7 * BLOCK_SIZE
    assert (sources >= 0).sum() == 20
    assert all(source == row - 200 for row, source in zip(rows, sources, strict=True) if source >= 0)


def test_loss_is_least_at_the_target() -> None:
    """The softmax of the scores that equals the peaks' shares costs least; a kept block costs nothing."""
    peak = torch.tensor([[[[0.9, 0.05, 0.2, 0.1]]]])
    free = torch.tensor([[False, True, True, True]])
    best = (peak[..., 1:] / peak[..., 1:].sum()).log()
    scores = torch.cat([torch.tensor([[[[50.0]]]]), best], -1)
    least = loss(scores, peak, free, power=1.0)
    for channel in range(1, 4):
        other = scores.clone()
        other[..., channel] += 0.5
        assert loss(other, peak, free, power=1.0) > least
    other = scores.clone()
    other[..., 0] -= 100
    assert loss(other, peak, free, power=1.0) == least


def test_training_improves_the_choice() -> None:
    config = dataclasses.replace(CONFIG, routing=routing("gate"))
    taught = [lesson(make_model(), config, make_row(seed), 60, np.random.default_rng(seed)) for seed in range(2)]
    gates = GateStack(config, range(3))
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-2)
    before = measure(gates, taught)
    for _ in range(60):
        value = step(gates, taught[0], power=1.0) + step(gates, taught[1], power=1.0)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = measure(gates, taught)
    assert after.recall > before.recall + 0.05
    assert after.needle_heads.shape == (3, 2) and 0 <= float(after.needle_heads.min()) <= float(after.needle_heads.max()) <= 1


def test_perfect_scores_measure_one() -> None:
    """Recall and needle of the teacher's own peaks as scores, the needle where no word has more blocks worth choosing."""
    config = dataclasses.replace(CONFIG, routing=routing("gate", topk=17))
    taught = lesson(make_model(), config, make_row(), 40, np.random.default_rng(0))
    oracle = GateStack(config, range(3))
    oracle.forward = lambda query, pooled, rows: taught["peak"].float()  # type: ignore[method-assign]
    found = measure(oracle, [taught])
    assert found.recall == pytest.approx(1, abs=1e-3) and found.needle > 0.95
