"""Realistic volunteers: their lines, their machines, and when these are online.

Shares and widths are published ones where there are any, with their source; the others are marked as assumed.
`tests/benchmarks/test_internet_population.py` compares the result with published figures that nothing was fitted to.

OECD 2021      OECD broadband portal, table 1.3, December 2021: fixed subscriptions by technology
OpenVault 2022 OpenVault Broadband Insights, third quarter of 2022: tiers of subscribers in the USA
OpenVault 2025 The same, fourth quarter of 2025: fibre and cable of one operator
Ofcom 2023     UK home broadband performance, measured in March 2023 (median 69.4 Mbit/s down, 18.4 up)
Ookla          Speedtest Global Index: November 2022 (the world's fixed lines) and December 2023 (the USA's)
Anderson 2006  Anderson and Fedak: The computational and storage potential of volunteer computing, CCGRID 2006
Anderson 2020  Anderson: BOINC, a platform for volunteer computing, J. Grid Computing 18, 2020
Heien 2012     Heien, Kondo, Anderson: A correlated resource model of Internet end hosts, IEEE TPDS 23(6), 2012
Javadi 2011    Javadi, Kondo, Vincent, Anderson: Discovering statistical models of availability in large distributed
               systems: an empirical study of SETI@home, IEEE TPDS 22(11), 2011
Steiner 2009   Steiner, En-Najjary, Biersack: Long term study of peer behavior in the KAD DHT, IEEE/ACM ToN 17(5), 2009
Steam          Steam hardware survey, March 2022 (4 and 6 cores) and March 2023 (8 and 12 cores)
Stutzbach 2006 Stutzbach and Rejaie: Understanding churn in peer-to-peer networks, IMC 2006, fits of session lengths
"""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

T = TypeVar("T")

HOUR_S = 3600.0
DAY_H = 24
WEEKDAY_OF_START = 4
"""A simulation begins on a Friday at midnight UTC, so that two days cover a work day and a day of a weekend."""

MBIT = 1e6
GIB = 2**30

NAT_SHARE = 0.60
SLOW_SHARE, HOSTILE_SHARE = 0.10, 0.01
"""These are part of the scenario, not measured."""
SLOW_UP_BPS, SLOWNESS = 2 * MBIT, 0.1
"""The most that a slow volunteer uploads, as over a bad wireless hop, and its speed as a share of what its hardware
allows. Assumed.
"""


@dataclass(frozen=True)
class Line:
    """A technology of home lines. Speeds are drawn from log-normal distributions with these medians."""

    share: float
    down_bps: float
    up_bps: float
    sigma: float
    """The standard deviation of the logarithm of both speeds, which are drawn together: fast lines are fast in both
    directions.
    """
    rtt_s: float
    """Seconds to the provider's network and back."""


LINES = {
    # half of the 677 Mbit/s that subscribers buy in both directions (OpenVault 2025) reaches a PC: assumed
    "fibre": Line(0.349, 340 * MBIT, 340 * MBIT, 0.7, 0.006),
    # 200 to 400 Mbit/s is the tier of most (OpenVault 2022), and 17.3 Mbit/s their mean upload (OpenVault 2025)
    "cable": Line(0.324, 300 * MBIT, 17.3 * MBIT, 0.5, 0.016),
    # between ADSL's 20 / 1 and the 80 / 20 Mbit/s of VDSL: assumed
    "dsl": Line(0.270, 50 * MBIT, 10 * MBIT, 0.5, 0.025),
    # fixed wireless and satellites: the rest of the subscribers; speeds and delay are assumed
    "wireless": Line(0.057, 100 * MBIT, 12 * MBIT, 0.7, 0.040),
}
"""Shares by OECD 2021. Round trips are assumed, about the world's median of 10 ms to the next test server (Ookla)."""


@dataclass(frozen=True)
class Region:
    """Where volunteers live. Shares and delays are assumed."""

    share: float
    utc_offset_h: int
    rtt_s: float
    """Seconds from the region's providers to the core. The sum for two regions is a round trip between them."""


REGIONS = {
    "Europe": Region(0.45, 1, 0.012),
    "eastern America": Region(0.22, -5, 0.040),
    "western America": Region(0.13, -8, 0.065),
    "eastern Asia": Region(0.14, 8, 0.090),
    "Australia": Region(0.06, 10, 0.120),
}

CORES = {2: 0.09, 4: 0.34, 6: 0.34, 8: 0.18, 12: 0.05}
"""The shares of machines by their number of cores. Steam: 4 cores a third, 6 cores 34.2%, 8 cores 18.5%, 12 cores 4.6%;
the rest is taken to have two.
"""
CORE_SIGMA = 0.35
"""The standard deviation of the logarithm of a core's speed. Log-normal by Heien 2012, the width is assumed."""
ROWS_PER_CORE_S = 5_600.0
"""Rows of one expert, a Transformer layer of hidden 256, that a core takes forward and backward in a second: 21.8
sequences of 128 tokens, four experts each, on two cores (`benchmarks.moe`)."""
MEMORY_GIB = {4: 0.12, 8: 0.35, 16: 0.43, 32: 0.10}
"""Assumed, with a mean between the 11.4 GB of Anderson 2020 and the 16 GB that most have in Steam's survey."""
DISK_BYTES, DISK_SIGMA = 60e9, 1.0
"""Free disk space is log-normal (Heien 2012). Median and width are assumed."""


class Habit(Enum):
    """When a volunteer's machine takes part."""

    ALWAYS = "always"
    """It is left on."""
    DAILY = "daily"
    """Its owner switches it on to use it, and it works alongside."""
    IDLE = "idle"
    """It is left on, and works while nobody uses it."""


HABITS = {Habit.ALWAYS: 0.60, Habit.DAILY: 0.25, Habit.IDLE: 0.15}
"""Assumed so that machines are online four fifths of the time: those of SETI@home were on for 0.81 of it (Anderson
2006). Most work while they are used, because BOINC's default is to do so (its PrefsReference). Javadi 2011 found that
21% of 230,000 hosts were online at truly random times.
"""

SESSION_SHAPE = 0.38
"""Weibull shape for the sessions of machines that are left on: Stutzbach 2006 for BitTorrent (Debian), where most are
short and a few last for weeks. Steiner 2009 found Weibull distributions in KAD too.
"""
SESSION_MEAN_S = 72 * HOUR_S
"""Assumed: people who leave a machine on for others restart it, or take it for themselves, every few days."""
BREAK_MEAN_S = 3 * HOUR_S
"""Assumed; exponential."""
CRASHES_PER_DAY = 0.05
"""Crashes of a machine that takes part: power cuts, lost lines, killed processes. Assumed. Together with the machines
that fall asleep, about a fifth of all nodes disappears without notice each day, which is the most that the project aims
to withstand.
"""
CRASHED_S, CRASHED_SIGMA = 1200.0, 1.5
"""Median of the time until a crashed machine is back, log-normal. Assumed."""
SLEEPS = 0.6
"""The share of daily machines that fall asleep when their owner leaves; the others are shut down. Assumed."""
ON_AT_H = {False: 17.0, True: 10.5}
"""The local time at which a daily machine is switched on, by whether it is a weekend. Assumed, like the next two."""
OFF_AT_H = 23.0
CLOCK_SIGMA_H = 1.5
USED_SHARE = 0.85
"""The share of days on which a daily machine is used."""
RETURNS_PER_H = {False: 0.08, True: 0.4}
"""How often an hour the owner of an idle machine comes to use it, by whether people do so at that time."""
USED_MEAN_S = 45 * 60.0


@dataclass(frozen=True, slots=True)
class Volunteer:
    """One volunteer's machine."""

    line: str
    up_bps: float
    down_bps: float
    rtt_s: float
    """Seconds to the core. The sum for two volunteers is the round trip between them."""
    nat: bool
    """Whether it can be reached only through a relay or a punched hole."""
    cores: int
    rows_per_s: float
    """Rows per second of the standard expert, forward and backward."""
    memory: float
    """Bytes of memory."""
    disk: float
    """Free bytes on the disk."""
    is_slow: bool
    is_hostile: bool
    habit: Habit
    falls_asleep: bool
    """Whether it falls asleep when its owner leaves, instead of being shut down."""
    utc_offset_h: int


class Ending(Enum):
    """How a session ends."""

    LEAVE = "leave"
    """An orderly end: what it hosts is handed over."""
    CRASH = "crash"
    """Without notice. The machine comes back with what is on its disk."""
    SLEEP = "sleep"
    """Without notice. The machine wakes up with all that it had in memory."""


@dataclass(frozen=True, slots=True)
class Session:
    """A time in which a machine takes part, in seconds since the start of the simulation."""

    start_s: float
    end_s: float
    ending: Ending


def draw_population(rng: random.Random, count: int) -> list[Volunteer]:
    """Draws independent volunteers. The numbers of slow and hostile ones and of those behind NAT are exact, after
    rounding.
    """
    drawn = [_draw(rng) for _ in range(count)]
    for n in rng.sample(range(count), round(NAT_SHARE * count)):
        drawn[n] = replace(drawn[n], nat=True)
    for n in rng.sample(range(count), round(SLOW_SHARE * count)):
        drawn[n] = _slowed(drawn[n])
    for n in rng.sample(range(count), round(HOSTILE_SHARE * count)):
        drawn[n] = replace(drawn[n], is_hostile=True)
    return drawn


def sessions(rng: random.Random, volunteer: Volunteer, hours: float) -> Iterator[Session]:
    """The sessions that overlap the first `hours`, in order and without overlaps.

    The first may have begun before the start, and the last may end later.
    """
    warm_up_h = 7 * DAY_H
    planned = _PLANNED[volunteer.habit](rng, volunteer, -warm_up_h * HOUR_S, hours * HOUR_S)
    for session in _with_crashes(rng, planned):
        if session.end_s > 0 and session.start_s < hours * HOUR_S:
            yield session


def _draw(rng: random.Random) -> Volunteer:
    name = _pick(rng, {name: line.share for name, line in LINES.items()})
    region = REGIONS[_pick(rng, {name: region.share for name, region in REGIONS.items()})]
    line, cores = LINES[name], _pick(rng, CORES)
    speed = rng.lognormvariate(0.0, line.sigma)
    return Volunteer(
        line=name,
        up_bps=line.up_bps * speed,
        down_bps=line.down_bps * speed,
        rtt_s=(line.rtt_s + region.rtt_s) * rng.lognormvariate(0.0, 0.2),
        nat=False,
        cores=cores,
        rows_per_s=ROWS_PER_CORE_S * cores * rng.lognormvariate(0.0, CORE_SIGMA),
        memory=_pick(rng, MEMORY_GIB) * GIB,
        disk=rng.lognormvariate(math.log(DISK_BYTES), DISK_SIGMA),
        is_slow=False,
        is_hostile=False,
        habit=_pick(rng, HABITS),
        falls_asleep=rng.random() < SLEEPS,
        utc_offset_h=region.utc_offset_h,
    )


def _slowed(volunteer: Volunteer) -> Volunteer:
    up_bps = min(volunteer.up_bps, SLOW_UP_BPS)
    return replace(volunteer, is_slow=True, up_bps=up_bps, rows_per_s=volunteer.rows_per_s * SLOWNESS)


def _pick(rng: random.Random, shares: Mapping[T, float]) -> T:
    (picked,) = rng.choices([*shares], [*shares.values()])
    return picked


def is_weekend(time_s: float, utc_offset_h: int) -> bool:
    """Whether it is the weekend where the volunteer lives."""
    local_h = time_s / HOUR_S + utc_offset_h
    return (WEEKDAY_OF_START + int(local_h // DAY_H)) % 7 >= 5


def is_used_hour(time_s: float, utc_offset_h: int) -> bool:
    """Whether people use their machines at that time: in the evening, and in the daytime at weekends."""
    hour = (time_s / HOUR_S + utc_offset_h) % DAY_H
    return (10 if is_weekend(time_s, utc_offset_h) else 17) <= hour < 23


def _always(rng: random.Random, _: Volunteer, start_s: float, end_s: float) -> Iterator[Session]:
    scale_s = SESSION_MEAN_S / math.gamma(1 + 1 / SESSION_SHAPE)
    time_s = start_s
    while time_s < end_s:
        length_s = rng.weibullvariate(scale_s, SESSION_SHAPE)
        yield Session(time_s, time_s + length_s, Ending.LEAVE)
        time_s += length_s + rng.expovariate(1 / BREAK_MEAN_S)


def _daily(rng: random.Random, volunteer: Volunteer, start_s: float, end_s: float) -> Iterator[Session]:
    ending = Ending.SLEEP if volunteer.falls_asleep else Ending.LEAVE
    free_s = start_s
    for day in range(int(start_s // (DAY_H * HOUR_S)), math.ceil(end_s / (DAY_H * HOUR_S)) + 1):
        midnight_s = (day * DAY_H - volunteer.utc_offset_h) * HOUR_S
        noon_s = midnight_s + DAY_H * HOUR_S / 2
        on_h = rng.gauss(ON_AT_H[is_weekend(noon_s, volunteer.utc_offset_h)], CLOCK_SIGMA_H)
        off_h = rng.gauss(OFF_AT_H, CLOCK_SIGMA_H)
        on_s, off_s = max(free_s, midnight_s + on_h * HOUR_S), midnight_s + off_h * HOUR_S
        if rng.random() < USED_SHARE and off_s > on_s:
            yield Session(on_s, off_s, ending)
            free_s = off_s


def _idle(rng: random.Random, volunteer: Volunteer, start_s: float, end_s: float) -> Iterator[Session]:
    """The owner's visits are a Poisson process whose rate depends on the hour; it is drawn by thinning one with the
    highest rate.
    """
    most = max(RETURNS_PER_H.values()) / HOUR_S
    time_s = began_s = start_s
    while time_s < end_s:
        time_s += rng.expovariate(most)
        rate = RETURNS_PER_H[is_used_hour(time_s, volunteer.utc_offset_h)] / HOUR_S
        if rng.random() < rate / most:
            yield Session(began_s, time_s, Ending.LEAVE)
            time_s = began_s = time_s + rng.expovariate(1 / USED_MEAN_S)
    yield Session(began_s, max(began_s, time_s), Ending.LEAVE)


_PLANNED = {Habit.ALWAYS: _always, Habit.DAILY: _daily, Habit.IDLE: _idle}


def _with_crashes(rng: random.Random, planned: Iterator[Session]) -> Iterator[Session]:
    """Cuts sessions into pieces by crashes. If the machine is back before a session was to end, the
    session continues.
    """
    per_s = CRASHES_PER_DAY / (DAY_H * HOUR_S)
    for session in planned:
        start_s = session.start_s
        while (crash_s := start_s + rng.expovariate(per_s)) < session.end_s:
            yield Session(start_s, crash_s, Ending.CRASH)
            start_s = crash_s + rng.lognormvariate(math.log(CRASHED_S), CRASHED_SIGMA)
        if start_s < session.end_s:
            yield Session(start_s, session.end_s, session.ending)
