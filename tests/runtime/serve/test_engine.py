"""Serving from an engine: its rows, its capacity, its longest call; through the double of TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.bundle.engines import read_engine
from bilevel.bundle.format import load_bundle
from bilevel.errors import RequestError
from bilevel.runtime.backend import engine as engine_session
from bilevel.runtime.backend.engine import EngineSession
from bilevel.runtime.schedule.jobs import SchedulerLimits
from bilevel.runtime.schedule.scheduler import Scheduler
from bilevel.runtime.serve.limits import choose_limits
from tests.doubles.tensorrt import FakeDevice, FakeTensorrt, write_engine
from tests.support.http_server import NAME, RunningServer, running

PROMPTS = [[2, 3, 4, 5, 6] * 5, [2, 3, 4, 5, 6] * 4 + [9], [7], list(range(2, 30)), [8, 9] * 6]
Copied = Callable[..., tuple[Path, Path]]


@pytest.fixture
def open_engine(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineSession]:
    device, bundle = FakeDevice(), copied("two_level")[1]
    monkeypatch.setattr(engine_session, "load_module", lambda backend: FakeTensorrt(device))

    def open_session(**changes: Any) -> EngineSession:
        engine = read_engine(write_engine(bundle, **changes))
        return EngineSession(load_bundle(bundle), engine, None, device)  # type: ignore[arg-type]

    return open_session


def answers(server: RunningServer) -> list[str]:
    """All prompts at once, and then those that begin like one of them."""
    wanted = [PROMPTS, [[*prompt, 3] for prompt in PROMPTS]]
    return [choice["text"] for prompts in wanted for choice in server.complete(prompts, max_tokens=8)["choices"]]


@pytest.mark.parametrize(
    ("changes", "rows", "room"),
    [
        ({"capacity": 128, "batch": [1, 4]}, 4, 96),
        ({"capacity": 128, "batch": [1, 20]}, 8, 96),
        ({"capacity": 64, "batch": [1, 1]}, 1, 63),
        # Prompts are read in shorter pieces than the graph takes.
        ({"capacity": 128, "batch": [1, 2], "new_tokens": [[1, 4], [1, 1]]}, 2, 96),
    ],
)
def test_answers_are_those_of_onnx_runtime(
    open_engine: Callable[..., EngineSession], changes: dict[str, Any], rows: int, room: int
) -> None:
    session = open_engine(**changes)
    limits = choose_limits(session, None, None, 8)
    assert (limits.max_rows, limits.row_tokens) == (rows, room)
    with running(session, **vars(limits)) as server, running(session.bundle.folder) as reference:
        assert answers(server) == answers(reference)
        _, _, metadata = server.request("GET", f"/v2/models/{NAME}")
        assert metadata["platform"] == "bilevel_tensorrt"


def test_an_engine_gives_no_routes(open_engine: Callable[..., EngineSession]) -> None:
    session = open_engine(capacity=128)
    with running(session, **vars(choose_limits(session, None, None, 8))) as server:
        _, _, models = server.request("GET", "/v1/models")
        assert not models["data"][0]["gives_routes"]
        status, _, answer = server.request("POST", "/v1/completions", {"model": NAME, "prompt": [5], "routes": True})
        assert status == 400 and answer["error"]["param"] == "routes"
        assert answer["error"]["message"] == (
            "routes=true: the engine that runs this model does not give its routes; leave routes out"
        )
        _, _, metrics = server.request("GET", "/metrics")
        assert b"bilevel_route" not in metrics and b"bilevel_rows" in metrics


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({}, (5, None), "--max-rows 5 is more than the engine fake was built for (4); give at most 4, or .* --batch 1-5"),
        ({}, (None, 64), "--capacity 64 is more than the engine fake was built for (63); give less, or .* --capacity 68"),
        ({"batch": [2, 4]}, (None, None), "the engine fake runs 2 to 4 rows, and serving runs single ones too; .* --batch 1-4"),
        ({"new_tokens": [[2, 16]]}, (None, None), "the engine fake has no profile for single tokens; build it anew: "),
        ({"capacity": 3}, (None, None), "--capacity 1 is more than the engine fake was built for (0); give less, or .* 4"),
    ],
)
def test_what_an_engine_does_not_allow(
    open_engine: Callable[..., EngineSession], changes: dict[str, Any], asked: tuple[int | None, int | None], message: str
) -> None:
    session = open_engine(**{"capacity": 64, **changes})
    with pytest.raises(RequestError, match=message.replace("(", r"\(").replace(")", r"\)")):
        choose_limits(session, *asked, 8)


def test_what_is_asked_for_within_the_engine(open_engine: Callable[..., EngineSession]) -> None:
    session = open_engine(capacity=64, new_tokens=[[1, 8], [8, 12], [1, 1]])
    assert choose_limits(session, 2, 20, 5) == SchedulerLimits(2, 5, 20, 12)


def test_rows_that_tensorrt_cannot_read_are_refused_at_the_start(open_engine: Callable[..., EngineSession]) -> None:
    session = open_engine(capacity=12)
    with pytest.raises(RequestError, match="a row of the cache .*; take another --capacity"):
        Scheduler(session, choose_limits(session, None, None, 8), lambda events: None)
    with running(session, **vars(choose_limits(session, 1, None, 8))) as server:
        assert server.complete([5], max_tokens=2)["usage"]["completion_tokens"] >= 1
