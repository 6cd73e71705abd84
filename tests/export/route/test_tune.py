"""Low-rank updates: the same model before the first one, the plain definition of the loss, and a routed model that learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel.export.route import texts
from bilevel.export.route.rows import Row
from bilevel.export.route.source import Source
from bilevel.export.route.tune import RANK, _Run, apply, divergence, factors, hidden, pick, student
from bilevel.families.shared.pieces import Piece
from tests.export.route.models import CONFIG, make_model, routing, save_checkpoint, write_text


@pytest.fixture
def source(tmp_path: Path) -> Source:
    training, heldout = texts.split(texts.read_documents((write_text(tmp_path / "text"),)))
    tokenizer = texts.read_tokenizer(save_checkpoint(tmp_path / "base"))
    return Source(make_model(), {"sha256": ""}, training, heldout, tokenizer)


def test_nothing_changes_before_the_first_update(source: Source) -> None:
    """The stream is the routed model's own, and reading every block gives the dense model's: no divergence."""
    ids = torch.randint(2, CONFIG.vocab_size, (200,), generator=torch.Generator().manual_seed(1))
    routed = student(source.model, routing("bounds"), {}, {})
    with torch.no_grad():
        expected = routed.lm_head(hidden(routed, ids))
        torch.testing.assert_close(routed(ids[None]), expected)
        every = student(source.model, routing("mean", topk=64), {}, {})
        assert every.lm_head.weight.data_ptr() == source.model.lm_head.weight.data_ptr(), "the weights are shared"
        torch.testing.assert_close(source.model(ids[None]), every.lm_head(hidden(every, ids)), atol=1e-4, rtol=1e-4)
    run = _Run(source, every, 0)
    assert run.loss(0).item() == pytest.approx(0, abs=1e-5)


def test_divergence_by_its_definition() -> None:
    torch.manual_seed(0)
    head, taught, said = torch.nn.Linear(6, 11, bias=False), torch.randn(301, 6), torch.randn(301, 6, requires_grad=True)
    weight = torch.rand(301)
    p, q = head(taught).softmax(-1).detach(), head(said).softmax(-1).detach()
    expected = sum(float(weight[i]) * float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(301))
    value = divergence(head, taught, said, weight)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert said.grad is not None and bool((said.grad.abs().sum(-1) > 0).all())


def test_answers_count_as_much_as_the_rest() -> None:
    row = Row(np.arange(900), np.array([40, 41, 700, 41]), np.array([1, 2, 3, 2]))
    positions, weight = pick(row, np.random.default_rng(0))
    assert positions.unique().numel() == len(positions) == 3 + 512
    is_answer = torch.isin(positions, torch.tensor(row.answers))
    assert float(weight[is_answer].sum()) == pytest.approx(0.5) and float(weight.sum()) == pytest.approx(1)
    none = np.array([], dtype=int)
    assert float(pick(Row(np.arange(30), none, none), np.random.default_rng(0))[1].sum()) == pytest.approx(1)


def test_a_routed_model_learns_to_say_what_the_dense_one_says(source: Source) -> None:
    """Steps on one row bring its divergence down; the dense model's own weights stay; applying the factors gives the same."""
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    routed = student(source.model, routing("mean", topk=3), {}, {})
    learned = [each for each in routed.parameters() if each.requires_grad]
    assert len(learned) == 3 * 2 * 2 and all(min(each.shape) <= RANK for each in learned)
    run, optimizer, values = _Run(source, routed, 0), torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.0), []
    run.length = 256
    for _ in range(8):
        loss = run.loss(0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in source.model.state_dict().items())
    ids = torch.arange(2, 130)
    with torch.no_grad():
        expected = hidden(routed, ids)
        apply(source.model, factors(routed))
        again = hidden(student(source.model, routing("mean", topk=3), {}, {}), ids)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [None, (0, 8), (8, 16)])
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
@pytest.mark.parametrize("order", [None, (0, 2, 1, 3), (2, 3, 0, 1), (1, 2, 3, 0)])
def test_what_is_added_to_a_stored_tensor(rows: tuple[int, int] | None, factor: float, order: tuple[int, ...] | None) -> None:
    """However a family stores it, the model's tensor changes by what was to be added, and no other rows change."""
    torch.manual_seed(0)
    stored = torch.randint(-9, 9, (8 if rows is None else 24, 5)).float()
    piece, change = Piece("q", tuple(stored.shape), rows=rows, factor=factor, order=order), torch.randn(8, 5)

    def filled(tensor: Tensor) -> Tensor:
        return piece.fill(tensor, torch.empty(8, 5))

    before, others = filled(stored), stored.clone()
    piece.add(stored, change)
    torch.testing.assert_close(filled(stored), before + change)
    if rows is not None:
        outside = torch.ones(24, dtype=torch.bool)
        outside[slice(*rows)] = False
        assert torch.equal(stored[outside], others[outside])
