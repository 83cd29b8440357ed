import random
from itertools import pairwise
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.internet.population import (
    HOUR_S,
    MBIT,
    Ending,
    Habit,
    Session,
    Volunteer,
    draw_population,
    is_weekend,
    sessions,
)

HOURS = 48.0


@pytest.fixture(scope="module")
def volunteers() -> list[Volunteer]:
    return draw_population(random.Random(1), 5_000)


@pytest.fixture(scope="module")
def drawn_sessions(volunteers: list[Volunteer]) -> list[list[Session]]:
    rng = random.Random(2)
    return [[*sessions(rng, volunteer, HOURS)] for volunteer in volunteers]


def test_population_has_exactly_the_wanted_shares(volunteers: list[Volunteer]) -> None:
    assert sum(v.nat for v in volunteers) == 3_000
    assert sum(v.is_slow for v in volunteers) == 500
    assert sum(v.is_hostile for v in volunteers) == 50


def test_overall_speeds_are_between_the_published_ones_of_two_countries(volunteers: list[Volunteer]) -> None:
    """Ofcom, March 2023: 69.4 and 18.4 Mbit/s; Ookla, USA, December 2023: 227 and 26.6."""
    swift = [v for v in volunteers if not v.is_slow]
    assert 69 * MBIT < median(v.down_bps for v in swift) < 227 * MBIT
    assert 18 * MBIT < median(v.up_bps for v in swift) < 27 * MBIT


def test_machines_have_as_many_cores_as_those_of_boinc(volunteers: list[Volunteer]) -> None:
    """Anderson 2020: 4 million cores in 700,000 devices."""
    assert fmean(v.cores for v in volunteers) == pytest.approx(4e6 / 7e5, rel=0.05)


def test_slow_volunteers_are_slow(volunteers: list[Volunteer]) -> None:
    slow = [v for v in volunteers if v.is_slow]
    assert max(v.up_bps for v in slow) <= 2 * MBIT
    assert median(v.rows_per_s for v in slow) < 0.2 * median(v.rows_per_s for v in volunteers)


@given(st.integers(0, 2**32))
def test_sessions_come_in_order_and_apart(seed: int) -> None:
    rng = random.Random(seed)
    (volunteer,) = draw_population(rng, 1)
    found = [*sessions(rng, volunteer, HOURS)]
    assert all(s.start_s < s.end_s for s in found)
    assert all(before.end_s <= after.start_s for before, after in pairwise(found))
    assert all(s.end_s > 0 and s.start_s < HOURS * HOUR_S for s in found)


def test_same_seed_draws_the_same() -> None:
    def draw() -> tuple[list[Volunteer], list[list[Session]]]:
        rng = random.Random(3)
        drawn = draw_population(rng, 100)
        return drawn, [[*sessions(rng, volunteer, HOURS)] for volunteer in drawn]

    assert draw() == draw()


def test_machines_are_there_about_as_often_as_those_of_seti(drawn_sessions: list[list[Session]]) -> None:
    """Anderson 2006: machines were on for 0.81 of the time."""
    assert _present(drawn_sessions, 0.0, HOURS) == pytest.approx(0.81, abs=0.06)


def test_a_fifth_of_the_nodes_fails_in_a_day(drawn_sessions: list[list[Session]]) -> None:
    days_there = len(drawn_sessions) * _present(drawn_sessions, 0.0, HOURS) * HOURS / 24
    ended = [s for each in drawn_sessions for s in each if s.end_s < HOURS * HOUR_S]
    without_a_word = sum(s.ending is not Ending.LEAVE for s in ended)
    assert without_a_word / days_there == pytest.approx(0.2, abs=0.05)


def test_daily_machines_are_there_in_the_evening_and_asleep_before_dawn(
    volunteers: list[Volunteer], drawn_sessions: list[list[Session]]
) -> None:
    european = [
        each
        for volunteer, each in zip(volunteers, drawn_sessions, strict=True)
        if volunteer.habit is Habit.DAILY and volunteer.utc_offset_h == 1
    ]
    assert _present(european, 19.0, 20.0) > 0.7
    assert _present(european, 3.0, 4.0) < 0.1
    assert {s.ending for each in european for s in each} == {*Ending}


def test_idle_machines_are_there_more_at_night(
    volunteers: list[Volunteer], drawn_sessions: list[list[Session]]
) -> None:
    idle = [
        each
        for volunteer, each in zip(volunteers, drawn_sessions, strict=True)
        if volunteer.habit is Habit.IDLE and volunteer.utc_offset_h == 1
    ]
    assert _present(idle, 1.0, 5.0) > 1.1 * _present(idle, 19.0, 22.0)


def test_second_day_is_a_weekend() -> None:
    assert [is_weekend(day * 24 * HOUR_S, 0) for day in range(4)] == [False, True, True, False]
    assert is_weekend(23.5 * HOUR_S, 1)


def _present(found: list[list[Session]], from_h: float, to_h: float) -> float:
    """The share of the time between these hours in which machines are online."""
    begin_s, end_s = from_h * HOUR_S, to_h * HOUR_S
    there = sum(max(0.0, min(s.end_s, end_s) - max(s.start_s, begin_s)) for each in found for s in each)
    return there / (len(found) * (end_s - begin_s))
