"""The statistics of the end-to-end judgement: divergence, intervals, prompts; and that a device's own choices are its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel.checkpoint import Checkpoint, load_model
from bilevel.export.check.end_to_end import bootstrap, divergence, greedy_prompts
from bilevel.export.check.shipped import ShippedGraph
from bilevel.export.check.word_states import token_texts
from bilevel.state import DecoderState

Exported = Callable[..., tuple[Path, Path]]


def test_divergence_is_pytorch_s_kl() -> None:
    p, q = torch.randn(7, 11).double() * 3, torch.randn(7, 11).double() * 3
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert np.abs(divergence(p.numpy(), q.numpy()) - expected.numpy()).max() < 1e-12
    assert (divergence(p.numpy(), p.numpy() + 5) < 1e-12).all()


def test_bootstrap_covers_the_mean_and_widens_with_dependence() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(generator.standard_normal(640) + 5)
        hits += low <= 5 <= high
    assert 0.85 <= hits / 200 <= 0.99
    independent = generator.standard_normal(640)
    runs = np.repeat(generator.standard_normal(40), 16)
    widths = [high - low for low, high in (bootstrap(independent), bootstrap(runs))]
    assert widths[1] > 2 * widths[0]
    assert bootstrap(np.ones(5)) == (1.0, 1.0)


@pytest.mark.parametrize(("tokens", "longest"), [(40, 96), (4096, 4096), (4096, 300), (20, 24)])
def test_greedy_prompts_fit(tokens: int, longest: int) -> None:
    ids = np.arange(max(tokens, 64))
    prompts, count = greedy_prompts(ids, tokens, 8, longest)
    assert 1 <= len(prompts) <= 32 and count >= 1
    assert all(1 <= len(prompt) and len(prompt) + count <= longest for prompt in prompts)
    assert len(prompts) == 32 or len(prompts) * count >= tokens
    assert len(prompts) < 2 or len({len(prompt) for prompt in prompts}) > 1, "rows of different lengths"


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_device_continues_ragged_prompts_like_pytorch_alone(exported: Exported, preset: str) -> None:
    checkpoint, bundle = exported(preset)
    model = load_model(checkpoint)
    device = ShippedGraph(bundle / "model.onnx", Checkpoint(checkpoint).config)
    generator = np.random.default_rng(5)
    prompts = [generator.integers(0, 200, length) for length in (1, 9, 23)]
    generated = device.continue_greedily(prompts, 8, 6)
    for prompt, tokens in zip(prompts, generated, strict=True):
        state, ids, past, expected = DecoderState.empty(model.config, 1, 32), torch.from_numpy(prompt)[None], 0, []
        for _ in range(8):
            lengths = (torch.tensor([n], dtype=torch.int32) for n in (past, ids.shape[1]))
            with torch.no_grad():
                logits, state = model.step(ids, *lengths, state)
            past += ids.shape[1]
            expected.append(int(logits.argmax()))
            ids = torch.tensor([[expected[-1]]])
        assert tokens.tolist() == expected


def test_token_texts_wait_for_whole_characters() -> None:
    """Three tokens that are one character: the last one adds it."""
    pieces = {0: b"a", 1: "€".encode()[:1], 2: "€".encode()[1:2], 3: "€".encode()[2:], 4: b" b"}

    def decode(ids: np.ndarray) -> str:
        return b"".join(pieces[int(i)] for i in ids).decode("utf-8", "replace")

    assert token_texts(np.array([0, 1, 2, 3, 4, 0]), decode) == ["a", "", "", "€", " b", "a"]
