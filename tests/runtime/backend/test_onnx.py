"""One call of the graph over caches that are bound once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bilevel.bundle.tensors import decode
from bilevel.errors import BundleError, MissingDependency, RequestError
from bilevel.runtime.backend.onnx import OnnxSession
from tests.doubles.bundle import BLOCK_SIZE, VOCAB_SIZE, predict, write_bundle


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> OnnxSession:
    return OnnxSession.open(write_bundle(tmp_path_factory.mktemp("bundle")), threads=1)


def call(past_len: list[int], new_len: list[int], rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three arrays of a call; rows are padded with 292, a token that would change every checksum."""
    length = max(map(len, rows))
    padded = [row + [292] * (length - len(row)) for row in rows]
    return np.array(padded, np.int64), np.array(past_len, np.int32), np.array(new_len, np.int32)


def test_allocate_resolves_every_symbol(session: OnnxSession) -> None:
    caches = session.allocate(3, 4 * BLOCK_SIZE)
    assert {name: (array.shape, str(array.dtype)) for name, array in caches.state.items()} == {
        "past.token_ids": ((3, 32), "int64"),
        "past.key.0": ((3, 1, 32, 1), "float32"),
        "past.block_key.0": ((3, 1, 4, 1), "float32"),
    }
    assert not any(array.any() for array in caches.state.values())


def test_run_writes_the_caches_in_place(session: OnnxSession) -> None:
    """What the graph wrote is in the arrays that were bound before the call: no second copy of a cache exists."""
    caches = session.allocate(2, 16)
    caches.run(*call([0, 0], [3, 1], [[4, 5, 6], [7]]))
    caches.run(*call([3, 1], [1, 1], [[8], [9]]))
    assert caches.state["past.token_ids"][0, :4].tolist() == [4, 5, 6, 8]
    assert caches.state["past.token_ids"][1, :2].tolist() == [7, 9]
    assert caches.state["past.key.0"][0, 0, :4, 0].tolist() == [4, 5, 6, 8]


@pytest.mark.parametrize(("precision", "stored"), [("float16", np.float16), ("bfloat16", np.uint16)])
def test_caches_in_16_bits(tmp_path: Path, precision: str, stored: type) -> None:
    """Written in place too, bfloat16 as its bits; the logits are fp32 and those of a text that went through the caches."""
    session = OnnxSession.open(write_bundle(tmp_path, precision=precision), threads=1)
    caches = session.allocate(2, 16)
    assert {name: array.dtype for name, array in caches.state.items()} == {
        "past.token_ids": np.int64,
        "past.key.0": stored,
        "past.block_key.0": stored,
    }
    caches.run(*call([0, 0], [3, 1], [[4, 5, 200], [7]]))
    logits = caches.run(*call([3, 1], [1, 1], [[8], [9]]))
    assert decode(caches.state["past.key.0"], precision)[0, 0, :4, 0].tolist() == [4, 5, 200, 8]
    assert decode(caches.state["past.key.0"], precision)[1, 0, :2, 0].tolist() == [7, 9]
    assert decode(caches.state["past.block_key.0"], precision)[:, 0, 0, 0].tolist() == [217, 7 + 9 + 292], "padding too"
    assert logits.dtype == np.float32
    assert logits.argmax(1).tolist() == [predict([4, 5, 200, 8], 1)[0], predict([7, 9], 1)[0]]


def test_run_returns_each_rows_last_valid_logits(session: OnnxSession) -> None:
    """Rows of 5, 1 and 8 tokens, the last as long as the call."""
    prompts = [[3, 4, 5, 6, 7], [11], [20, 30, 40, 50, 60, 70, 80, 90]]
    logits = session.allocate(3, 16).run(*call([0, 0, 0], [5, 1, 8], prompts))
    assert logits.shape == (3, VOCAB_SIZE) and logits.dtype == np.float32
    assert logits.argmax(1).tolist() == [predict(prompt, 1)[0] for prompt in prompts]


def test_idle_row_keeps_its_cache(session: OnnxSession) -> None:
    """An idle row's padding is written behind its tokens and never counted."""
    caches = session.allocate(2, 16)
    caches.run(*call([0, 0], [4, 2], [[3, 4, 5, 6], [7, 8]]))
    caches.run(*call([4, 2], [2, 0], [[9, 10], []]))
    logits = caches.run(*call([6, 2], [1, 1], [[11], [12]]))
    assert logits.argmax(1).tolist() == [predict([3, 4, 5, 6, 9, 10, 11], 1)[0], predict([7, 8, 12], 1)[0]]


def test_allocations_of_one_session_are_independent(session: OnnxSession) -> None:
    first, second = session.allocate(1, 8), session.allocate(1, 24)
    first.run(*call([0], [2], [[3, 4]]))
    second.run(*call([0], [1], [[5]]))
    assert first.run(*call([2], [1], [[6]])).argmax() == predict([3, 4, 6], 1)[0]
    assert second.run(*call([1], [1], [[6]])).argmax() == predict([5, 6], 1)[0]


def test_run_fills_the_capacity_to_the_last_token(session: OnnxSession) -> None:
    caches = session.allocate(1, 8)
    assert caches.run(*call([0], [8], [list(range(2, 10))])).argmax() == predict(list(range(2, 10)), 1)[0]


@pytest.mark.parametrize("past_len", [[6, 0], [0, 6]], ids=["first-row", "idle-row"])
def test_run_refuses_a_row_that_does_not_fit(session: OnnxSession, past_len: list[int]) -> None:
    with pytest.raises(RequestError, match="3 new tokens do not fit behind 6 in caches of 8"):
        session.allocate(2, 8).run(*call(past_len, [3, 0], [[1, 2, 3], []]))


def test_run_refuses_another_batch(session: OnnxSession) -> None:
    with pytest.raises(RequestError, match=r"shape \[1, 1\], the caches hold 2 rows"):
        session.allocate(2, 8).run(*call([0], [1], [[3]]))


def test_failing_graph_is_one_sentence(session: OnnxSession) -> None:
    """A failure inside the graph (here: a place before the first) is translated, not passed through."""
    with pytest.raises(BundleError, match="ONNX Runtime could not run the graph") as caught:
        session.allocate(1, 8).run(*call([-9], [1], [[3]]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("capacity", [-8, 0, 1, 12])
def test_allocate_refuses_partial_blocks(session: OnnxSession, capacity: int) -> None:
    with pytest.raises(RequestError, match=f"capacity={capacity} must be a multiple of the model's block_size=8; use "):
        session.allocate(1, capacity)


def test_allocate_refuses_no_rows(session: OnnxSession) -> None:
    with pytest.raises(RequestError, match="batch=0"):
        session.allocate(0, 8)


def test_allocate_without_the_memory(session: OnnxSession) -> None:
    with pytest.raises(RequestError, match=r"rows of \d+ tokens need \d+ MiB, this machine has \d+ MiB"):
        session.allocate(4, 1 << 40)


def test_open_refuses_negative_threads(session: OnnxSession) -> None:
    with pytest.raises(RequestError, match="threads=-1"):
        OnnxSession(session.bundle, threads=-1)


def test_open_refuses_an_onnxruntime_without_the_quantised_product(
    session: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    with pytest.raises(
        MissingDependency, match="onnxruntime 1.22.1 is too old for the int4 weights of .* they take 1.23 or later"
    ):
        OnnxSession(dataclasses.replace(session.bundle, weights={"format": "int4"}))


@pytest.mark.parametrize("version", ["1.9.0", "1.23.2"])
def test_open_refuses_an_onnxruntime_that_is_too_old(
    session: OnnxSession, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    with pytest.raises(MissingDependency, match=f"onnxruntime {version} cannot run opset 24, .* it takes 1.24 or later"):
        OnnxSession(dataclasses.replace(session.bundle, opset=24))


def test_calls_are_timed_on_request(tmp_path: Path) -> None:
    """In caches that are allocated from then on, and in the rows cut out of them; the results stay the same."""
    session = OnnxSession.open(write_bundle(tmp_path), threads=1)
    before = session.allocate(1, 8)
    timer = session.time_calls()
    caches = session.allocate(2, 8)
    before.run(*call([0], [2], [[3, 4]]))
    assert timer.seconds == 0
    logits = caches.rows(1, 1).run(*call([0], [2], [[3, 4]]))
    assert 0 < timer.seconds < 60 and logits.argmax() == predict([3, 4], 1)[0]
