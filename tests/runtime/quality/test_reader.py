"""Reading and scoring on a tiny routed bundle, against PyTorch; sink + window against routes that are forced there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.errors import RequestError
from bilevel.plugins.library.cpu import VARIABLE
from bilevel.runtime.backend.onnx import OnnxCaches, OnnxSession
from bilevel.runtime.backend.session import RouteArrays, SessionLimits
from bilevel.runtime.quality.reader import Reader, look_at_routes, surprise
from bilevel.runtime.quality.window import WindowReader, window_problem
from bilevel.state import Trace
from tests.doubles.bundle import VOCAB_SIZE
from tests.runtime.quality.conftest import BLOCK, COARSE, TOPK

Exported = Callable[..., tuple[Path, Path]]
LENGTH = 300
IDS = np.random.default_rng(0).integers(2, VOCAB_SIZE, LENGTH).tolist()


def window_routes(width: int, heads: int, kept: int, length: int) -> torch.Tensor:
    """One sink and a window, ``kept`` blocks in all, for every token: int32 [1, heads, L, width]."""
    routes = torch.full((1, heads, length, width), -1, dtype=torch.int32)
    for place in range(length):
        own = place // BLOCK
        blocks = sorted({0, *range(max(own - (kept - 1) + 1, 0), own + 1)})
        routes[0, :, place, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return routes


def losses(logits: torch.Tensor, first: int) -> list[float]:
    """Nats of the tokens from ``first`` on."""
    scores = torch.log_softmax(logits[0].double(), -1)
    return [-float(scores[place - 1, IDS[place]]) for place in range(first, len(scores))]


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


SHORT = 92  # as many tokens as the tiny models of all tests hold


@pytest.mark.parametrize(
    "preset, runs",
    [*itertools.product(("two_level", "moba", "gate", "bounds"), ("library", "bodies")), ("two_level", "fp16")],
)
def test_sink_and_window(exported: Exported, preset: str, runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN keys give what PyTorch gives where sink and window are forced as routes, and another thing than routing: in the CPU
    library, in the portable bodies, in 16 bits, for every kind of key and beside dense layers."""
    if runs == "bodies":
        monkeypatch.setenv(VARIABLE, "none")
    checkpoint, folder = exported(preset, precision="fp16" if runs == "fp16" else "fp32")
    model = load_model(checkpoint)
    heads, layers = int(model.config.route_attributes(2)["num_selection_heads"]), model.config.routed_layers
    candidates = window_routes(COARSE, 1, TOPK, SHORT) if model.config.routing.is_two_level else None
    forced = Trace(candidates=candidates, routes=[window_routes(TOPK, heads, TOPK, SHORT)] * len(layers))
    with torch.no_grad():
        expected = losses(model(torch.tensor([IDS[:SHORT]]), Trace(forced=forced)), 75)
        free = losses(model(torch.tensor([IDS[:SHORT]])), 75)
    reader = WindowReader(OnnxSession(load_bundle(folder), 1), SHORT)
    reader.read(IDS[:60])
    reader.score(IDS[100:120], IDS[120:130])  # another question, whose blocks leave no trace
    reader.rewind(60)
    scores = reader.score(IDS[60:75], IDS[75:SHORT], (13, 15))
    nats = [score.nats for score in scores]
    assert nats == pytest.approx(expected, rel=0.05 if runs == "fp16" else 1e-3)
    assert nats != pytest.approx(free, rel=0.05)
    for place, score in zip(range(75, SHORT), scores, strict=True):
        dense = model.config.num_hidden_layers - len(layers)
        window = BLOCK + BLOCK + (place - 1) % BLOCK + 1
        assert score.reading is not None and set(score.reading.layers.values()) == {0.0}, "the evidence lies outside"
        assert score.reading.tokens == pytest.approx((len(layers) * window + dense * place) / (len(layers) + dense))


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


class OnDevice:
    """Caches as an engine has them: logits stay away until they are fetched."""

    def __init__(self, caches: OnnxCaches) -> None:
        self.caches, self.batch, self.routes = caches, caches.batch, None

    def run(self, *call: Any) -> Any:
        rows = self.caches.run(*call)

        class Row:
            def __init__(self, row: int) -> None:
                self.row = row

            def fetch(self) -> Any:
                return rows[self.row]

        return [Row(row) for row in range(self.batch)]


def test_an_engine_of_more_rows(long_bundle: tuple[Path, Path]) -> None:
    """Built for two rows or more, its logits on the device, its routes not given: the other row is idle."""

    class Engine(OnnxSession):
        @property
        def limits(self) -> SessionLimits:
            return SessionLimits(16, fewest_rows=2)

        def allocate(self, batch: int, capacity: int) -> Any:
            return OnDevice(super().allocate(batch, capacity))

    bundle = load_bundle(long_bundle[1], verify=False)
    reader, plain = Reader(Engine(bundle, 1), LENGTH), Reader(OnnxSession(bundle, 1), LENGTH)
    assert reader.caches.batch == 2
    scores, expected = (each.score(IDS[:70], IDS[70:80], (5, 9)) for each in (reader, plain))
    assert [score.nats for score in scores] == pytest.approx([score.nats for score in expected], rel=1e-4)
    assert all(score.reading is None for score in scores)


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
