"""Deadlines and hedging times, as functions of past call times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_client.dispatch.policy import LEAST_KNOWN, CallTimes, WaitPolicy

seconds = st.floats(0.001, 100)
many = st.lists(seconds, min_size=LEAST_KNOWN, max_size=300)
policies = st.builds(
    WaitPolicy,
    call_deadline_s=st.floats(0.1, 600),
    grace_s=st.just(0.5),
    k_min=st.just(1),
    least_deadline_s=st.floats(0.1, 600),
)


def known(taken: list[float]) -> CallTimes:
    call_times = CallTimes()
    for one in taken:
        call_times.add(one)
    return call_times


@given(policies, st.lists(seconds, max_size=LEAST_KNOWN - 1))
def test_while_little_is_known_the_deadline_is_the_longest(policy: WaitPolicy, taken: list[float]) -> None:
    assert policy.deadline_s(known(taken)) == policy.call_deadline_s
    assert policy.hedge_after_s(known(taken)) == policy.call_deadline_s / 3


@given(policies, many)
def test_a_deadline_keeps_its_bounds_and_leaves_time_for_nine_calls_in_ten(
    policy: WaitPolicy, taken: list[float]
) -> None:
    deadline = policy.deadline_s(known(taken))
    assert min(policy.least_deadline_s, policy.call_deadline_s) <= deadline <= policy.call_deadline_s
    last = taken[-256:]
    if deadline < policy.call_deadline_s:
        assert sum(one <= deadline / 4 for one in last) >= 0.9 * len(last)


@given(policies, many, st.floats(1, 10))
def test_slower_calls_never_shorten_a_deadline(policy: WaitPolicy, taken: list[float], factor: float) -> None:
    slower = known([factor * one for one in taken])
    assert policy.deadline_s(slower) >= policy.deadline_s(known(taken))


@given(policies, many)
def test_another_replica_is_asked_before_rows_are_sent_elsewhere(
    policy: WaitPolicy, taken: list[float]
) -> None:
    call_times = known(taken)
    assert policy.hedge_after_s(call_times) < policy.deadline_s(call_times) / 2
    assert sum(one <= policy.hedge_after_s(call_times) for one in taken) or policy.least_deadline_s < max(
        taken
    )


@given(st.floats(0.01, 2), st.floats(2, 50))
def test_a_deadline_follows_a_network_that_became_slower(quick: float, slow: float) -> None:
    """No call meets the old deadline, so it is only known that each took longer."""
    policy = WaitPolicy(60.0, 0.5, 1)
    call_times = known([quick] * 256)
    for _ in range(2000):
        deadline = policy.deadline_s(call_times)
        if deadline >= slow:
            break
        call_times.add_unfinished(deadline)
    else:
        pytest.fail(f"2000 calls of {slow} s did not lengthen a deadline of {deadline} s")


def test_a_short_last_try_that_times_out_shortens_no_deadline() -> None:
    policy = WaitPolicy(60.0, 0.5, 1)
    call_times = known([2.0] * 100)
    for _ in range(300):
        call_times.add_unfinished(0.01)
    assert policy.deadline_s(call_times) == 8.0


def test_old_calls_are_forgotten() -> None:
    policy = WaitPolicy(60.0, 0.5, 1)
    assert policy.deadline_s(known([10.0] * 1000 + [1.0] * 256)) == 4.0


def test_a_health_check_takes_no_longer_than_calls_and_a_slow_node_has_more_time() -> None:
    policy = WaitPolicy(60.0, 0.5, 1)
    assert policy.check_deadline_s(known([0.1] * 100), 0.1) == policy.least_deadline_s / 4
    assert policy.check_deadline_s(known([2.0] * 100), 0.1) == 2.0
    assert policy.check_deadline_s(known([2.0] * 100), 3.0) == 6.0
    assert policy.check_deadline_s(known([2.0] * 100), 30.0) == 8.0, "the deadline"
    assert policy.check_deadline_s(known([2.0] * 100), None) == 4.0
    assert policy.check_deadline_s(known([2.0] * (LEAST_KNOWN - 1)), 0.1) is None


def test_hedges_stay_a_small_part_of_all_calls() -> None:
    policy = WaitPolicy(60.0, 0.5, 1, most_hedged=0.1)
    assert policy.may_hedge(0, 1)
    assert not policy.may_hedge(1, 10)
    assert policy.may_hedge(1, 11)
    assert not WaitPolicy(60.0, 0.5, 1, most_hedged=0).may_hedge(0, 1000)
