"""Beginnings that outlive the process: what is read back gives the text that reading anew gives, or is not used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bilevel.errors import RequestError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.schedule import prefix_store
from bilevel.runtime.schedule.jobs import SchedulerLimits, TextJob
from bilevel.runtime.schedule.prefix_store import PrefixStore
from bilevel.runtime.schedule.scheduler import Scheduler
from tests.doubles.bundle import VOCAB_SIZE, predict, write_bundle

LARGE = 1 << 30


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> OnnxSession:
    return OnnxSession.open(write_bundle(tmp_path_factory.mktemp("bundle")), threads=1)


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store, "LEAST_TOKENS", 12)


class Process:
    """A scheduler from start to end, as one process of a server has it."""

    def __init__(self, session: OnnxSession, folder: Path, most_bytes: int = LARGE) -> None:
        self.store = PrefixStore(folder, session, most_bytes)
        self.events: list[Any] = []
        self.scheduler = Scheduler(session, SchedulerLimits(max_rows=2), self.events.extend, prefixes=self.store)

    def ask(self, prompt: list[int], count: int = 6) -> tuple[list[int], int]:
        """(text, tokens of the prompt that were not read)."""
        job = TextJob(prompt, SamplingParams(max_tokens=count))
        self.scheduler.submit(job)
        while self.scheduler.num_active or self.scheduler.num_waiting:
            self.scheduler.step()
        return [event.token for event in self.events if event.job is job and event.token is not None], job.num_reused

    def end(self) -> None:
        assert self.scheduler.close(0)


def files(folder: Path) -> list[Path]:
    """The prefixes."""
    return sorted(folder.glob("*.prefix"))


def system(count: int = 40, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, count).tolist()


def test_a_prompt_is_ready_after_a_restart(session: OnnxSession, tmp_path: Path) -> None:
    """What two prompts had in common is stored at once, the rest at the end; the next process reads only what is new."""
    first = Process(session, tmp_path)
    shared = system()
    for question in ([5, 6, 7], [8, 9]):
        assert first.ask(shared + question)[0] == predict(shared + question, 6)
    first.store.flush()
    assert len(files(tmp_path)) == 1, "a kill from here on loses the shared part no more"
    first.end()
    second = Process(session, tmp_path)
    text, reused = second.ask([*shared, 10, 11])
    assert text == predict([*shared, 10, 11], 6) and reused == 40
    text, reused = second.ask([*shared, 5, 6, 7, *predict([*shared, 5, 6, 7], 6), 4])
    assert text == predict([*shared, 5, 6, 7, *predict([*shared, 5, 6, 7], 6), 4], 6) and reused == 40 + 3 + 5
    second.end()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=4), max_size=3
    ),
    st.sampled_from([2000, 9000, LARGE]),
)
def test_any_texts_over_any_restarts(
    session: OnnxSession, tmp_path_factory: pytest.TempPathFactory, processes: list[list[tuple[int, int, int]]], most: int
) -> None:
    """The text is always the one that the model gives alone, and the folder never holds more than it may."""
    folder = tmp_path_factory.mktemp("prefixes")
    for asked in processes:
        process = Process(session, folder, most)
        for cut, kind, length in asked:
            prompt = system(60)[:cut] + [50 + kind + place % 3 for place in range(length)]
            assert process.ask(prompt)[0] == predict(prompt, 6)
        process.end()
        assert sum(path.stat().st_size for path in files(folder)) <= most
        assert sorted(folder.iterdir()) == files(folder)


@pytest.mark.parametrize("place", ["header", "tokens", "middle", "end", "cut", "short", "longer", "no line", "number", "gone"])
def test_a_damaged_file_is_not_used(session: OnnxSession, tmp_path: Path, place: str) -> None:
    process, prompt = Process(session, tmp_path), system()
    process.ask(prompt)
    process.end()
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    start = content.index(b"\n") + 1
    if place == "number":
        header = {**json.loads(content[:start]), "tokens": 10**30}
        content[:start] = json.dumps(header).encode() + b"\n"
    elif place == "no line":
        content = bytearray(b"{" * 9000)
    elif place in ("cut", "short", "longer"):
        content = {"cut": content[:-1], "short": content[: start + 42], "longer": content + b"\0"}[place]
    elif place != "gone":
        at = {"header": 3, "tokens": start + 2, "middle": (start + len(content)) // 2, "end": len(content) - 1}[place]
        content[at] ^= 1
    path.write_bytes(content)
    process = Process(session, tmp_path)
    if place == "gone":
        path.unlink()
    text, reused = process.ask(prompt)
    assert text == predict(prompt, 6)
    assert reused == 0 or place == "tokens", "other tokens may have a prefix in common"
    process.end()
    process = Process(session, tmp_path)
    assert process.ask(prompt) == (predict(prompt, 6), len(prompt) - 1), "it is stored anew"
    process.end()


def test_another_bundles_folder_is_refused(session: OnnxSession, tmp_path: Path) -> None:
    process = Process(session, tmp_path / "prefixes")
    process.ask(system())
    process.end()
    (tmp_path / "other").mkdir()
    other = OnnxSession.open(write_bundle(tmp_path / "other", eos=(1, 2)), threads=1)
    PrefixStore(tmp_path / "prefixes", other, LARGE).close()  # where a text ends changes no caches
    for path in (tmp_path / "other").iterdir():
        path.unlink()
    other = OnnxSession.open(write_bundle(tmp_path / "other", precision="float16"), threads=1)
    with pytest.raises(RequestError, match="holds prefixes of another bundle or backend .*; name another folder, or remove"):
        PrefixStore(tmp_path / "prefixes", other, LARGE)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--prefix-cache .*file cannot be used .*; name a folder that can be written"):
        PrefixStore(tmp_path / "file", session, LARGE)


def test_one_server_at_a_time(session: OnnxSession, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, session, LARGE)
    with pytest.raises(RequestError, match="is in use by another server; name a folder of its own for each"):
        PrefixStore(tmp_path, session, LARGE)
    store.close()
    PrefixStore(tmp_path, session, LARGE).close()


def test_a_file_that_gives_way_while_it_is_read(session: OnnxSession, tmp_path: Path) -> None:
    """The writer may drop what the loop has just found; the text is then read anew, and the loop goes on."""
    process, prompt = Process(session, tmp_path), system()
    process.ask(prompt)
    process.end()
    process = Process(session, tmp_path)
    read = process.store._read

    def dropped(prefix: prefix_store.Prefix) -> list[Any]:
        process.store._make_room(LARGE, [1, 2, 3])
        return read(prefix)

    process.store._read = dropped  # type: ignore[method-assign]
    assert process.ask(prompt) == (predict(prompt, 6), 0)
    process.end()


@pytest.mark.parametrize("method", ["read_prefix", "write_prefix"])
def test_caches_that_cannot_be_copied(
    session: OnnxSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Neither a text nor the end of a server depends on it."""
    process, prompt = Process(session, tmp_path), system()
    process.ask(prompt)
    process.end()
    process = Process(session, tmp_path)
    monkeypatch.setattr(process.scheduler._caches, method, lambda *arguments: 1 / 0)
    for asked in (prompt, [*prompt[:20], 3, 4], prompt):
        assert process.ask(asked)[0] == predict(asked, 6)
    process.end()


def test_a_full_disk_costs_nothing_of_what_there_was(
    session: OnnxSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, prompt = Process(session, tmp_path), system()
    process.ask(prompt[:30])
    process.end()
    before = files(tmp_path)
    process = Process(session, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prefix_store.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
        process.ask(prompt)
        process.end()
    assert files(tmp_path) == before


def test_a_lower_bound_holds_at_once(session: OnnxSession, tmp_path: Path) -> None:
    process = Process(session, tmp_path)
    process.ask(system())
    process.end()
    Process(session, tmp_path, 10).end()
    assert files(tmp_path) == []


def test_what_is_not_a_prefix_stays(session: OnnxSession, tmp_path: Path) -> None:
    """A folder may hold other things; what a killed process left half written is swept."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".0.prefix.partial").write_text("half")
    os.mkfifo(tmp_path / "pipe.prefix")
    process = Process(session, tmp_path)
    process.ask(system())
    process.end()
    assert {path.name for path in tmp_path.iterdir()} >= {"notes.txt", "pipe.prefix"}
    assert len(list(tmp_path.iterdir())) == 3


def test_the_least_recently_used_gives_way(session: OnnxSession, tmp_path: Path) -> None:
    process = Process(session, tmp_path)
    process.ask(system())
    process.end()
    (path,) = files(tmp_path)
    most = path.stat().st_size * 5 // 2
    prompts = [system(40, seed) for seed in range(4, 7)]
    for prompt in prompts:
        process = Process(session, tmp_path, most)
        process.ask(prompt)
        process.end()
        os.utime(path, (1, 1)) if path.exists() else None
    process = Process(session, tmp_path, most)
    assert [process.store.longest(prompt)[1] for prompt in [system(), *prompts]] == [0, 0, 39, 39]
    process.end()


def test_a_longer_beginning_takes_the_place_of_a_shorter_one(session: OnnxSession, tmp_path: Path) -> None:
    for count in (20, 40):
        process = Process(session, tmp_path)
        process.ask(system(40)[:count], 1)
        process.end()
    (path,) = files(tmp_path)
    assert json.loads(path.read_bytes().split(b"\n")[0])["tokens"] == 40
