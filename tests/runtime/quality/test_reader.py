"""Reading and scoring on a tiny routed bundle, against PyTorch; sink + window against routes that are forced there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.errors import RequestError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.backend.session import RouteArrays, SessionLimits
from bilevel.runtime.quality.reader import Reader, look_at_routes, surprise
from bilevel.runtime.quality.window import WindowReader, window_problem
from bilevel.state import Trace
from tests.doubles.bundle import VOCAB_SIZE
from tests.runtime.quality.conftest import BLOCK, COARSE, TOPK

LENGTH = 300
IDS = np.random.default_rng(0).integers(2, VOCAB_SIZE, LENGTH).tolist()


def window_routes(width: int, sinks: int, heads: int, kept: int) -> torch.Tensor:
    """Sink + window of ``kept`` blocks for every token, int32 [1, heads, L, width], as the issue says it."""
    routes = torch.full((1, heads, LENGTH, width), -1, dtype=torch.int32)
    for place in range(LENGTH):
        own = place // BLOCK
        blocks = sorted({*range(min(sinks, own + 1)), *range(max(own - (kept - sinks) + 1, 0), own + 1)})
        routes[0, :, place, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return routes


def losses(logits: torch.Tensor, first: int) -> list[float]:
    """Nats of the tokens from ``first`` on."""
    scores = torch.log_softmax(logits[0].double(), -1)
    return [-float(scores[place - 1, IDS[place]]) for place in range(first, LENGTH)]


def test_scores_are_those_of_pytorch(long_bundle: tuple[Path, Path]) -> None:
    checkpoint, folder = long_bundle
    with torch.no_grad():
        logits = load_model(checkpoint)(torch.tensor([IDS]))
    reader = Reader(OnnxSession(load_bundle(folder), 1), LENGTH)
    reader.read(IDS[:200])
    scores = reader.score(IDS[200:230], IDS[230:], (40, 44))
    assert [score.nats for score in scores] == pytest.approx(losses(logits, 230), rel=1e-3)
    assert [score.best for score in scores] == [
        int(logits[0, place - 1].argmax()) == IDS[place] for place in range(230, LENGTH)
    ]
    # Another question behind the same context, then the first one again: what lay behind the context leaves no trace.
    reader.rewind(200)
    reader.score(IDS[50:120], IDS[120:125])
    reader.rewind(200)
    again = reader.score(IDS[200:230], IDS[230:], (40, 44))
    assert [score.nats for score in again] == pytest.approx([score.nats for score in scores], rel=1e-4)
    assert [score.reading for score in again] == [score.reading for score in scores]
    for score in scores:
        assert score.reading is not None and score.reading.free
        assert (TOPK - 1) * BLOCK < score.reading.tokens <= TOPK * BLOCK
        assert set(score.reading.layers) == {0, 1}


def test_sink_and_window(long_bundle: tuple[Path, Path]) -> None:
    """NaN keys give what PyTorch gives where sink and window are forced as routes, and another thing than routing."""
    checkpoint, folder = long_bundle
    model, sinks = load_model(checkpoint), 1
    heads = int(model.config.route_attributes(2)["num_selection_heads"])
    forced = Trace(candidates=window_routes(COARSE, sinks, 1, TOPK), routes=[window_routes(TOPK, sinks, heads, TOPK)] * 2)
    with torch.no_grad():
        expected = losses(model(torch.tensor([IDS]), Trace(forced=forced)), 230)
        free = losses(model(torch.tensor([IDS])), 230)
    reader = WindowReader(OnnxSession(load_bundle(folder), 1), LENGTH)
    reader.read(IDS[:200])
    reader.score(IDS[50:120], IDS[120:125])
    reader.rewind(200)
    scores = reader.score(IDS[200:230], IDS[230:], (40, 44))
    assert [score.nats for score in scores] == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(free, rel=1e-2)
    for score in scores:
        assert score.reading is not None and score.reading.candidates == 0
        assert set(score.reading.layers.values()) == {0.0}, "the evidence lies outside of the window"


def test_window_reads_again_from_the_start(long_bundle: tuple[Path, Path]) -> None:
    reader = WindowReader(OnnxSession(load_bundle(long_bundle[1]), 1), LENGTH)
    first = reader.read(IDS).copy()
    reader.rewind(0)
    reader.read(IDS[::-1])
    reader.rewind(0)
    np.testing.assert_allclose(reader.read(IDS), first, rtol=1e-4, atol=1e-5)


def test_where_there_is_no_window(long_bundle: tuple[Path, Path]) -> None:
    bundle = load_bundle(long_bundle[1], verify=False)
    assert window_problem(bundle) == ""
    assert "no routes" in window_problem(bundle.dense_twin())
    bundle.config["routing"]["topk"] = 1  # type: ignore[index]
    assert "no room" in window_problem(bundle)


def test_a_backend_that_holds_less(long_bundle: tuple[Path, Path]) -> None:
    class Small(OnnxSession):
        @property
        def limits(self) -> SessionLimits:
            return SessionLimits(16, capacity=64, builder="the engine", remedy="build another")

    session = Small(load_bundle(long_bundle[1], verify=False), 1)
    with pytest.raises(RequestError, match="texts of 65 tokens are longer than the engine holds; build another"):
        Reader(session, 65)
    reader = Reader(session, 60)
    assert reader.caches.capacity == 64
    whole = reader.read(IDS[:50]).copy()
    reader.rewind(0)
    for token in IDS[:50]:
        last = reader.read([token])
    np.testing.assert_allclose(last, whole, rtol=1e-4, atol=1e-5)


def test_surprise() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32)) + 700
    assert surprise(logits, 0) == (pytest.approx(np.log(2), rel=1e-4), True)
    assert surprise(logits, 2) == (pytest.approx(np.log(4), rel=1e-4), False)
    assert surprise(np.array([1, 1], np.float32), 0)[1] and not surprise(np.array([1, 1], np.float32), 1)[1]
    assert surprise(np.array([np.nan, 1], np.float32), 1) == (float("inf"), False)


def test_what_routes_held(long_bundle: tuple[Path, Path]) -> None:
    """By hand: 50 tokens, the own block 12 has 2 of them; two heads in each of two layers."""
    bundle = load_bundle(long_bundle[1], verify=False)
    blocks = np.full((2, 1, 2, 3, TOPK), -1, np.int32)
    blocks[0, 0, 0, 1] = [0, 4, 5]
    blocks[0, 0, 1, 1] = [0, 4, 12]
    blocks[1, 0, :, 1, :2] = [0, 12]
    candidates = np.full((1, 1, 3, COARSE), -1, np.int32)
    candidates[0, 0, 1, :3] = [0, 5, 12]
    routes = RouteArrays(candidates, blocks, {})
    reading = look_at_routes(bundle, routes, 1, 50, (4 * BLOCK + 3, 5 * BLOCK + 1))
    assert reading.free and reading.candidates == 0.5
    assert reading.layers == {0: 0.75, 1: 0.0} and reading.any_head == {0: 1.0, 1: 0.0}
    assert reading.tokens == pytest.approx((12 + 10 + 6 + 6) / 4)
    for evidence, why in (((0, 0), "none known"), ((1, 3), "the first block is kept"), ((48, 50), "so is the own one")):
        assert not look_at_routes(bundle, routes, 1, 50, evidence).free, why
    assert not look_at_routes(bundle, routes, 1, TOPK * BLOCK, (5, 7)).free, "all is read"
