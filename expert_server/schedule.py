"""When its owner lets a node work: ranges of the week, in local time. Pure."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = 24 * 60
_WEEK = 7 * _DAY
_CLOCK = re.compile(r"([01]?[0-9]|2[0-4]):([0-5][0-9])")
_MAX_RANGES = 100
_HOW = "write for example 22:00-07:00, or mon-fri 22:00-07:00,sat-sun 00:00-24:00"


@dataclass(frozen=True)
class Schedule:
    """Half-open ranges of minutes since Monday 00:00, in order and apart from each other.

    They follow the local clock: when daylight saving starts or ends, a range still ends when the clock shows its end.
    """

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Parses ranges such as `22:00-07:00`, with days in front if a range is not for every day.

        A range across midnight belongs to the day on which it begins. Raises ValueError, which says what is wrong.
        """
        parts = text.split(",")
        if len(parts) > _MAX_RANGES:
            raise ValueError(f"{len(parts)} ranges; at most {_MAX_RANGES}")
        return cls(_merged([piece for part in parts for piece in _pieces(part)]))

    def allows(self, when: datetime) -> bool:
        """`when`: local time."""
        minute = _minute(when)
        return any(start <= minute < end for start, end in self.ranges)

    def next_start(self, when: datetime) -> str:
        """When the next range begins: `22:00`, or `mon 22:00` if that is more than a day away."""
        minute = _minute(when)
        wait = min((start - minute - 1) % _WEEK + 1 for start, _ in self.ranges)
        start = when.replace(tzinfo=None) + timedelta(minutes=wait)  # by the local clock
        return f"{start:%H:%M}" if wait < _DAY else f"{_DAYS[start.weekday()]} {start:%H:%M}"


def _minute(when: datetime) -> int:
    """Minutes since Monday 00:00."""
    return when.weekday() * _DAY + when.hour * 60 + when.minute


def _pieces(text: str) -> list[tuple[int, int]]:
    """A daily range on each of its days, cut at the end of the week."""
    *days, clocks = text.lower().split() or [""]
    start, end = _clocks(clocks)
    if start in (end, _DAY):
        raise ValueError(f"{clocks!r} is empty: the whole day is 00:00-24:00")
    length = end - start if start < end else end + _DAY - start
    found = []
    for day in sorted({day for word in days for day in _days(word)}) or range(7):
        first = day * _DAY + start
        found += [(first, min(first + length, _WEEK)), (0, first + length - _WEEK)]
    return [(first, last) for first, last in found if first < last]


def _clocks(text: str) -> tuple[int, int]:
    try:
        start, end = map(_clock, text.split("-"))
    except ValueError:
        raise ValueError(f"{text!r} is not a range of the day: {_HOW}") from None
    return start, end


def _clock(text: str) -> int:
    """Minutes after midnight. Raises ValueError."""
    match = _CLOCK.fullmatch(text)
    if match is None or (minutes := int(match[1]) * 60 + int(match[2])) > _DAY:
        raise ValueError
    return minutes


def _days(text: str) -> list[int]:
    """The days in texts such as `mon` or `fri-mon`."""
    try:
        first, *last = (_DAYS.index(name) for name in text.split("-"))
        (last_day,) = last or [first]
    except ValueError:
        raise ValueError(f"{text!r} names no days: {_HOW}") from None
    return [day % 7 for day in range(first, last_day + 1 if first <= last_day else last_day + 8)]


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
