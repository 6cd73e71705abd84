"""PyTorch one part at a time gives what the whole model gives, in every precision; texts are cut into the calls asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel.checkpoint import Checkpoint, load_model
from bilevel.export.check.layered import DTYPES, LayeredModel, Text
from bilevel.export.check.rounding import round_weights
from bilevel.state import DecoderState

Exported = Callable[..., tuple[Path, Path]]
LENGTHS = np.array([30, 17])


def make_text(sizes: list[int], longest: int | None = None) -> Text:
    ids = np.random.default_rng(1).integers(0, 200, (2, 30))
    return Text.cut(ids, LENGTHS, sizes, 4, longest)


@pytest.mark.parametrize(
    ("sizes", "longest", "expected"), [([5, 1], 16, [5, 1, 16, 8]), ([40], None, [30]), ([], 8, [8] * 3 + [6])]
)
def test_text_is_cut_into_calls(sizes: list[int], longest: int | None, expected: list[int]) -> None:
    text = make_text(sizes, longest)
    assert text.sizes == expected and text.capacity == 32
    assert sum(int(call.new[0]) for call in text.calls) == 30 and sum(int(call.new[1]) for call in text.calls) == 17
    read = np.concatenate([call.ids[0, : call.new[0]] for call in text.calls])
    assert (read == text.ids[0]).all()


def test_finished_row_idles_where_nobody_reads() -> None:
    text = make_text([17, 4, 4])
    assert [int(call.past[1]) for call in text.calls] == [0, 0, 0, 0]
    assert all(int(call.past.max()) + call.ids.shape[1] <= text.capacity for call in text.calls)


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_parts_give_what_the_whole_gives(exported: Exported, preset: str) -> None:
    checkpoint, text = exported(preset)[0], make_text([5, 1, 1, 9])
    model, layered = load_model(checkpoint), LayeredModel(Checkpoint(checkpoint))
    state, expected = DecoderState.empty(model.config, 2, text.capacity), []
    with torch.no_grad():
        for call in text.calls:
            logits, state = model.step(*call.tensors, state)
            expected.append(logits)
        passages = layered.words(text)
        for index in range(model.config.num_hidden_layers):
            passages = layered.layer(index, passages, text)
        actual = layered.last_logits(passages)
    for call, ours, theirs in zip(text.calls, actual, expected, strict=True):
        rows = torch.from_numpy(call.new > 0)
        assert torch.equal(ours[rows], theirs[rows])
    assert not [name for name, tensor in layered.model.named_parameters() if tensor.device.type != "meta"], (
        "nothing stays loaded"
    )


@pytest.mark.parametrize("precision", DTYPES)
def test_exact_is_fp64_with_the_precision_s_weights(exported: Exported, precision: str) -> None:
    checkpoint, text = Checkpoint(exported("two_level")[0]), make_text([5, 9])
    exact = LayeredModel(checkpoint, precision, exact=True)
    with torch.no_grad():
        hidden = exact.hidden(text)[-1]
    model = load_model(exported("two_level")[0]).to(DTYPES[precision]).double()
    with torch.no_grad():
        whole, _ = model.model(
            torch.from_numpy(text.ids), torch.zeros(2, dtype=torch.int32), torch.from_numpy(LENGTHS.astype(np.int32)), None
        )
        actual = exact.head(hidden[0, -1:])
    assert hidden.dtype == torch.float64
    assert (actual - model.lm_head(whole[0, -1:])).abs().max() < 1e-9


def test_choices_of_another_model_are_obeyed(exported: Exported) -> None:
    checkpoint, text = Checkpoint(exported("two_level")[0]), make_text([5, 9])
    ours, theirs = LayeredModel(checkpoint, "bfloat16"), LayeredModel(checkpoint, "bfloat16", exact=True)
    with torch.no_grad():
        plain = ours.words(text)
        exact = theirs.words(text, [passage.trace for passage in plain])
        after = ours.layer(0, plain, text)
        for passage in after:
            passage.trace.routes = [
                routes.flip(1) for routes in passage.trace.routes
            ]  # none that the layer would choose itself
        precise = theirs.layer(0, exact, text, obeyed=[passage.trace for passage in after])
    for one, two in zip(after, precise, strict=True):
        assert torch.equal(one.step.candidates, two.step.candidates)
        assert torch.equal(one.trace.routes[0], two.trace.routes[0])


def test_small_weights_are_rounded_part_by_part(exported: Exported) -> None:
    checkpoint, text = exported("moba")[0], make_text([])
    model = load_model(checkpoint)
    round_weights(model, "int4", model.config)
    layered = LayeredModel(Checkpoint(checkpoint), weights="int4")
    with torch.no_grad():
        expected = model(torch.from_numpy(text.ids[:1]))[0]
        actual = layered.head(layered.hidden(text)[0][0])
    assert (actual - expected).abs().max() < 1e-5
