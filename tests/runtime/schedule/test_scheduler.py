"""The serving loop: rows that join, leave, share prefixes and are read in pieces get what they would get alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.errors import BundleError, ContextTooLong, Overloaded, RequestError, ShuttingDown
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.sampling import SamplingParams, log_probabilities
from bilevel.runtime.schedule.jobs import FairQueue, SchedulerLimits, TextJob, TokenEvent
from bilevel.runtime.schedule.pacing import RATIO, WHOLE_SECONDS, PrefillPacer
from bilevel.runtime.schedule.scheduler import Scheduler
from bilevel.runtime.schedule.slots import common_prefix
from tests.doubles.bundle import MAX_POSITIONS, PREFILL_CHUNK, VOCAB_SIZE, predict, write_bundle


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> OnnxSession:
    return OnnxSession.open(write_bundle(tmp_path_factory.mktemp("bundle")), threads=1)


class Log:
    """A scheduler whose turns the test takes itself, and what each job was given."""

    def __init__(self, session: Any, **limits: Any) -> None:
        self.scheduler = Scheduler(session, SchedulerLimits(**{"max_rows": 3, **limits}), self.receive)
        self.events: dict[TextJob, list[TokenEvent]] = {}

    def receive(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self.events.setdefault(event.job, []).append(event)

    def submit(self, prompt: Sequence[int], max_tokens: int = 12, **settings: Any) -> TextJob:
        job = TextJob(list(prompt), SamplingParams(max_tokens=max_tokens), **settings)
        self.scheduler.submit(job)
        return job

    def tokens(self, job: TextJob) -> list[int]:
        return [event.token for event in self.events.get(job, []) if event.token is not None]

    def reason(self, job: TextJob) -> str | None:
        return self.events[job][-1].finish_reason if job in self.events else None

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()

    def finish(self) -> None:
        for _ in range(2000):
            if not (self.scheduler.num_active or self.scheduler.num_waiting):
                return
            self.scheduler.step()
        raise AssertionError("the scheduler does not come to an end")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, VOCAB_SIZE, random.integers(1, 60)).tolist() for _ in range(count)]


def test_rows_that_join_and_leave_between_tokens(session: OnnxSession) -> None:
    """20 jobs on 3 rows, submitted at different turns: every text is the one that the model gives it alone."""
    log, jobs = Log(session), []
    for index, prompt in enumerate(prompts(20)):
        jobs.append((prompt, 1 + index * 3 % 25, log.submit(prompt, 1 + index * 3 % 25)))
        log.step(index % 5)
    log.finish()
    for prompt, max_tokens, job in jobs:
        assert log.tokens(job) == predict(prompt, max_tokens)
        assert log.reason(job) in ("length", "eos")


def test_a_row_may_be_filled_to_the_last_token(session: OnnxSession) -> None:
    """Rows at their capacity stay whole while others generate and are read beside them."""
    log = Log(session)
    jobs = [(prompt, log.submit(prompt, 500)) for prompt in (*prompts(4), prompts(1, 5)[0] * 9)[:4]]
    full = [7] * MAX_POSITIONS
    jobs.append((full, log.submit(full, 500)))
    log.finish()
    assert log.tokens(jobs[-1][1]) == predict(full, 500)
    assert all(log.tokens(job) == predict(prompt, 500) for prompt, job in jobs)
    assert log.reason(jobs[-1][1]) == "length"


@pytest.mark.parametrize("cut", range(1, 41))
def test_every_cut_of_a_prefix_is_reused_exactly(session: OnnxSession, cut: int) -> None:
    log = Log(session)
    first, second = prompts(2, seed=7)
    first, second = (first * 40)[:40], (second * 40)[:40]
    log.submit(first, 3)
    log.finish()
    prompt = first[:cut] + [token for token in second if token != first[min(cut, 39)]]
    job = log.submit(prompt, 20)
    log.finish()
    assert log.tokens(job) == predict(prompt, 20)
    assert job.num_reused == cut


def test_a_text_is_continued_where_it_lies(session: OnnxSession) -> None:
    """A second turn reads its new words only, also what was generated in the first is not read again."""
    log = Log(session)
    prompt = prompts(1)[0]
    first = log.submit(prompt, 9)
    log.finish()
    answer = log.tokens(first)
    assert len(answer) == 9
    second = log.submit([*prompt, *answer, 5, 6], 9)
    log.finish()
    assert second.num_reused == len(prompt) + 8  # the last token generated was never read
    assert log.tokens(second) == predict([*prompt, *answer, 5, 6], 9)


def test_the_same_prompt_again_reads_one_token(session: OnnxSession) -> None:
    log, prompt = Log(session), [9, 8, 7] * 10
    jobs = [log.submit(prompt, 5) for _ in range(3)]  # all at once: the others wait for the first one's reading
    log.finish()
    assert [job.num_reused for job in jobs] == [0, 29, 29]
    assert all(log.tokens(job) == predict(prompt, 5) for job in jobs)


def test_a_shared_beginning_is_copied_and_the_longer_text_kept(session: OnnxSession) -> None:
    log, system = Log(session), [3, 1, 4, 1, 5, 9, 2, 6] * 4
    first = log.submit([*system, 11, 12, 13], 4)
    log.finish()
    other = log.submit([*system, 21, 22, 23], 4)
    log.finish()
    again = log.submit([*system, 11, 12, 13, *log.tokens(first), 50], 4)
    log.finish()
    assert other.num_reused == len(system)
    assert again.num_reused == len(system) + 3 + 3
    for job in (first, other, again):
        assert log.tokens(job) == predict(job.prompt, 4)


def test_a_long_prompt_does_not_stop_the_others(session: OnnxSession) -> None:
    """Beside a row that generates, a prompt is read in small pieces, and every turn gives that row a token."""
    log = Log(session)
    fast = log.submit([5, 6], 60)
    log.step(2)
    before = len(log.tokens(fast))
    slow = log.submit([8] * 90, 4)
    turns = 0
    while not log.tokens(slow):
        log.step()
        turns += 1
    assert len(log.tokens(fast)) - before == turns > 90 // PREFILL_CHUNK
    log.finish()
    assert log.tokens(slow) == predict([8] * 90, 4)
    assert log.tokens(fast) == predict([5, 6], 60)


def test_prompts_are_read_in_turns(session: OnnxSession) -> None:
    """A short prompt behind a long one has its first token before the long one is read."""
    log = Log(session)
    long = log.submit([8] * 95, 2)
    short = log.submit([9] * 10, 2)
    while not log.tokens(short):
        log.step()
    assert not log.tokens(long)


def test_cancelling_frees_the_row_within_one_turn(session: OnnxSession) -> None:
    log = Log(session, max_rows=1)
    running, waiting = log.submit([5, 6], 90), log.submit([7, 8], 4)
    log.step(3)
    assert not log.tokens(waiting)
    log.scheduler.cancel(running)
    log.step()
    assert log.reason(running) == "cancelled"
    log.finish()
    assert log.tokens(waiting) == predict([7, 8], 4)
    gone = log.submit([1, 2], 4)
    log.scheduler.cancel(gone)
    log.step()
    assert (log.reason(gone), log.tokens(gone)) == ("cancelled", [])


def test_a_full_queue_refuses_and_says_when_to_come_back(session: OnnxSession) -> None:
    log = Log(session, max_rows=1, max_queue=2)
    for _ in range(3):
        log.submit([5], 2)
    with pytest.raises(Overloaded, match=r"^3 requests are waiting already; try again in \d+ s$") as error:
        log.submit([5], 2)
    assert 1 <= error.value.retry_after <= 600
    log.finish()
    log.submit([5], 2)


def test_the_queue_is_fair_to_clients() -> None:
    """Somebody with a hundred jobs does not push back somebody with one."""
    queue = FairQueue()
    jobs = {name: TextJob([1], SamplingParams(), client=name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")}
    for job in jobs.values():
        queue.push(job)
    names = {id(job): name for name, job in jobs.items()}
    order = [names[id(queue.pop(lambda job: True))] for _ in range(6)]
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(queue) == 0 and queue.pop(lambda job: True) is None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([VOCAB_SIZE], f"the token {VOCAB_SIZE}; this model's tokens are 0 to {VOCAB_SIZE - 1}"),
        ([-1], "the token -1"),
        ([5] * 41, "the prompt has 41 tokens, but this server takes 40"),
    ],
)
def test_jobs_that_cannot_be_served_are_refused(session: OnnxSession, prompt: list[int], message: str) -> None:
    log = Log(session, row_tokens=40)
    good = TextJob([5], SamplingParams())
    with pytest.raises(RequestError, match=message) as refusal:
        log.scheduler.submit(good, TextJob(prompt, SamplingParams()))
    assert isinstance(refusal.value, ContextTooLong) == (len(prompt) > 40)
    assert log.scheduler.num_waiting == 0  # all or none


def test_a_failing_call_ends_its_rows_and_nothing_else(session: OnnxSession, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(session)
    job = log.submit([5, 6, 7], 9)
    log.step(2)
    view = log.scheduler._view(0, 1)

    def fail(*_: object) -> None:
        raise BundleError("ONNX Runtime could not run the graph")

    with monkeypatch.context() as patch:
        patch.setattr(view, "run", fail)
        log.step()
    last = log.events[job][-1]
    assert (last.finish_reason, last.error) == ("error", "the model failed on this request; the server's log says why")
    again = log.submit([5, 6, 7], 9)
    log.finish()
    assert again.num_reused == 0  # what lies there is not trusted
    assert log.tokens(again) == predict([5, 6, 7], 9)


def test_the_thread_finishes_running_jobs_and_refuses_new_ones(session: OnnxSession) -> None:
    log = Log(session)
    log.scheduler.start()
    jobs = [log.submit(prompt, 30) for prompt in prompts(5)]
    assert log.scheduler.close(timeout=60)
    assert all(log.tokens(job) == predict(job.prompt, 30) for job in jobs)
    with pytest.raises(ShuttingDown):
        log.submit([5])


def test_closing_has_a_limit(session: OnnxSession) -> None:
    log = Log(session, max_rows=1)
    log.scheduler.start()
    jobs = [log.submit([5, 6], 90) for _ in range(40)]
    assert not log.scheduler.close(timeout=0.01)
    assert not log.scheduler.is_alive
    assert log.reason(jobs[-1]) == "cancelled"


def test_log_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.4, 0.1], np.float32))
    found = log_probabilities(logits, 3, 3)
    assert found.chosen == pytest.approx(np.log(0.1))
    assert [token for token, _ in found.top] == [1, 2, 0]
    assert [value for _, value in found.top] == pytest.approx(np.log([0.4, 0.4, 0.1]))
    assert log_probabilities(logits, 0, 0).top == ()


def test_common_prefix() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        length, cut = random.integers(0, 700, 2)
        a = random.integers(0, 9, length).tolist()
        b = a[:cut] + random.integers(0, 9, 5).tolist()
        expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common_prefix(a, b) == expected


def test_the_pacer_finds_the_chunk_that_fits() -> None:
    """With 10 ms and 2 ms a token for a chunk, and decode steps of 20 ms, it settles at what RATIO allows."""
    pacer = PrefillPacer(512)

    def chunk() -> int:
        return pacer.chunk(3, 10_000, is_begun=True)

    for _ in range(40):
        pacer.record_decode(0.020)
        pacer.record_chunk(chunk(), 0.010 + 0.002 * chunk(), num_decoding=3)
    assert 0.010 + 0.002 * chunk() <= RATIO * 0.020 + 1e-9
    assert 0.010 + 0.002 * (chunk() + 2) > RATIO * 0.020
    assert pacer.chunk(0, 10_000, is_begun=False) == 512  # nobody waits
    before = chunk()
    pacer.record_chunk(before, 10.0, num_decoding=3)
    assert before // 2 <= chunk() <= (before + 1) // 2  # one slow call is not believed at once
    for _ in range(9):
        pacer.record_chunk(chunk(), 10.0, num_decoding=3)
    assert chunk() == 1
    assert pacer.chunk(3, 1, is_begun=True) == 1


def test_a_short_prompt_is_read_at_once() -> None:
    """One that takes no longer than WHOLE_SECONDS; not the end of a long one, and none while no chunk has been timed."""
    pacer = PrefillPacer(512)
    pacer.record_decode(0.020)
    assert pacer.chunk(3, 30, is_begun=False) < 30
    pacer.record_chunk(400, 400 * WHOLE_SECONDS / 40, num_decoding=0)
    assert pacer.chunk(3, 40, is_begun=False) == 40
    assert pacer.chunk(3, 41, is_begun=False) == pacer.chunk(3, 40, is_begun=True) < 40
    before = pacer.chunk(3, 41, is_begun=False)
    pacer.record_chunk(40, WHOLE_SECONDS, num_decoding=3)
    assert pacer.chunk(3, 41, is_begun=False) == before  # it says nothing about the pieces of a long one


@pytest.mark.parametrize("preset", ["two_level", "moba", "dense"])
def test_a_real_model_gives_the_same_tokens_and_routes(exported: Callable[..., tuple[Path, Path]], preset: str) -> None:
    """Shared prefixes at every cut, rows joining: tokens and the routes of each are those of a fresh run."""
    session = OnnxSession.open(exported(preset)[1], threads=1)
    base = np.random.default_rng(3).integers(2, VOCAB_SIZE, 34).tolist()
    log = Log(session, max_rows=4)
    log.submit(base, 2)
    log.finish()
    jobs = [log.submit([*base[:cut], 5, 9, 7, 8], 6, wants_routes=True) for cut in range(1, 34)]
    log.finish()
    assert [job.num_reused for job in jobs] != [0] * len(jobs)
    for job in jobs:
        alone = Log(session, max_rows=1)
        fresh = alone.submit(job.prompt, 6, wants_routes=True)
        alone.finish()
        assert log.tokens(job) == alone.tokens(fresh) == _generated(session, job.prompt)
        for ours, theirs in zip(log.events[job], alone.events[fresh], strict=True):
            if preset == "dense":
                assert ours.routes is None
                continue
            assert ours.routes is not None and theirs.routes is not None
            assert ours.routes.position == theirs.routes.position
            assert ours.routes.candidates == theirs.routes.candidates
            assert ours.routes.experts == theirs.routes.experts
            np.testing.assert_array_equal(ours.routes.blocks, theirs.routes.blocks)
            own = ours.routes.position // session.bundle.block_size
            assert ours.routes.blocks.max() == own and (preset != "two_level" or own in ours.routes.candidates)


def _generated(session: OnnxSession, prompt: list[int]) -> list[int]:
    return Generator(session, None).generate([prompt], SamplingParams(max_tokens=6)).finish()[0].token_ids
