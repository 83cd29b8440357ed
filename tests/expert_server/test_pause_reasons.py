"""Why a node pauses: the hour, the battery, other programs, and first of all what its owner says."""

import os
import threading
from collections.abc import Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expert_server.pauses import (
    BUSY_AFTER_S,
    IDLE_AFTER_S,
    Load,
    LoadMonitor,
    Machine,
    MachineState,
    OwnerOverride,
    PauseCause,
    paused_in_words,
    reasons_to_pause,
)
from expert_server.settings import NodeSettings

BUSY_PERCENT = 25
"""The load from which a machine counts as busy. So 10% is idle."""
BOTH_WINDOWS_S = BUSY_AFTER_S + IDLE_AFTER_S
MONDAY_NOON = datetime(2026, 6, 1, 12, 0)

looks = st.lists(st.tuples(st.floats(0.1, 60), st.floats(0, 100)), min_size=1, max_size=60)
"""For each look: the seconds since the last one, and the load in them."""


def loads(steps: Sequence[tuple[float, float]]) -> list[Load]:
    found, now = [], 0.0
    for seconds, percent in steps:
        found.append(Load(now, now + seconds, percent))
        now += seconds
    return found


def noted(use: LoadMonitor, steps: Sequence[tuple[float, float]]) -> list[bool]:
    return [use.note(load) for load in loads(steps)]


# Other programs


@given(looks)
def test_it_changes_no_faster_than_its_windows(steps: list[tuple[float, float]]) -> None:
    use, changed_at = LoadMonitor(BUSY_PERCENT), 0.0
    for load in loads(steps):
        before = use.busy
        if use.note(load) is not before:
            window_s = IDLE_AFTER_S if before else BUSY_AFTER_S
            assert load.end - changed_at >= window_s - 1e-6
            changed_at = load.end


@given(looks, st.floats(25, 100), st.floats(1, 5))
def test_a_load_that_stays_high_makes_it_busy(
    steps: list[tuple[float, float]], percent: float, seconds: float
) -> None:
    """This holds whatever came before, which may make it idle for a while first."""
    steps = [*steps, *[(seconds, percent)] * (int(BOTH_WINDOWS_S / seconds) + 4)]
    assert noted(LoadMonitor(BUSY_PERCENT), steps)[-1]


@given(looks, st.floats(0, 10), st.floats(1, 5))
@example([(10.0, 25.0)], 10.0, 1.4470092889770818)
def test_a_load_that_stays_low_makes_it_idle(
    steps: list[tuple[float, float]], percent: float, seconds: float
) -> None:
    steps = [*steps, *[(seconds, percent)] * (int(BOTH_WINDOWS_S / seconds) + 4)]
    assert not noted(LoadMonitor(BUSY_PERCENT), steps)[-1]


@given(st.booleans(), st.lists(st.tuples(st.floats(0.1, 60), st.floats(11, 24)), min_size=1, max_size=60))
def test_between_the_thresholds_it_stays_as_it_is(busy: bool, steps: list[tuple[float, float]]) -> None:
    use = LoadMonitor(BUSY_PERCENT)
    use.busy = busy
    assert set(noted(use, steps)) == {busy}


def test_a_short_burst_is_no_reason() -> None:
    assert not any(noted(LoadMonitor(BUSY_PERCENT), [(2, 0)] * 10 + [(2, 100)] + [(2, 0)] * 10))


@given(looks)
def test_it_remembers_no_more_than_its_window(steps: list[tuple[float, float]]) -> None:
    use = LoadMonitor(BUSY_PERCENT)
    for load in loads(steps * 5):
        use.note(load)
        assert all(old.end > load.end - IDLE_AFTER_S for old in use._loads)


def test_the_machine_tells_others_load_from_its_own() -> None:
    """This process keeps one core busy. Other processes may be busy too, but its own load must not count as theirs."""
    machine = Machine(NodeSettings(only_when_idle=True))
    before = psutil.cpu_times()
    own = sum(psutil.Process().cpu_times()[:2])
    while sum(psutil.Process().cpu_times()[:2]) < own + 0.5:
        sum(range(10_000))
    load = machine._load()
    after = psutil.cpu_times()
    busy = sum(after) - sum(before) - (after.idle - before.idle) - (after.iowait - before.iowait)
    share_of_all = 100 * busy / max(sum(after) - sum(before), 1e-9)
    own_share = 100 * 0.5 / ((load.end - load.start) * (os.cpu_count() or 1))
    assert 0 <= load.percent <= max(0.0, share_of_all - own_share) + 10


@pytest.mark.parametrize(
    ("battery", "told"),
    [
        (None, False),
        (SimpleNamespace(power_plugged=True), False),
        (SimpleNamespace(power_plugged=None), False),
        (SimpleNamespace(power_plugged=False), True),
    ],
)
def test_only_a_machine_that_says_so_is_on_battery(
    monkeypatch: pytest.MonkeyPatch, battery: Any, told: bool
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery)
    assert Machine(NodeSettings(not_on_battery=True)).look().on_battery is told
    assert not Machine(NodeSettings()).look().on_battery


# Reasons


@given(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_what_the_owner_did_not_ask_for_is_no_reason(
    hours: bool, idle: bool, plugged: bool, on_battery: bool, busy: bool
) -> None:
    schedule = "22:00-07:00" if hours else None
    settings = NodeSettings.load(only_when_idle=idle, not_on_battery=plugged, schedule=schedule)
    found = reasons_to_pause(settings, MONDAY_NOON, MachineState(on_battery, busy))
    assert (PauseCause.SCHEDULE in found) is hours
    assert (PauseCause.BATTERY in found) is (plugged and on_battery)
    assert (PauseCause.BUSY in found) is (idle and busy)


def test_reasons_are_words_for_people() -> None:
    settings = NodeSettings.load(schedule="22:00-07:00", only_when_idle=True, not_on_battery=True)
    all_reasons = reasons_to_pause(settings, MONDAY_NOON, MachineState(on_battery=True, busy=True))
    assert paused_in_words(list(all_reasons.values())) == (
        "paused: until 22:00; on battery; while other programs need the machine"
    )
    (until,) = reasons_to_pause(settings, MONDAY_NOON, MachineState()).values()
    assert paused_in_words([until]) == "paused until 22:00"
    assert paused_in_words(["on battery"]) == "paused: on battery"
    assert not reasons_to_pause(settings, MONDAY_NOON.replace(hour=23), MachineState())


# What the owner says

causes = st.dictionaries(st.sampled_from(PauseCause), st.sampled_from(["so", "or so"]))


@given(st.lists(causes, max_size=10), causes)
def test_a_pause_by_the_owner_holds_whatever_the_settings_say(
    before: list[dict[PauseCause, str]], reasons: dict[PauseCause, str]
) -> None:
    word = OwnerOverride()
    word.resume(before[0] if before else ())
    word.pause("by its owner")
    for moment, found in enumerate([*before, reasons]):
        assert word.judge(found, moment) == ["by its owner", *found.values()]


@given(causes, causes)
def test_going_on_sets_aside_the_reasons_of_that_moment_and_no_others(
    now: dict[PauseCause, str], later: dict[PauseCause, str]
) -> None:
    word = OwnerOverride()
    word.pause("by its owner")
    word.resume(now)
    assert word.judge(now, 0) == []
    assert word.overridden(now) == list(now.values())
    assert word.judge(later, 1) == [words for cause, words in later.items() if cause not in now]


@given(causes)
def test_a_reason_that_comes_back_counts_again(now: dict[PauseCause, str]) -> None:
    word = OwnerOverride()
    word.resume(now)
    assert word.judge({}, 0) == []
    assert word.judge(now, 1) == list(now.values())


def test_a_pause_for_a_time_ends_and_the_settings_hold_again() -> None:
    word = OwnerOverride()
    word.pause("by its owner until 18:30", until=100)
    assert word.judge({}, 99) == ["by its owner until 18:30"]
    assert word.judge({PauseCause.BATTERY: "on battery"}, 100) == ["on battery"]
    assert word.judge({}, 101) == []


def test_the_last_word_counts() -> None:
    word = OwnerOverride()
    word.pause("for a while", until=100)
    word.pause("for good")
    assert word.judge({}, 1000) == ["for good"]
    word.resume(())
    word.pause("for a while", until=2000)
    assert word.judge({}, 1999) == ["for a while"]
    assert word.judge({}, 2000) == []


def test_looking_starts_no_threads() -> None:
    before = threading.active_count()
    Machine(NodeSettings(only_when_idle=True, not_on_battery=True)).look()
    assert threading.active_count() == before
