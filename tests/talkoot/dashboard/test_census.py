"""Which peers are live, which have gone, and how fast things happen, by this machine's clock only."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_readings import NOW, node, peer, trainer

from dht.admission import Grant, Role
from dht.announcements import NodeInfo, TrainerInfo
from talkoot.dashboard.picture import CallRateMeter, CallRates, Census


def census(most: int = 100, most_gone: int = 10, kept_s: float = 86400.0) -> Census[NodeInfo]:
    return Census(most, most_gone, kept_s)


def test_a_node_is_live_while_it_renews_its_record() -> None:
    seen = census()
    for round_number in range(20):
        now = NOW + 10.0 * round_number
        seen.note({peer(1): node(1, expires_at=now + 30)}, now)
        assert seen.live().keys() == {peer(1)}


def test_a_killed_node_has_gone_within_two_periods() -> None:
    """Its record stays in the DHT for up to three periods."""
    seen, record = census(), node(1, expires_at=NOW + 30, renew_every_s=10.0)
    gone_at = math.nan
    for tick in range(15):
        now = NOW + 2.0 * tick
        seen.note({peer(1): record}, now)
        if not seen.live():
            gone_at = now
            break
    assert 15 < gone_at - NOW <= 20
    assert seen.seen[peer(1)].seen_at == NOW


@pytest.mark.parametrize(("revoked", "now"), [((7,), NOW + 1), ((), NOW + 500)])
def test_a_node_whose_invite_no_longer_admits_it_has_left(revoked: tuple[int, ...], now: float) -> None:
    seen, grant = census(), Grant("sauna-x", Role.NODE, NOW + 500, 7, bytes(32))
    seen.note(
        {peer(1): node(1, grant=grant, renew_every_s=1000.0), peer(2): node(2, renew_every_s=1000.0)}, NOW
    )
    seen.note({}, now, revoked=revoked)
    assert list(seen.live()) == [peer(2)]
    assert (seen.seen[peer(1)].left, seen.seen[peer(1)].seen_at) == (True, now)
    renewed = node(1, grant=replace(grant, serial=8, expires_at=NOW + 5000), expires_at=now + 30)
    seen.note({peer(1): renewed}, now + 1, revoked=revoked)
    assert peer(1) in seen.live()


def test_a_node_that_comes_back_is_live_again() -> None:
    seen = census()
    seen.note({peer(1): node(1, expires_at=NOW)}, NOW)
    seen.note({}, NOW + 100)
    assert not seen.live()
    seen.note({peer(1): node(1, expires_at=NOW + 200)}, NOW + 101)
    assert seen.live()


def test_a_node_that_says_it_leaves_is_not_there_at_once_and_may_come_back() -> None:
    seen, goodbye = census(), node(1, started_at=0.0, left=True, expires_at=NOW + 60)
    seen.note({}, NOW, {peer(2): goodbye})
    assert not seen.seen, "who was never there has not left"
    seen.note({peer(1): node(1)}, NOW)
    for now in (NOW + 1, NOW + 100):
        seen.note({}, now, {peer(1): goodbye})
        assert not seen.live()
        assert (seen.seen[peer(1)].gone, seen.seen[peer(1)].left) == (True, True)
        assert seen.seen[peer(1)].info.name == "volunteer 1"
        assert seen.seen[peer(1)].seen_at == NOW + 1
    seen.note({peer(1): node(1, expires_at=NOW + 200)}, NOW + 101)
    assert seen.live()
    seen.note({}, NOW + 300)
    assert (seen.seen[peer(1)].gone, seen.seen[peer(1)].left) == (True, False)


def test_a_node_that_dies_has_gone_although_the_clock_was_set_back() -> None:
    seen = census()
    seen.note({peer(1): node(1)}, NOW + 3600)
    for now in (NOW, NOW + 16):
        seen.note({peer(1): node(1)}, now)
    assert not seen.live()
    seen.note({}, NOW + 3600)
    assert seen.seen[peer(1)].seen_at == NOW


def test_one_reading_that_misses_a_record_takes_nobody_away() -> None:
    seen = census()
    seen.note({peer(1): node(1)}, NOW)
    seen.note({}, NOW + 2)
    assert seen.live()


@given(st.floats(-1e6, 1e6))
def test_clocks_of_others_do_not_matter(skew_s: float) -> None:
    seen = census()
    seen.note({peer(1): node(1, expires_at=NOW + skew_s)}, NOW)
    assert seen.live()
    seen.note({peer(1): node(1, expires_at=NOW + skew_s)}, NOW + 16)
    assert not seen.live()


def test_the_longest_gone_are_forgotten_and_all_after_a_while() -> None:
    seen = census(most_gone=3, kept_s=1000)
    for number in range(8):
        seen.note({peer(number): node(number)}, NOW + number)
    seen.note({}, NOW + 100)
    assert seen.seen.keys() == {peer(5), peer(6), peer(7)}
    seen.note({}, NOW + 1006)
    assert seen.seen.keys() == {peer(6), peer(7)}


def test_a_crowd_takes_no_more_room_than_it_may() -> None:
    seen = census(most=5, most_gone=2)
    for start in (0, 1000, 2000):
        seen.note({peer(n): node(n) for n in range(start, start + 500)}, NOW + start)
    assert len(seen.seen) <= 7


def rates_of(*moments: tuple[float, list[TrainerInfo]]) -> CallRates:
    training: Census[TrainerInfo] = Census(100, 10)
    meter, rates = CallRateMeter(), CallRates()
    for now, trainers in moments:
        training.note({info.peer_id: info for info in trainers}, now)
        rates = meter.note(training)
    return rates


def test_pace_is_of_counters_between_two_records() -> None:
    first = trainer(1, calls=10, bytes_sent=100, bytes_received=100, failures={"unavailable": 1})
    later = replace(
        first, calls=30, bytes_sent=300, bytes_received=400, failures={"unavailable": 3}, expires_at=NOW + 40
    )
    assert rates_of((NOW, [first])) == CallRates()
    rates = rates_of((NOW, [first]), (NOW + 10, [later]))
    assert (rates.calls_per_s, rates.bytes_per_s) == (2.0, 50.0)
    assert rates.failures_per_min == {"unavailable": pytest.approx(12.0)}


def test_pace_stays_until_the_next_record_and_ends_with_the_trainer() -> None:
    first = trainer(1, calls=10)
    later = replace(first, calls=30, expires_at=NOW + 40)
    assert rates_of((NOW, [first]), (NOW + 10, [later]), (NOW + 12, [later])).calls_per_s == 2.0
    assert rates_of((NOW, [first]), (NOW + 10, [later]), (NOW + 60, [])) == CallRates()


def test_pace_goes_on_after_the_clock_was_set_back() -> None:
    first = trainer(1, calls=0)
    records = [replace(first, calls=10 * n, expires_at=NOW + 40 + n) for n in range(4)]
    times = NOW + 3600, NOW + 3610, NOW, NOW + 20
    moments = [(now, [record]) for now, record in zip(times, records, strict=True)]
    assert rates_of(*moments[:3]).calls_per_s == 1.0, "as before"
    assert rates_of(*moments).calls_per_s == 0.5


def test_a_trainer_that_started_again_is_counted_anew() -> None:
    first = trainer(1, calls=1000)
    again = replace(first, calls=5, started_at=NOW, expires_at=NOW + 40)
    assert rates_of((NOW, [first]), (NOW + 10, [again])) == CallRates()


def test_all_trainers_count_together() -> None:
    first = [trainer(n, calls=0, failures={}) for n in range(3)]
    later = [replace(info, calls=10, failures={"internal": 1}, expires_at=NOW + 40) for info in first]
    rates = rates_of((NOW, first), (NOW + 10, later))
    assert rates.calls_per_s == pytest.approx(3.0)
    assert rates.failures_per_min == {"internal": pytest.approx(18.0)}
