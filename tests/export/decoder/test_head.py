"""The head beside the graph: what it makes of a call's tokens is what reading them one by one gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bilevel.runtime.backend.onnx import OnnxSession

Exported = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize(
    ("preset", "options"), [("two_level", {}), ("dense", {}), ("moba", {"precision": "fp16"})], ids=lambda value: str(value)
)
def test_logits_of_every_token_of_a_call(exported: Exported, preset: str, options: dict[str, str]) -> None:
    session = OnnxSession.open(exported(preset, **options)[1], threads=1)
    rng, length = np.random.default_rng(0), session.bundle.block_size + 3
    ids = rng.integers(0, session.bundle.vocab_size, (2, length))
    whole, single = (session.allocate(2, session.bundle.round_up(length)) for _ in range(2))
    last = whole.run(ids, np.zeros(2, np.int32), np.array([length, length - 2], np.int32)).copy()
    places = [(row, column) for row in range(2) for column in range(length)]
    scores = whole.score(*zip(*places, strict=True)).reshape(2, length, -1)
    tolerance = 1e-5 if session.bundle.precision == "float32" else 1e-2
    np.testing.assert_allclose(scores[[0, 1], [length - 1, length - 3]], last, atol=tolerance)
    for column in range(length):
        one = single.run(ids[:, column : column + 1], np.full(2, column, np.int32), np.ones(2, np.int32))
        rows = [row for row in range(2) if column < length - 2 * row]
        np.testing.assert_allclose(scores[rows, column], one[rows], atol=tolerance)
