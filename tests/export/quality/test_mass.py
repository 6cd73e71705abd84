"""The choice by true mass, against loops; nothing is better where mass is concerned; where all is kept it is dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.errors import CheckpointError
from bilevel.export.quality.session import block_mass, choose_by_mass, open_session
from bilevel.state import Step
from tests.doubles.bundle import VOCAB_SIZE
from tests.support.tiny_models import edit_config

Exported = Callable[..., tuple[Path, Path]]
BLOCK, LENGTH = 4, 60
IDS = np.random.default_rng(0).integers(2, VOCAB_SIZE, (1, LENGTH))


def step(past: int, new: int) -> Step:
    lengths = (torch.tensor([number], dtype=torch.int32) for number in (past, new))
    nothing = torch.zeros(1)
    return Step(*lengths, nothing, nothing, None, None, None)


def test_mass_against_loops() -> None:
    torch.manual_seed(1)
    q, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 16, 8)
    mass = block_mass(q, key, step(9, 3), 0.5, BLOCK, 2)
    assert mass.shape == (1, 2, 3, 4)
    for place in range(3):
        for group in range(2):
            expected = torch.zeros(4)
            for head in (2 * group, 2 * group + 1):
                weights = (key[0, group, : 10 + place] @ q[0, head, place] * 0.5).softmax(0)
                for token, weight in enumerate(weights):
                    expected[token // BLOCK] += weight / 2
            torch.testing.assert_close(mass[0, group, place], expected)


def test_the_choice_keeps_most() -> None:
    """The best free blocks by mass, with those that are always kept."""
    mass = torch.tensor([0.1, 0.05, 0.3, 0.2, 0.15, 0.2]).reshape(1, 1, 1, 6)
    attributes = {"block_size": BLOCK, "topk": 4, "init_blocks": 1, "local_blocks": 1, "num_selection_heads": 1}
    routes = choose_by_mass(mass, step(5 * BLOCK, 1), {**attributes, "causal": 1})
    assert routes.tolist() == [[[[0, 2, 3, 5]]]]


def run(caches: object, chunks: list[int]) -> np.ndarray:
    past, logits = 0, np.zeros(0)
    for count in chunks:
        lengths = (np.array([number], np.int32) for number in (past, count))
        logits = caches.run(IDS[:, past : past + count], *lengths)  # type: ignore[attr-defined]
        past += count
    return logits


def test_where_all_blocks_are_kept_it_is_dense(copied: Exported) -> None:
    checkpoint, folder = copied("moba")
    edit_config(checkpoint, routing={"topk": LENGTH // BLOCK})
    bundle = load_bundle(folder, verify=False)
    bundle.config["routing"]["topk"] = LENGTH // BLOCK  # type: ignore[index]
    logits = run(open_session(bundle, checkpoint).allocate(1, LENGTH), [16, 16, 16, 11, 1])
    edit_config(checkpoint, routing={"preset": "dense"})
    with torch.no_grad():
        expected = load_model(checkpoint)(torch.from_numpy(IDS))[:, -1].numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["moba", "two_level"])
def test_session(exported: Exported, preset: str) -> None:
    """Any cut into calls gives the same; routes are the layers' sets; the model's own choice holds less of the mass."""
    checkpoint, folder = exported(preset)
    bundle = load_bundle(folder, verify=False)
    session = open_session(bundle, checkpoint)
    caches = session.allocate(1, LENGTH)
    whole = run(caches, [16, 16, 16, 12])
    np.testing.assert_allclose(run(session.allocate(1, LENGTH), [7] * 8 + [4]), whole, rtol=1e-3, atol=1e-4)
    assert session.mass_recall() == {}, "only single tokens are looked at"
    caches = session.allocate(1, LENGTH)
    np.testing.assert_allclose(run(caches, [16, 16] + [1] * 28), whole, rtol=1e-3, atol=1e-4)
    assert caches.routes is not None
    blocks = caches.routes.blocks
    assert blocks.shape[:2] == (2, 1) and blocks.shape[-1] == bundle.config["routing"]["topk"]
    recalls = session.mass_recall()
    assert set(recalls) == {0, 1} and all(0 < recall < 1 for recall in recalls.values())


def test_another_checkpoint_is_refused(copied: Exported, exported: Exported, tmp_path: Path) -> None:
    bundle = load_bundle(exported("two_level")[1], verify=False)
    with pytest.raises(CheckpointError, match="is no folder; give the checkpoint"):
        open_session(bundle, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not the checkpoint of"):
        open_session(bundle, exported("dense")[0])
