"""The hours in which an owner lets a node work: in local time, past midnight, and across clock changes."""

import contextlib
import re
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_server.schedule import Schedule

MONDAY = datetime(2026, 6, 1)
MINUTE, DAY, WEEK = timedelta(minutes=1), timedelta(days=1), timedelta(weeks=1)
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

Range = tuple[frozenset[int], int, int]
"""The days on which it begins, the first minute of the day, and the minute after the last; if that is not later, it is
on the next day.
"""

ranges = st.builds(
    lambda days, start, end: (frozenset(days or range(7)), start, end),
    st.sets(st.integers(0, 6)),
    st.integers(0, 24 * 60 - 1),
    st.integers(0, 24 * 60),
).filter(lambda r: r[1] != r[2])
minutes = st.integers(0, 7 * 24 * 60 - 1).map(lambda minute: MONDAY + minute * MINUTE)


def clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def text(parts: list[Range]) -> str:
    return ",".join(
        f"{' '.join(DAYS[day] for day in sorted(days))} {clock(start)}-{clock(end)}"
        for days, start, end in parts
    )


def expected(parts: list[Range], when: datetime) -> bool:
    """Whether any range that began on this day or the day before contains this time, as the setting's documentation
    says.
    """

    def is_on(days: frozenset[int], start: int, end: int, began: datetime) -> bool:
        first = began.replace(hour=0, minute=0)
        ends = first + end * MINUTE + (DAY if end <= start else 0 * DAY)
        return began.weekday() in days and first + start * MINUTE <= when < ends

    return any(is_on(*part, began) for part in parts for began in (when, when - DAY))


@given(st.lists(ranges, min_size=1, max_size=4), minutes)
def test_it_allows_what_its_words_say(parts: list[Range], when: datetime) -> None:
    assert Schedule.parse(text(parts)).allows(when) is expected(parts, when)


@given(st.lists(ranges, min_size=1, max_size=4), minutes, st.integers(-60, 60))
def test_it_repeats_every_week_and_seconds_do_not_matter(
    parts: list[Range], when: datetime, weeks: int
) -> None:
    schedule = Schedule.parse(text(parts))
    assert schedule.allows(when) is schedule.allows(when + weeks * WEEK + timedelta(seconds=59))


@given(st.lists(ranges, min_size=1, max_size=4), minutes)
def test_it_names_the_first_minute_at_which_it_allows_again(parts: list[Range], when: datetime) -> None:
    schedule = Schedule.parse(text(parts))
    if schedule.allows(when):
        return
    start = next(when + n * MINUTE for n in range(1, 7 * 24 * 60 + 1) if schedule.allows(when + n * MINUTE))
    day = "" if start - when < DAY else f"{DAYS[start.weekday()]} "
    assert schedule.next_start(when) == f"{day}{start:%H:%M}"


@given(st.lists(ranges, min_size=1, max_size=4))
def test_its_ranges_are_in_order_and_do_not_touch(parts: list[Range]) -> None:
    flat = [minute for pair in Schedule.parse(text(parts)).ranges for minute in pair]
    assert flat == sorted(set(flat))
    assert flat[0] >= 0
    assert flat[-1] <= 7 * 24 * 60


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ("22:00-07:00", "mon-sun 22:00-7:00"),
        ("fri-mon 8:00-9:00", "fri sat sun mon 08:00-09:00"),
        (
            " MON-FRI  22:00-07:00 , sat-sun 00:00-24:00",
            "mon-fri 22:00-24:00,tue-sat 0:00-7:00,sat-sun 0:00-24:00",
        ),
        ("22:00-00:00", "22:00-24:00"),
    ],
)
def test_it_can_be_said_in_several_ways(given: str, same: str) -> None:
    assert Schedule.parse(given) == Schedule.parse(same)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("", "''"),
        ("always", "'always'"),
        ("22:00", "'22:00'"),
        ("22-7", "'22-7'"),
        ("25:00-07:00", "'25:00-07:00'"),
        ("22:00-24:01", "'22:00-24:01'"),
        ("07:60-08:00", "'07:60-08:00'"),
        ("07:00-07:00", "is empty"),
        ("24:00-07:00", "is empty"),
        ("22:00-07:00,", "''"),
        ("mo 22:00-07:00", "'mo' names no days"),
        ("mon-fry 22:00-07:00", "'mon-fry'"),
        ("mon-tue-wed 22:00-07:00", "'mon-tue-wed'"),
        (",".join(["22:00-07:00"] * 101), "101 ranges; at most 100"),
    ],
)
def test_what_is_wrong_is_named(wrong: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        Schedule.parse(wrong)


@given(st.text(max_size=40))
def test_no_text_breaks_it(wild: str) -> None:
    with contextlib.suppress(ValueError):
        assert Schedule.parse(wild).ranges


HELSINKI = ZoneInfo("Europe/Helsinki")


def hours_allowed(schedule: Schedule, day: datetime) -> float:
    """The real hours that are allowed from noon of the day before to noon of this day. The clock may show one hour
    twice or never.
    """
    start, end = (day - DAY).replace(hour=12), day.replace(hour=12)
    begin, stop = start.replace(tzinfo=HELSINKI).timestamp(), end.replace(tzinfo=HELSINKI).timestamp()
    moments = range(int(begin), int(stop), 60)
    return sum(schedule.allows(datetime.fromtimestamp(moment, HELSINKI)) for moment in moments) / 60


@pytest.mark.parametrize(
    ("day", "night_hours"),
    [(datetime(2026, 3, 28), 9), (datetime(2026, 3, 29), 8), (datetime(2026, 10, 25), 10)],
    ids=["an ordinary day", "clocks go forward", "clocks go back"],
)
def test_when_the_clocks_change_a_night_ends_when_they_show_its_end(
    day: datetime, night_hours: float
) -> None:
    assert hours_allowed(Schedule.parse("22:00-07:00"), day) == night_hours


def test_an_hour_that_the_clocks_leave_out_is_left_out() -> None:
    schedule = Schedule.parse("03:00-04:00")
    assert hours_allowed(schedule, datetime(2026, 3, 29)) == 0
    assert hours_allowed(schedule, datetime(2026, 10, 25)) == 2
