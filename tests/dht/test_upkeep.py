"""The period of a peer's rounds grows with their cost."""

import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulated_p2p import simulated_world
from dht.records import MAX_LIFETIME_S
from dht.upkeep import MOST_STRETCHED, ROUND_BYTES, UpkeepPeriod


class Line:
    def __init__(self) -> None:
        self.bytes = 0.0

    def spent(self) -> float:
        return self.bytes


def after_rounds(period: UpkeepPeriod, line: Line, cost: float, count: int = 40) -> float:
    for _ in range(count):
        line.bytes += cost
        period.note_round()
    return period.seconds


def test_cheap_rounds_come_as_often_as_wanted() -> None:
    line = Line()
    assert after_rounds(UpkeepPeriod(10.0, line.spent), line, ROUND_BYTES) == 10.0


@pytest.mark.parametrize("times", [2, 5, MOST_STRETCHED])
def test_dear_rounds_cost_no_more_in_a_second(times: float) -> None:
    line = Line()
    assert after_rounds(UpkeepPeriod(10.0, line.spent), line, times * ROUND_BYTES) == pytest.approx(
        10.0 * times, rel=0.01
    )


@pytest.mark.parametrize("times", [4, 40, 10_000])
def test_one_dear_round_changes_little_and_is_forgotten(times: float) -> None:
    line = Line()
    period = UpkeepPeriod(10.0, line.spent)
    assert after_rounds(period, line, times * ROUND_BYTES, 1) <= 10.0 * MOST_STRETCHED / 4
    assert after_rounds(period, line, 0.0, 6) == 10.0


def test_what_joining_cost_does_not_make_the_first_periods_longer() -> None:
    line = Line()
    period = UpkeepPeriod(10.0, line.spent)
    line.bytes += 100 * ROUND_BYTES
    period.begin()
    assert after_rounds(period, line, ROUND_BYTES, 1) == 10.0


@given(st.floats(0.5, 120.0), st.lists(st.floats(0, 1e9), max_size=20))
def test_no_period_is_shorter_than_wanted_nor_so_long_that_records_are_refused(
    wanted_s: float, costs: list[float]
) -> None:
    line = Line()
    period = UpkeepPeriod(wanted_s, line.spent, random.Random(1))
    for cost in costs:
        after_rounds(period, line, cost, 1)
        assert wanted_s <= period.seconds <= MOST_STRETCHED * wanted_s * 1.001
        longest_pause_s = max(period.drawn_s() for _ in range(20))
        late_s = period.lifetime_s - longest_pause_s
        assert min(60, 1.9 * period.seconds) <= late_s <= 60 + 0.2 * period.seconds
        assert period.lifetime_s < MAX_LIFETIME_S


@pytest.mark.parametrize(("wanted_s", "lifetime_s"), [(10.0, 30.0), (40.0, 104.0), (100.0, 170.0)])
def test_the_next_announcement_may_be_late_by_two_periods_but_not_by_minutes(
    wanted_s: float, lifetime_s: float
) -> None:
    assert UpkeepPeriod(wanted_s, Line().spent).lifetime_s == pytest.approx(lifetime_s)


@given(st.floats(0, 1000))
def test_rounds_begin_once_in_a_period_and_slow_ones_leave_a_pause(took_s: float) -> None:
    rest_s = UpkeepPeriod(10.0, Line().spent, random.Random(1)).rest_s(took_s)
    assert rest_s >= 2.25
    assert 9.0 <= took_s + rest_s <= max(11.0, took_s + 2.75)


def test_peers_do_not_stay_in_step() -> None:
    pauses = {UpkeepPeriod(10.0, Line().spent, random.Random(seed)).drawn_s() for seed in range(20)}
    assert len(pauses) == 20
    assert all(8.9 < pause < 11.1 for pause in pauses)
    assert UpkeepPeriod(10.0, Line().spent).drawn_s(0.5) < 5.6


def test_work_is_repeated_once_in_a_period_which_grows_with_its_cost() -> None:
    with simulated_world() as loop:
        line, began = Line(), list[float]()

        async def work() -> None:
            began.append(loop.time())
            line.bytes += 3 * ROUND_BYTES
            await asyncio.sleep(4.0)

        async def run() -> None:
            period = UpkeepPeriod(10.0, line.spent, random.Random(1))
            line.bytes += 100 * ROUND_BYTES  # before the first round
            async with asyncio.timeout(1000):
                await period.repeat(work)

        with pytest.raises(TimeoutError):
            loop.run_until_complete(run())
    assert began[0] == pytest.approx(10.0, rel=0.1)
    pauses = [after - before for before, after in pairwise(began)]
    assert pauses[0] == pytest.approx(10.0, rel=0.1)
    assert pauses[-10:] == [pytest.approx(30.0, rel=0.15)] * 10
