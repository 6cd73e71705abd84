"""Rows over packed caches: joined, cut short, taken up by others, stored and drafted for, they say what they say alone.

Another order of sums may turn a code over, as it may a last bit of a float, so texts are compared on fixed prompts, and caches
by the numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from bilevel.bundle.cache_rows import CacheRows
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.drafts import DraftBudget
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.ngrams import Drafter
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.schedule import prefix_store
from bilevel.runtime.schedule.jobs import SchedulerLimits, TextJob
from bilevel.runtime.schedule.prefix_store import PrefixStore
from bilevel.runtime.schedule.scheduler import Scheduler

MOST = 14


@pytest.fixture(params=[("two_level", "fp32", "int8"), ("dense", "int4", "int4")], ids=["routed-int8", "dense-int4"])
def session(request: pytest.FixtureRequest, exported: Callable[..., tuple[Path, Path]]) -> OnnxSession:
    preset, weights, caches = request.param
    return OnnxSession.open(exported(preset, weights, caches=caches)[1], threads=1)


def prompts(session: OnnxSession, count: int) -> list[list[int]]:
    """The first 21 tokens of every second one are the same."""
    random = np.random.default_rng(5)
    drawn = [random.integers(2, session.bundle.vocab_size, 5 + 4 * place % 23).tolist() for place in range(count)]
    shared = random.integers(2, session.bundle.vocab_size, 21).tolist()
    return [shared + prompt if place % 2 else prompt for place, prompt in enumerate(drawn)]


def alone(session: OnnxSession, prompt: list[int]) -> list[int]:
    """The greedy text, token by token."""
    generation = Generator(session, None, speculation=False).generate([prompt], SamplingParams(max_tokens=MOST))
    return list(generation.finish()[0].token_ids)


def serve(session: OnnxSession, asked: Sequence[list[int]], store: PrefixStore | None = None) -> tuple[list[list[int]], int]:
    """(texts, tokens of prompts that were not read anew) of jobs on two rows, one submitted after another's tokens."""
    events: list[object] = []
    scheduler = Scheduler(session, SchedulerLimits(max_rows=2), events.extend, prefixes=store)
    jobs = [TextJob(prompt, SamplingParams(max_tokens=MOST)) for prompt in asked]
    for place, job in enumerate(jobs):
        scheduler.submit(job)
        for _ in range(place % 4):
            scheduler.step()
    while scheduler.num_active or scheduler.num_waiting:
        scheduler.step()
    assert scheduler.close(0)
    texts = [[e.token for e in events if e.job is job and e.token is not None] for job in jobs]  # type: ignore[attr-defined]
    return texts, sum(job.num_reused for job in jobs)


def test_served_rows_join_leave_and_take_up_each_other_s_beginnings(session: OnnxSession) -> None:
    asked = prompts(session, 8)
    texts, reused = serve(session, asked)
    assert texts == [alone(session, prompt) for prompt in asked] and reused > 0


def test_stored_beginnings_outlive_the_process(session: OnnxSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store, "LEAST_TOKENS", 12)
    asked = prompts(session, 4)
    first, _ = serve(session, asked, PrefixStore(tmp_path, session, 1 << 30))
    again, reused = serve(session, asked[3:], PrefixStore(tmp_path, session, 1 << 30))
    assert again == first[3:] and reused >= 21


class Teller(Drafter):
    """Drafts what is said, then tokens that are not: some of every draft are taken back, in the middle of blocks and behind."""

    said: tuple[int, ...] = ()
    right: Iterator[int] = iter(())

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        right = next(type(self).right)
        return [*self.said[len(tokens) : len(tokens) + right], 7, 7, 7, 7, 7][:most]


def test_tokens_of_refused_drafts_leave_nothing_behind(session: OnnxSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text, the rows, and the keys of blocks that a refused token had filled."""
    (prompt,) = prompts(session, 1)
    texts, caches = [], []
    for drafts in (False, True):
        if drafts:
            monkeypatch.setattr("bilevel.runtime.generate.rows.Drafter", Teller)
            monkeypatch.setattr(DraftBudget, "allows", lambda self, num_rows: True)
            Teller.said, Teller.right = (*prompt, *texts[0]), iter([0, 2, 1, 3, 0, 1] * MOST)
        taken: list[object] = []
        allocate = session.allocate
        monkeypatch.setattr(session, "allocate", lambda *sizes, a=allocate, t=taken: t.append(a(*sizes)) or t[-1])
        generation = Generator(session, None, speculation=drafts).generate([prompt], SamplingParams(max_tokens=MOST))
        texts.append(list(generation.finish()[0].token_ids))
        monkeypatch.setattr(session, "allocate", allocate)
        caches.append(taken[0].state)  # type: ignore[attr-defined]
        assert (generation.stats.num_drafted_tokens > generation.stats.num_draft_tokens_taken > 0) == drafts
    assert texts[0] == texts[1]
    length, size = len(prompt) + len(texts[0]) - 1, session.bundle.block_size
    assert length % size, "the last block is half filled"
    for name, one in caches[0].items():
        two = caches[1][name]
        if ".block_key." in name:
            np.testing.assert_allclose(two[:, :, : length // size], one[:, :, : length // size], rtol=1e-4, atol=1e-5)
        elif one.dtype == np.uint8:
            rows = CacheRows.of(session.bundle.caches, int(session.bundle.config["head_dim"]))
            np.testing.assert_allclose(rows.unpack(two)[:, :, :length], rows.unpack(one)[:, :, :length], rtol=1e-4, atol=1e-5)
