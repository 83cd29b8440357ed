"""Bandwidth: never more than rate × time + burst, all of it when there is enough to send, and each caller gets its
turn.
"""

import asyncio
import random
import time
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.bounded import Owner
from peer.loop import LoopThread
from peer.rates import (
    BURST_S,
    Backoff,
    FairLock,
    FairTurns,
    Pace,
    RateLimit,
    RecentUse,
    SharedBudget,
    TokenBucket,
    TokenBuckets,
    upload_limit,
)

RATES = st.floats(1.0, 1e6)
STEPS = st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 1.0)), min_size=1, max_size=40)
"""Seconds until the next take, and its share of the burst."""


def play(rate: float, steps: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """When how many bytes pass. Each take waits before the next one, as in `RateLimit`."""
    burst = rate * BURST_S
    bucket, now = TokenBucket(rate, burst, 0.0), 0.0
    passed: list[tuple[float, float]] = []
    for pause, share in steps:
        now += pause
        size = int(share * burst)
        now += bucket.take(size, now)
        passed.append((now, size))
    return passed


@given(RATES, STEPS)
def test_in_no_window_passes_more_than_the_rate_and_one_burst(
    rate: float, steps: list[tuple[float, float]]
) -> None:
    passed = play(rate, steps)
    totals = [0.0, *accumulate(size for _, size in passed)]
    for first, (start, _) in enumerate(passed):
        for last, (end, _) in enumerate(passed[first:], start=first):
            most = rate * (end - start) + rate * BURST_S
            assert totals[last + 1] - totals[first] <= most * (1 + 1e-6) + 1e-6


@given(RATES, st.lists(st.floats(0.01, 1.0), min_size=1, max_size=40))
def test_who_always_has_something_to_send_gets_the_whole_rate(rate: float, shares: list[float]) -> None:
    passed = play(rate, [(0.0, share) for share in shares])
    total = sum(size for _, size in passed)
    assert passed[-1][0] == pytest.approx(max(0.0, total / rate - BURST_S), abs=1e-6 * len(shares))


@given(RATES, STEPS)
def test_time_never_goes_back_and_an_idle_bucket_lets_pass_at_once(
    rate: float, steps: list[tuple[float, float]]
) -> None:
    passed = play(rate, steps)
    assert all(before <= after for (before, _), (after, _) in pairwise(passed))
    bucket = TokenBucket(rate, rate * BURST_S, 0.0)
    bucket.take(int(rate * BURST_S), 0.0)
    assert bucket.take(int(rate * BURST_S), 2 * BURST_S) == 0.0


def test_what_did_not_pass_is_given_back() -> None:
    bucket = TokenBucket(100.0, 100.0, 0.0)
    bucket.take(100, 0.0)
    assert bucket.take(50, 0.0) == pytest.approx(0.5)
    bucket.give_back(50)
    assert bucket.take(100, 0.0) == pytest.approx(1.0)


def test_more_than_the_burst_passes_at_once_and_what_follows_waits_for_it() -> None:
    bucket = TokenBucket(10.0, 100.0, 0.0)
    assert bucket.take(0, 0.0) == 0.0
    assert bucket.take(500, 0.0) == pytest.approx(40.0)
    assert bucket.take(0, 30.0) == pytest.approx(10.0)
    assert bucket.take(0, 40.0) == bucket.take(100, 50.0) == 0.0


def test_each_key_has_a_bucket_and_those_used_last_are_remembered() -> None:
    buckets = TokenBuckets[str](2.0, 1.0, most=2)
    buckets.take("a", 4, 0.0)
    assert (buckets.wait_s("a", 0.0), buckets.wait_s("b", 0.0)) == (1.5, 0.0)
    assert (buckets.wait_s("a", 1.0), buckets.wait_s("a", 1.5)) == (0.5, 0.0)
    for key in "bc":
        buckets.take(key, 4, 0.0)
    assert (len(buckets), buckets.wait_s("a", 0.0), buckets.wait_s("c", 0.0)) == (2, 0.0, 1.5)


def test_without_a_rate_nothing_is_counted() -> None:
    buckets = TokenBuckets[str](None, 0.0)
    buckets.take("a", 10**9, 0.0)
    assert (len(buckets), buckets.wait_s("a", 0.0)) == (0, 0.0)


# Callers on an event loop


def test_without_a_limit_nobody_waits_and_bytes_are_counted(loop: LoopThread) -> None:
    async def scenario() -> int:
        rate = RateLimit(None)
        for _ in range(1000):
            await rate.take(10**9)
        return rate.bytes

    assert loop.run(scenario(), 120) == 10**12


def test_a_large_message_takes_the_time_that_it_must(loop: LoopThread) -> None:
    async def scenario() -> tuple[float, int]:
        rate = upload_limit(8.0)  # 1 MB/s, 200 kB at once
        begin = time.monotonic()
        await rate.take(500_000)
        return time.monotonic() - begin, rate.bytes

    seconds, passed = loop.run(scenario(), 120)
    assert passed == 500_000
    assert seconds >= 0.29


def test_a_short_message_does_not_wait_for_a_long_one_to_end(loop: LoopThread) -> None:
    async def scenario() -> list[str]:
        rate, ended = RateLimit(1e6), []

        async def send(name: str, size: int) -> None:
            await rate.take(size)
            ended.append(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(send("long", 600_000))
            group.create_task(send("longer", 700_000))
            for number in range(3):
                group.create_task(send(f"short {number}", 100))
        return ended

    assert loop.run(scenario(), 120) == ["short 0", "short 1", "short 2", "long", "longer"]


def test_who_gives_up_leaves_its_turn_and_its_bytes(loop: LoopThread) -> None:
    async def scenario() -> float:
        rate = RateLimit(1000.0)
        await rate.take(200)  # the burst
        sending = asyncio.create_task(rate.take(10**6))
        waiting = asyncio.create_task(rate.take(10**6))
        await asyncio.sleep(0)  # both have their turn, or wait for it
        for task in (waiting, sending):
            task.cancel()
        await asyncio.gather(sending, waiting, return_exceptions=True)
        begin = time.monotonic()
        async with asyncio.timeout(60):
            await rate.take(100)
        return time.monotonic() - begin

    assert loop.run(scenario(), 120) >= 0.08


def test_turns_beyond_the_rate_are_given_in_a_fair_order(loop: LoopThread) -> None:
    """A flood from many sources in one place delays neither a single caller elsewhere nor a second source in that
    place.
    """
    served: list[str] = []

    async def scenario() -> None:
        turns = FairTurns(200.0, 1.0)

        async def ask(near: str, source: str) -> None:
            if await turns.turn(near, source):
                served.append(source)

        flood = [asyncio.create_task(ask("flood", f"flood {n % 8}")) for n in range(400)]
        await asyncio.sleep(0)
        honest = [asyncio.create_task(ask(near, f"honest {near}")) for near in ("flood", "elsewhere")]
        await asyncio.gather(*flood, *honest)

    loop.run(scenario(), 60)
    first = served.index("honest elsewhere")
    assert first <= 5, "neighbourhoods take turns"
    assert served.index("honest flood") <= 8 + 5, "so do sources"
    assert len(served) <= 2 + 8 * 2 + 2, "the flood waits for itself, and no more of it than two a source"


def test_groups_take_turns_with_a_lock_and_one_that_goes_loses_it_for_nobody(loop: LoopThread) -> None:
    held: list[str] = []

    async def scenario() -> None:
        lock = FairLock()

        async def hold(group: str, name: str) -> None:
            async with lock.held_by(Owner(group, name)):
                held.append(name)
                await asyncio.sleep(0)

        async with lock.held_by(Owner.alone("first")):
            crowd = [asyncio.create_task(hold("crowd", f"crowd {number % 2}")) for number in range(6)]
            await asyncio.sleep(0)
            modest = [asyncio.create_task(hold("elsewhere", "modest")) for _ in range(2)]
            await asyncio.sleep(0)
            crowd[0].cancel()  # before it gets the lock
        modest[0].cancel()  # as it gets the lock
        await asyncio.gather(*crowd, *modest, return_exceptions=True)
        async with lock.held_by(Owner.alone("later")):
            held.append("later")

    loop.run(scenario(), 60)
    assert held == ["crowd 1", "modest", "crowd 0", "crowd 1", "crowd 0", "crowd 1", "later"]


def test_recent_use_halves_again_and_again_and_few_keys_are_remembered() -> None:
    use = RecentUse[str](10.0, most=2)
    use.add("anna", 8.0, 0.0)
    assert [use.of("anna", now) for now in (0.0, 10.0, 20.0)] == [8.0, 4.0, 2.0]
    use.add("anna", 1.0, 20.0)
    assert use.of("anna", 20.0) == 3.0
    assert use.of("bert", 20.0) == 0.0
    use.add("bert", 1.0, 20.0)
    use.add("carl", 1.0, 20.0)
    assert use.of("anna", 20.0) == 0.0


async def use_up(turns: FairTurns) -> None:
    """Takes all turns that are free at once."""
    while not turns._bucket.take(0, time.monotonic()):
        await turns.turn("here", "first")


def test_a_turn_is_not_lost_when_its_caller_goes(loop: LoopThread) -> None:
    async def scenario() -> None:
        turns = FairTurns(100.0, 1.0)
        await use_up(turns)
        gone = asyncio.create_task(turns.turn("here", "gone"))
        next_one = asyncio.create_task(turns.turn("here", "next"))
        await asyncio.sleep(0)
        gone.cancel()
        assert await asyncio.wait_for(next_one, 60)
        assert await asyncio.wait_for(turns.turn("here", "later"), 60)

    loop.run(scenario(), 60)


def test_the_rate_of_turns_holds_under_a_flood(loop: LoopThread) -> None:
    async def scenario() -> tuple[int, float]:
        turns = FairTurns(100.0, 10.0)
        given, began = 0, time.monotonic()

        async def keep_asking(source: str) -> None:
            nonlocal given
            while True:
                given += await turns.turn("here", source)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(keep_asking(str(n))) for n in range(20)]
        await asyncio.wait(tasks, timeout=0.5)
        for task in tasks:
            task.cancel()
        return given, time.monotonic() - began

    given, seconds = loop.run(scenario(), 60)
    assert 10 <= given <= seconds * 100 + 10 + 20


def test_too_many_that_wait_are_refused_at_once(loop: LoopThread) -> None:
    async def scenario() -> None:
        turns = FairTurns(0.1, 1.0, most=4, near=3, same=2)
        await use_up(turns)
        waiting = [asyncio.create_task(turns.turn(near, source)) for near, source in (("a", "1"), ("a", "1"))]
        await asyncio.sleep(0)
        assert not await turns.turn("a", "1"), "two of one source"
        waiting.append(asyncio.create_task(turns.turn("a", "2")))
        await asyncio.sleep(0)
        assert not await turns.turn("a", "3"), "three in one neighbourhood"
        waiting.append(asyncio.create_task(turns.turn("b", "4")))
        await asyncio.sleep(0)
        assert not await turns.turn("c", "5"), "four in all"
        for task in waiting:
            task.cancel()

    loop.run(scenario(), 60)


@given(
    RATES, st.floats(0.1, 60.0), st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.0, 1.0)), min_size=1)
)
def test_a_sender_at_the_least_rate_is_never_given_up(
    rate: float, grace_s: float, messages: list[tuple[int, float]]
) -> None:
    pace = Pace(rate, grace_s)
    for size, share in messages:
        took_s = share * size / rate
        assert took_s <= pace.limit_s(size)
        pace.note(size, took_s)
    assert grace_s <= pace.limit_s(0) * 1.001


@given(
    RATES, st.floats(0.1, 60.0), st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.0, 1.0)), min_size=1)
)
def test_no_sender_takes_longer_than_its_bytes_at_the_least_rate_and_the_grace(
    rate: float, grace_s: float, messages: list[tuple[int, float]]
) -> None:
    pace, took_s, size = Pace(rate, grace_s), 0.0, 0
    for expected, share in messages:
        seconds = share * pace.limit_s(expected)  # as long as it is waited for, at most
        pace.note(expected, seconds)
        took_s += seconds
        size += expected
        assert took_s <= (grace_s + size / rate) * 1.001
        assert pace.limit_s(0) <= grace_s, "nothing is saved up for a stall"


@pytest.mark.parametrize("comes_after_s", [0.0, 0.1])
@pytest.mark.parametrize("grace_s", [0.6, 2.0])
def test_a_sender_is_not_given_up_because_the_receiver_stood_still(
    loop: LoopThread, comes_after_s: float, grace_s: float
) -> None:
    async def scenario() -> None:
        pace, came = Pace(1.0, grace_s), asyncio.Event()

        async def message() -> bytes:
            await came.wait()
            return b""

        waiting = asyncio.create_task(pace.wait(message(), 0, len))
        await asyncio.sleep(0)
        time.sleep(grace_s)  # noqa: ASYNC251  # as when the machine sleeps or is busy
        asyncio.get_running_loop().call_later(comes_after_s, came.set)
        assert await waiting == b""
        assert pace.limit_s(0) == grace_s, "this was not the sender's fault"
        with pytest.raises(TimeoutError, match="it stalled"):
            await pace.wait(asyncio.sleep(60, b""), 0, len)

    loop.run(scenario(), 60)


def test_a_sender_that_stalls_is_given_up_though_the_receiver_stood_still(loop: LoopThread) -> None:
    async def scenario() -> None:
        waiting = asyncio.create_task(Pace(1.0, 0.3).wait(asyncio.sleep(60, b""), 0, len))
        await asyncio.sleep(0)
        time.sleep(1.0)  # noqa: ASYNC251  # the same
        with pytest.raises(TimeoutError, match="it stalled"):
            await waiting

    loop.run(scenario(), 30)


def take_all(budget: SharedBudget[str], key: str, now: float) -> int:
    taken = 0
    while budget.allows(key, now):
        budget.take(key, 1.0, now)
        taken += 1
    return taken


def test_a_shared_budget_holds_for_each_and_for_all() -> None:
    budget = SharedBudget[str](100.0, 20.0, burst_s=10.0)
    assert take_all(budget, "greedy", 0.0) in range(150, 201), "the burst of one"
    assert sum(take_all(budget, "greedy", n / 10) for n in range(1, 101)) in range(190, 251), "its rate"
    many = sum(take_all(budget, f"name {n}", 10.0) for n in range(1000))
    assert 1000 < many < 2 * 1000 + 200, "the burst of all, and a debt as large at most"


@pytest.mark.parametrize("count", [5, 20, 100])
def test_who_takes_little_from_a_shared_budget_passes_while_many_take_all_they_can(count: int) -> None:
    budget, rng, passed, taken = SharedBudget[str](1000.0, 250.0), random.Random(1), 0, 0.0
    for step in range(4000):
        now = step / 100
        callers = [f"greedy {n}" for n in range(count)] + ["modest"] * (step % 100 == 0)
        rng.shuffle(callers)
        for caller in callers:
            if budget.allows(caller, now):
                amount = 1.0 if caller == "modest" else 50.0
                budget.take(caller, amount, now)
                passed += caller == "modest"
                taken += amount
    assert passed == 40
    assert taken < 40 * 1000 + 2 * 16_000


def test_what_fails_again_and_again_is_held_back_for_twice_as_long_each_time() -> None:
    backoff, now = Backoff[str](5.0, 600.0), 100.0
    assert not backoff.holds_back("silent", now)
    for pause_s in (5, 10, 20, 40):
        backoff.failed("silent", now)
        backoff.failed("silent", now + 1)  # a try that was under way
        assert backoff.holds_back("silent", now + pause_s - 0.1)
        assert backoff.held_back(now + pause_s - 0.1) == {"silent"}
        assert not backoff.holds_back("another", now)
        now += pause_s
        assert not backoff.holds_back("silent", now)
        assert backoff.held_back(now) == set()
    backoff.succeeded("silent")
    backoff.failed("silent", now)
    assert backoff.holds_back("silent", now + 4.9)
    assert not backoff.holds_back("silent", now + 5)


def test_what_keeps_failing_is_tried_again_after_the_longest_pause() -> None:
    backoff, now = Backoff[str](5.0, 600.0), 0.0
    for _ in range(1000):
        backoff.failed("silent", now)
        now += 600
        assert not backoff.holds_back("silent", now)
    backoff.failed("silent", now)
    assert backoff.holds_back("silent", now + 599)


def test_a_pause_ends_after_the_share_that_is_drawn_and_still_doubles() -> None:
    backoff, now = Backoff[str](2.0, 300.0, jitter=lambda: 0.5), 0.0
    for pause_s in (1, 2, 4):
        backoff.failed("silent", now)
        assert backoff.holds_back("silent", now + pause_s - 0.1)
        now += pause_s
        assert not backoff.holds_back("silent", now)


@pytest.mark.parametrize("count", [10, 10_000])
def test_the_failures_that_are_remembered_are_bounded(count: int) -> None:
    backoff = Backoff[int](5.0, 600.0)
    for n in range(count):
        backoff.failed(n, 0.0)
    assert len(backoff.held_back(1.0)) == min(count, 4096)
