"""Circuit breakers, with a clock that is passed in."""

import math
import random

import pytest
from expert_fakes import make_peer_id
from hypothesis import given
from hypothesis import strategies as st

from trainer_client.dispatch.policy import CircuitBreakers

ANNA, BERT, CARL = map(make_peer_id, range(3))


def opened_for(breakers: CircuitBreakers, now: float) -> float:
    """For how long Anna is still avoided, to a millisecond."""
    return next(ms / 1000 for ms in range(10**6) if ANNA not in breakers.open_at(now + ms / 1000))


def test_a_peer_is_not_avoided_before_it_fails() -> None:
    assert CircuitBreakers().open_at(0.0) == frozenset()


def test_each_failure_in_a_row_is_avoided_twice_as_long_up_to_a_limit() -> None:
    breakers, now = CircuitBreakers(first_s=1.0, longest_s=6.0), 100.0
    waits = []
    for _ in range(5):
        breakers.failed(ANNA, now)
        waits.append(opened_for(breakers, now))
        now += waits[-1]
    assert waits == [1.0, 2.0, 4.0, 6.0, 6.0]


def test_thousands_of_failures_do_not_overflow() -> None:
    breakers, now = CircuitBreakers(first_s=1.0, longest_s=60.0), 0.0
    for _ in range(3000):
        breakers.failed(ANNA, now)
        now += 60.0
    assert breakers.open_at(now - 0.01) == {ANNA}
    assert breakers.open_at(now) == frozenset()


def test_only_the_peer_that_failed_is_avoided() -> None:
    breakers = CircuitBreakers()
    breakers.failed(ANNA, 0.0)
    assert breakers.open_at(1.0) == {ANNA}


def test_failures_of_calls_under_way_together_count_once() -> None:
    breakers = CircuitBreakers(first_s=1.0)
    for at in (0.0, 0.2, 0.9):
        breakers.failed(ANNA, at)
    assert breakers.open_at(0.99) == {ANNA}
    assert breakers.open_at(1.0) == frozenset()


def test_half_open_peer_may_be_tried_and_one_more_failure_opens_for_longer() -> None:
    breakers = CircuitBreakers(first_s=1.0)
    breakers.failed(ANNA, 0.0)
    assert breakers.open_at(1.0) == frozenset()
    breakers.failed(ANNA, 1.5)
    assert breakers.open_at(3.49) == {ANNA}
    assert breakers.open_at(3.5) == frozenset()


def test_the_first_three_failures_in_a_row_are_forgiven_when_they_came_quickly() -> None:
    breakers = CircuitBreakers(first_s=1.0)
    for at in (0.0, 0.1, 0.2):
        breakers.failed(ANNA, at, quickly=True)
        assert breakers.open_at(at) == frozenset()
    breakers.failed(ANNA, 0.3, quickly=True)
    assert opened_for(breakers, 0.3) == 1.0
    breakers.failed(ANNA, 1.4, quickly=True)
    assert opened_for(breakers, 1.4) == 2.0
    breakers.succeeded(ANNA)
    breakers.failed(ANNA, 5.0, quickly=True)
    assert breakers.open_at(5.0) == frozenset()


def test_a_peer_whose_line_loses_every_tenth_call_is_hardly_ever_avoided() -> None:
    breakers, rng = CircuitBreakers(first_s=2.0), random.Random(0)
    avoided = 0
    for call in range(10_000):
        now = call * 0.05
        avoided += ANNA in breakers.open_at(now)
        if rng.random() < 0.1:
            breakers.failed(ANNA, now, quickly=True)
        else:
            breakers.succeeded(ANNA)
    assert avoided < 0.02 * 10_000


def test_success_closes_the_breaker_and_forgets_the_failures() -> None:
    breakers = CircuitBreakers(first_s=1.0)
    breakers.failed(ANNA, 0.0)
    breakers.failed(ANNA, 1.0)
    breakers.succeeded(ANNA)
    assert breakers.open_at(1.5) == frozenset()
    breakers.failed(ANNA, 2.0)
    assert opened_for(breakers, 2.0) == 1.0


def test_success_of_one_kind_of_call_forgets_no_failures_of_another() -> None:
    """Otherwise, a peer that answers forward calls and no backward calls is never avoided for long."""
    breakers, now, waits = CircuitBreakers(first_s=1.0), 0.0, []
    for _ in range(4):
        breakers.failed(ANNA, now, "backward")
        waits.append(opened_for(breakers, now))
        now += waits[-1]
        breakers.succeeded(ANNA, "forward")
    assert waits == [1.0, 2.0, 4.0, 8.0]
    breakers.succeeded(ANNA, "backward")
    breakers.failed(ANNA, now, "backward")
    assert opened_for(breakers, now) == 1.0


def test_a_peer_that_only_answers_one_kind_of_call_stays_avoided_meanwhile() -> None:
    breakers = CircuitBreakers(first_s=10.0)
    breakers.failed(ANNA, 0.0, "backward")
    breakers.succeeded(ANNA, "forward")  # of a call that was under way
    assert opened_for(breakers, 1.0) == 9.0


def test_success_of_a_peer_that_never_failed_is_nothing() -> None:
    breakers = CircuitBreakers()
    breakers.succeeded(ANNA)
    assert breakers.open_at(0.0) == frozenset()


def test_busy_is_avoided_as_long_as_asked_and_is_no_failure() -> None:
    breakers = CircuitBreakers(first_s=1.0)
    breakers.busy(ANNA, 0.0, 5.0)
    assert opened_for(breakers, 0.0) == 5.0
    breakers.failed(ANNA, 5.0)
    assert opened_for(breakers, 5.0) == 1.0  # the first failure


def test_busy_never_shortens_what_is_open_already() -> None:
    breakers = CircuitBreakers(first_s=4.0)
    breakers.failed(ANNA, 0.0)
    breakers.busy(ANNA, 1.0, 0.5)
    assert opened_for(breakers, 1.0) == 3.0


@pytest.mark.parametrize("asked", [1e9, math.inf])
def test_busy_peer_can_not_ask_for_longer_than_the_limit(asked: float) -> None:
    breakers = CircuitBreakers(longest_s=60.0)
    breakers.busy(ANNA, 0.0, asked)
    assert opened_for(breakers, 0.0) == 60.0


@given(st.lists(st.tuples(st.sampled_from(["failed", "busy"]), st.integers(0, 50)), max_size=60))
def test_memory_is_bounded_and_keeps_the_latest(events: list[tuple[str, int]]) -> None:
    breakers = CircuitBreakers(first_s=1000.0, longest_s=1000.0, limit=4)
    latest: list[int] = []
    for event, number in events:
        if event == "failed":
            breakers.failed(make_peer_id(number), 0.0)
        else:
            breakers.busy(make_peer_id(number), 0.0, 1000.0)
        latest = [*(other for other in latest if other != number), number][-4:]
    assert breakers.open_at(1.0) == set(map(make_peer_id, latest))
