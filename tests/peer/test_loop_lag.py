"""The lag of a loop: delays are noticed, and quantiles are weighted by time."""

import asyncio
import time

from loop_lags import LoopLags
from prometheus_client import CollectorRegistry

from peer.loop import LoopLag
from peer.metrics import total


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_stall_counts_for_as_long_as_it_lasted() -> None:
    async def scenario() -> None:
        metrics, clock = CollectorRegistry(), Clock()
        lag = LoopLag(metrics, clock)
        lag.start()
        lags = LoopLags(metrics)
        for _ in range(360):  # nine seconds in time
            clock.now += 0.025
            lag.tick()
        clock.now += 1.0  # and one second of silence
        lag.tick()
        lag.stop()
        assert abs(total(lag.seconds) - 400) <= 1
        assert lags.quantile(0.89) == 0.005, "nine tenths of the time it was in time"
        assert lags.quantile(0.99) == 1.0, "one ordinary mean of ticks would not see it"
        assert lag.longest_s > 0.97

    asyncio.run(scenario())


def test_the_longest_lag_is_forgotten_after_two_minutes() -> None:
    async def scenario() -> None:
        clock = Clock()
        lag = LoopLag(clock=clock)
        lag.start()
        clock.now += 5.0
        lag.tick()
        seen = []
        for _ in range(int(130 / 0.025)):
            clock.now += 0.025
            lag.tick()
            seen.append(lag.longest_s)
        lag.stop()
        assert seen[int(50 / 0.025)] > 4.9
        assert seen[-1] < 0.01

    asyncio.run(scenario())


def test_a_loop_that_is_held_is_seen() -> None:
    async def scenario() -> None:
        metrics = CollectorRegistry()
        lag = LoopLag(metrics)
        lag.start()
        lags = LoopLags(metrics)
        time.sleep(0.6)  # noqa: ASYNC251  # it holds the loop, which is what is tested
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if total(lag.seconds):
                break
        lag.stop()
        lag.stop()
        assert 0.5 < lag.longest_s < 5.0
        assert lags.quantile(1.0) > 0.5

    asyncio.run(scenario())
