"""Several tokens a call: whatever is drafted, the text is the one that comes token by token; and drafts that lose time end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bilevel.errors import RequestError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.generate.drafts import DraftBudget
from bilevel.runtime.generate.generator import Generator
from bilevel.runtime.generate.ngrams import LONGEST, Drafter
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.schedule.jobs import SchedulerLimits, TextJob
from bilevel.runtime.schedule.scheduler import Scheduler
from tests.doubles.bundle import EOS, MAX_POSITIONS, VOCAB_SIZE, edit_manifest, predict, write_bundle

PROMPTS = st.lists(st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=60), min_size=1, max_size=3)
GENERATED = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Oracle(Drafter):
    """Drafts what the model will say, but for some of the tokens. wrong: in turn, how many tokens of a draft are right."""

    wrong: Iterator[int] = iter(())
    params = SamplingParams()

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        text = predict(tokens, LONGEST, eos=())[:most]
        right = next(type(self).wrong)
        return text[:right] + [(token + 1) % VOCAB_SIZE for token in text[right : right + 2]]


def turns(counts: list[int]) -> Iterator[int]:
    while True:
        yield from counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def session(folder: Path) -> OnnxSession:
    return OnnxSession.open(folder, threads=1)


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.runtime.generate.rows.Drafter", Oracle)
    monkeypatch.setattr(DraftBudget, "allows", lambda self, num_rows: True)


@pytest.mark.usefixtures("drafting")
@GENERATED
@given(prompts=PROMPTS, right=st.lists(st.integers(0, LONGEST), min_size=1, max_size=5), most=st.integers(1, 60))
def test_a_text_is_the_same_whatever_is_drafted(
    session: OnnxSession, prompts: list[list[int]], right: list[int], most: int
) -> None:
    Oracle.wrong = turns(right)
    generation = Generator(session, None).generate(prompts, SamplingParams(max_tokens=most))
    assert [completion.token_ids for completion in generation.finish()] == [predict(prompt, most) for prompt in prompts]
    assert generation.stats.num_new_tokens == sum(len(completion.token_ids) for completion in generation.completions)


@pytest.mark.usefixtures("drafting")
@GENERATED
@given(prompts=PROMPTS, right=st.lists(st.integers(0, LONGEST), min_size=1, max_size=5), most=st.integers(1, 60))
def test_a_served_text_is_the_same_whatever_is_drafted(
    session: OnnxSession, prompts: list[list[int]], right: list[int], most: int
) -> None:
    """Rows that join and leave, and the tokens that a place is left with."""
    Oracle.wrong = turns(right)
    texts: dict[int, list[int]] = {}
    scheduler = Scheduler(session, SchedulerLimits(max_rows=2), lambda events: collect(events, texts))
    jobs = [
        TextJob(prompt, SamplingParams(max_tokens=most), stream=place) for place, prompt in enumerate([*prompts, prompts[0]])
    ]
    scheduler.submit(*jobs)
    while scheduler.num_active or scheduler.num_waiting:
        scheduler.step()
    assert [texts[job.stream] for job in jobs] == [predict(job.prompt, most) for job in jobs]
    scheduler.close(0)


def collect(events: Sequence[object], texts: dict[int, list[int]]) -> None:
    for event in events:
        if event.token is not None:  # type: ignore[attr-defined]
            texts.setdefault(event.job.stream, []).append(event.token)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("seed", range(4))
def test_a_drawn_text_is_the_same(folder: Path, session: OnnxSession, seed: int) -> None:
    """Logits fall slowly, so that many tokens are drawn that nobody drafted, and some that somebody did."""
    Oracle.wrong = turns([8, 1, 0, 3])
    params = SamplingParams(max_tokens=30, temperature=0.05, seed=seed)
    drafted, plain = Generator(session, None), Generator(session, None, speculation=False)
    generation = drafted.generate([[5, 6, 7], [9]], params)
    assert [each.token_ids for each in generation.finish()] == [
        each.token_ids for each in plain.generate([[5, 6, 7], [9]], params).finish()
    ]
    assert 0 < generation.stats.num_draft_tokens_taken < generation.stats.num_drafted_tokens


@pytest.mark.usefixtures("drafting")
def test_what_follows_an_end_is_not_said(session: OnnxSession) -> None:
    prompt = next(
        [3, first]
        for first in range(2, VOCAB_SIZE)
        if EOS in predict([3, first], 8) and len(predict([3, first], 8)) in range(3, 7)
    )
    Oracle.wrong = turns([LONGEST])
    (completion,) = Generator(session, None).generate([prompt], SamplingParams(max_tokens=20)).finish()
    assert completion.token_ids == predict(prompt, 20) and completion.finish_reason == "eos"


@pytest.mark.usefixtures("drafting")
def test_a_row_is_filled_to_its_last_token(session: OnnxSession) -> None:
    Oracle.wrong = turns([LONGEST])
    prompt = next([3, first] for first in range(2, VOCAB_SIZE) if len(predict([3, first], 200)) > 90)
    (completion,) = Generator(session, None).generate([prompt], SamplingParams(max_tokens=200)).finish()
    assert completion.token_ids == predict(prompt, 200) and len(prompt) + len(completion.token_ids) == MAX_POSITIONS + 1


def test_repetition_is_found_by_the_drafter_itself(session: OnnxSession) -> None:
    drafter, text = Drafter(), [5, 6, 7, 8, 9, 5, 6, 7]
    assert drafter.draft(text, 8) == [8, 9, 5, 6]
    drafter.taken(4, 4)
    assert drafter.draft([*text, 8, 9, 5, 6, 4], 8) == []
    assert drafter.draft([*text, 8, 9, 5, 6, 4, 7, 8], 8)[:2] == [9, 5]


@given(tokens=st.lists(st.integers(0, 3), max_size=40), most=st.integers(0, 9), taken=st.lists(st.integers(0, 8), max_size=9))
def test_a_draft_is_what_stood_somewhere_behind_the_last_tokens(tokens: list[int], most: int, taken: list[int]) -> None:
    drafter = Drafter()
    for end in range(len(tokens) + 1):
        text = tokens[:end]
        draft = drafter.draft(text, most)
        assert len(draft) <= min(most, LONGEST)
        places = [place for place in range(2, end) if text[place - 2 : place] == text[-2:]]
        assert not draft or any(text[place : place + len(draft)] == draft for place in places)
        if draft and taken:
            drafter.taken(min(taken[end % len(taken)], len(draft)), len(draft))


def test_a_row_whose_drafts_are_refused_rests() -> None:
    drafter, text, drafted = Drafter(), [1, 2, 3, 1, 2], 0
    for _ in range(1000):
        if draft := drafter.draft(text, 8):
            drafted += 1
            drafter.taken(0, len(draft))
    assert 5 < drafted < 40


@given(cost=st.floats(1.0, 9.0), taken=st.floats(0.0, 1.0))
def test_drafts_that_lose_time_end(cost: float, taken: float) -> None:
    """cost: of a step with a draft of eight tokens, against one without."""
    budget, spent, plain, drafted, tokens = DraftBudget(), 0.0, 1.0, 0, 0.0
    for _ in range(3000):
        is_drafted = budget.allows(1)
        seconds, count = (cost * plain, 1 + 8 * taken) if is_drafted else (plain, 1)
        budget.record(1, 8 * is_drafted, count, seconds)  # type: ignore[arg-type]
        spent, tokens, drafted = spent + seconds, tokens + count, drafted + is_drafted
    assert spent <= 1.03 * tokens * plain + 20 * plain
    if 1 + 8 * taken > cost:
        assert drafted > 2500


def test_the_head_gives_the_logits_of_every_token(session: OnnxSession) -> None:
    whole, single = session.allocate(2, 16), session.allocate(2, 16)
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    last = whole.run(ids, np.zeros(2, np.int32), np.full(2, 4, np.int32))
    scores = whole.score([0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3] * 2).reshape(2, 4, -1)
    np.testing.assert_array_equal(scores[:, 3], last)
    for column in range(4):
        one = single.run(ids[:, column : column + 1], np.full(2, column, np.int32), np.ones(2, np.int32))
        np.testing.assert_array_equal(scores[:, column], one)


def test_a_bundle_without_a_head_goes_token_by_token(tmp_path: Path) -> None:
    edit_manifest(write_bundle(tmp_path), lambda manifest: manifest["graph"].pop("head"))
    session = OnnxSession.open(tmp_path, threads=1)
    caches = session.allocate(1, 8)
    assert not caches.gives_scores
    with pytest.raises(RequestError, match="has no head.onnx; make the bundle anew"):
        caches.score([0], [0])
    (completion,) = Generator(session, None).generate([[5, 6, 5, 6]], SamplingParams(max_tokens=9)).finish()
    assert completion.token_ids == predict([5, 6, 5, 6], 9)
