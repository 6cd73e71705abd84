"""Level 1 without training: whitened words weighed by their rarity, and the walk with candidates against the model itself."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from bilevel.checkpoint import Checkpoint, load_model
from bilevel.export.route.adapter import Adapter, describe_base, load_adapter, save_adapter
from bilevel.export.route.merge import merged
from bilevel.export.route.walk import Packed, ask, make_choosers, read
from bilevel.export.route.words import WordLevel, fit_words, inverse_document_frequency, whitening, with_words
from bilevel.state import Trace
from tests.export.route.models import CONFIG, make_model, routing, save_checkpoint

CHOSEN = dataclasses.replace(with_words(routing("mean", dense_layers=(1,)), CONFIG, 0.5, 256), window=3)


def fitted() -> dict[str, torch.Tensor]:
    texts = [torch.randint(CONFIG.vocab_size, (400,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    table = make_model().model.embed_tokens.weight.detach()
    return fit_words(table, texts, dataclasses.replace(CONFIG, routing=CHOSEN))


def test_inverse_document_frequency() -> None:
    """Counted by blocks: a word twice in a block counts once; a word that is in every block weighs nothing."""
    found = inverse_document_frequency([[0, 1, 1, 0, 2, 0], [0, 3]], 5, 2)
    assert found.tolist() == pytest.approx([0.0, math.log(4 / 2), math.log(4), math.log(4), math.log(4 / 0.5)])


def test_whitening_makes_words_alike_in_no_direction() -> None:
    table = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12)
    white = table @ whitening(table, 12).mT
    torch.testing.assert_close(white.mT @ white / 300, torch.eye(12), atol=1e-3, rtol=1e-3)
    assert whitening(table, 5).shape == (5, 12)


def test_rare_words_decide() -> None:
    """A block that shares a rare word with the question is proposed before blocks that share frequent ones."""
    torch.manual_seed(0)
    size, config = CHOSEN.block_size, dataclasses.replace(CONFIG, routing=dataclasses.replace(CHOSEN, coarse_topk=5))
    frequent = torch.randint(10, (12 * size,))
    text = frequent.clone()
    text[4 * size + 3] = 40  # said once, far above
    text[-1] = 40
    table = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size)
    words = fit_words(table, [[*frequent.tolist(), 40]], config)
    candidates, _ = WordLevel.of(config, words, table).read(text)
    assert 4 in candidates[0, 0, -1].tolist()
    without, _ = WordLevel.of(config, {**words, "word_weight": torch.ones(CONFIG.vocab_size)}, table).read(frequent)
    assert 4 not in without[0, 0, -1].tolist()


@torch.no_grad()
def test_walk_with_words_is_the_model() -> None:
    """Contexts and questions behind them are read as the two-level model reads them whole."""
    config, words, dense = dataclasses.replace(CONFIG, routing=CHOSEN), fitted(), make_model()
    model = make_model(config)
    model.load_state_dict({**dense.state_dict(), **{f"model.word_router.{name}": x for name, x in words.items()}})
    level = WordLevel.of(config, words, dense.model.embed_tokens.weight)
    choosers = make_choosers(dense.config, CHOSEN, None, level)
    ids = torch.randint(CONFIG.vocab_size, (16 * CHOSEN.block_size,), generator=torch.Generator().manual_seed(5))
    questions = [ids[3:12], ids[40:44]]
    prefix = read(dense, ids, choosers)
    trace = Trace()
    expected = model.model(ids[None], *(torch.tensor([n], dtype=torch.int32) for n in (0, len(ids))), None, trace)[0]
    assert trace.candidates is not None and int((trace.candidates[0, 0, -1] >= 0).sum()) == CHOSEN.coarse_topk
    torch.testing.assert_close(prefix.hidden, expected, atol=1e-4, rtol=1e-4)
    stream = ask(dense, prefix, packed := Packed.of(questions, len(ids)), choosers)
    for question, (first, end) in zip(questions, packed.bounds, strict=True):
        whole = torch.cat([ids, question])[None]
        hidden = model.model(whole, *(torch.tensor([n], dtype=torch.int32) for n in (0, whole.shape[1])), None)[0]
        torch.testing.assert_close(stream[0, first:end], hidden[0, len(ids) :], atol=1e-4, rtol=1e-4)


def test_adapter_keeps_the_words(tmp_path: Path) -> None:
    base, words = save_checkpoint(tmp_path / "base"), {name: x.half().float() for name, x in fitted().items()}
    save_adapter(Adapter(CHOSEN, describe_base(Checkpoint(base)), {}, {}, words), tmp_path / "adapter")
    read_back = load_adapter(tmp_path / "adapter")
    assert read_back.routing == CHOSEN and read_back.words.keys() == words.keys()
    with merged(tmp_path / "adapter", base) as joined:
        state = load_model(joined).state_dict()
    for name, tensor in words.items():
        assert torch.equal(state[f"model.word_router.{name}"], tensor)
