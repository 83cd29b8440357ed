"""A trainer's background tasks log that they failed, and are started again."""

import asyncio
import logging

import pytest
from prometheus_client import Counter

from benchmarks.simulated_p2p import simulated_world
from peer.loop import BackgroundTasks
from peer.metrics import total


def test_a_task_that_fails_is_logged_counted_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        restarts = Counter("restarts", "Of tasks.", registry=None)
        tasks, runs, well = BackgroundTasks(restarts, first_pause_s=0.001), 0, asyncio.Event()

        async def announce() -> None:
            nonlocal runs
            runs += 1
            if runs < 3:
                raise KeyError("a mistake")
            well.set()
            await asyncio.Event().wait()

        tasks.begin("announce this trainer", announce)
        async with asyncio.timeout(30):
            await well.wait()
        assert (runs, total(restarts)) == (3, 2)
        await tasks.end()
        await tasks.end()
        assert len(asyncio.all_tasks()) == 1

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert caplog.messages[0].startswith("could not announce this trainer")
    assert all(record.exc_info for record in caplog.records)


def test_after_a_long_good_run_a_task_begins_again_soon() -> None:
    async def scenario() -> None:
        now = asyncio.get_running_loop().time
        tasks, enough = BackgroundTasks(), asyncio.Event()
        begun: list[float] = []
        failed: list[float] = []

        async def announce() -> None:
            begun.append(now())
            if len(begun) == 11:
                enough.set()
            await asyncio.sleep(0 if len(begun) < 8 else 61)
            failed.append(now())
            raise KeyError("a mistake")

        tasks.begin("announce this trainer", announce)
        await enough.wait()
        await tasks.end()
        pauses = [round(began - before) for began, before in zip(begun[1:], failed, strict=False)]
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 1, 1, 1]

    with simulated_world() as loop:
        loop.run_until_complete(scenario())


def test_a_task_that_is_done_stays_so() -> None:
    async def scenario() -> None:
        restarts = Counter("restarts", "Of tasks.", registry=None)
        tasks, runs = BackgroundTasks(restarts, first_pause_s=0.001), 0

        async def give_up() -> None:
            nonlocal runs
            runs += 1

        tasks.begin("stay in the swarm", give_up)
        await asyncio.sleep(0.02)
        assert (runs, total(restarts)) == (1, 0)
        await tasks.end()

    asyncio.run(scenario())
