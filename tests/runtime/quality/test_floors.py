"""Floors by hand: what they are made of, when they hold, and what is said where nothing can be said."""

from __future__ import annotations

import pytest

from bilevel.errors import RequestError
from bilevel.runtime.quality.exams import COPY, LOSS, NEEDLES, PAIRS, Exam, Question
from bilevel.runtime.quality.floors import AskedFloor, check_floors, judge, parse_floor
from bilevel.runtime.quality.model import DENSE, ROUTED, WINDOW, Answer, LossResult, Recall
from bilevel.runtime.quality.reader import TokenScore
from bilevel.runtime.quality.results import answers, loss_result, task_results


def answer(task: str, routed: bool, dense: bool, right: float = 0.5) -> Answer:
    sides, exact = (ROUTED, DENSE), (routed, dense)
    return Answer(task, 1024, 0, 0.5, 5, sides, exact, (right, 1.0), (0.5, 0.25))


def test_needles_count_what_dense_finds() -> None:
    rows = [answer(NEEDLES, True, True)] * 9 + [answer(NEEDLES, False, True)] * 3 + [answer(PAIRS, False, True)] * 9
    floor = judge(AskedFloor(NEEDLES, 0.75), rows, None, None)
    assert floor.passed and floor.value == 0.75 and floor.words == "9 of 12 exact, dense 12"
    assert floor.interval is not None and floor.interval[0] < 0.75 < floor.interval[1]
    assert not judge(AskedFloor(NEEDLES, 0.76), rows, None, None).passed


def test_copies_count_tokens() -> None:
    assert judge(AskedFloor(COPY, 0.5), [answer(COPY, False, True)] * 4, None, None).value == 0.5


def test_dense_that_finds_nothing() -> None:
    floor = judge(AskedFloor(NEEDLES, 0.0), [answer(NEEDLES, True, False)] * 4, None, None)
    assert (floor.value, floor.passed, floor.words) == (None, False, "not defined: dense answers none of 4 rightly")


@pytest.mark.parametrize("name, words", [("recovered", "it takes dense"), ("recall", "no question left")])
def test_what_was_not_measured_misses(name: str, words: str) -> None:
    for recall in (None, Recall(0, None, None, None, ())):
        floor = judge(AskedFloor(name, 0.1), [], None, recall)
        assert not floor.passed and floor.value is None and words in floor.words


def test_recall() -> None:
    floor = judge(AskedFloor("recall", 0.6), [], None, Recall(7, None, 0.625, 0.25, ()))
    assert floor.passed and floor.words == "over 7 questions; choosing blindly would hold 0.25"


def loss(routed: list[float], dense: list[float], window: list[float]) -> LossResult:
    """Stretches of two tokens."""
    half = len(dense) // 2
    questions = tuple(Question((place + 1) / half, (1,), (1, 1), (0, 0)) for place in range(half))

    def outcome(nats: list[float]) -> list[list[list[TokenScore]]]:
        return [[[TokenScore(value, False) for value in nats[2 * p : 2 * p + 2]] for p in range(half)]]

    outcomes = {ROUTED: outcome(routed), DENSE: outcome(dense), WINDOW: outcome(window)}
    result = loss_result([Exam(LOSS, 100, (), questions)], outcomes)
    assert result is not None
    return result


def test_recovered_loss_by_hand() -> None:
    """Two tokens are far: the window loses 1 and 2 nats there, routing 0.5 and 0.25; the others do not count."""
    result = loss([1.5, 9, 1.25, 1, 1, 1], [1, 1, 1, 1, 1, 1], [2, 1.05, 3, 1, 1, 0.5])
    assert result.far_tokens == 2 and result.tokens == 6
    assert result.recovered == pytest.approx((0.5 + 1.75) / 3)
    assert result.far_nats == pytest.approx((1.375, 1, 2.5))
    assert result.above == pytest.approx((8.75 / 6, None, 2.55 / 6))
    assert [place.position for place in result.places] == [33, 67, 100]
    assert [place.nats for place in result.places] == [
        pytest.approx(each) for each in [(5.25, 1, 1.525), (1.125, 1, 2), (1, 1, 0.75)]
    ]
    floor = judge(AskedFloor("recovered", 0.75), [], result, None)
    assert floor.passed and floor.words == "on 2 of 6 tokens"


def test_no_far_token() -> None:
    result = loss([1, 1], [1, 1], [1, 1.05])
    assert result.far_tokens == 0 and result.recovered is None and result.far_nats == (None, None, None)
    assert "no token" in judge(AskedFloor("recovered", 0.5), [], result, None).words


def test_scores_by_hand() -> None:
    """Three answers of two tokens: one right, one half right, one that the model thinks impossible."""
    exam = Exam(NEEDLES, 64, (1,) * 40, tuple(Question(0.5, (1,), (1, 1), (4, 6)) for _ in range(3)))
    good, bad, never = TokenScore(0.5, True), TokenScore(1.5, False), TokenScore(float("inf"), False)
    outcomes = {ROUTED: [[[good, good], [good, bad], [bad, never]]], DENSE: [[[good, good]] * 3]}
    rows = answers([exam], outcomes)
    assert [row.exact for row in rows] == [(True, True), (False, True), (False, True)]
    assert [row.nats[0] for row in rows] == [0.5, 1.0, None]
    routed, dense = task_results([exam], outcomes)[0].scores
    assert (routed.exact, routed.right, routed.nats, dense.nats) == (1, 0.5, None, 0.5)
    assert dense.nats_above is None and routed.nats_above is None


def test_floors_are_read() -> None:
    assert parse_floor("needles=0.9") == AskedFloor(NEEDLES, 0.9)
    with pytest.raises(RequestError, match="no floor 'needle'; take needles, pairs"):
        parse_floor("needle=0.9")
    for text in ("needles", "needles=", "needles=much", "needles=nan"):
        with pytest.raises(RequestError, match="needs a number, as in --floor needles=0.9"):
            parse_floor(text)
    check_floors([AskedFloor("recall", 1)], [COPY])
    with pytest.raises(RequestError, match="--floor recovered takes the task loss; add it to --tasks needles"):
        check_floors([AskedFloor("recovered", 1)], [NEEDLES])
