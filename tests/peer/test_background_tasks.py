"""What a trainer does beside training fails aloud, and begins again."""

import asyncio
import logging

import pytest

from benchmarks.simulated_p2p import simulated_world
from peer.loop import BackgroundTasks


def test_a_chore_that_fails_is_told_of_counted_and_begun_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        chores, runs, well = BackgroundTasks(first_pause_s=0.001), 0, asyncio.Event()

        async def announce() -> None:
            nonlocal runs
            runs += 1
            if runs < 3:
                raise KeyError("a mistake")
            well.set()
            await asyncio.Event().wait()

        chores.begin("announce this trainer", announce)
        async with asyncio.timeout(30):
            await well.wait()
        assert (runs, chores.failures) == (3, 2)
        await chores.end()
        await chores.end()
        assert len(asyncio.all_tasks()) == 1

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert caplog.messages[0].startswith("could not announce this trainer")
    assert all(record.exc_info for record in caplog.records)


def test_after_a_long_good_run_a_chore_begins_again_soon() -> None:
    async def scenario() -> None:
        now = asyncio.get_running_loop().time
        chores, enough = BackgroundTasks(), asyncio.Event()
        begun: list[float] = []
        failed: list[float] = []

        async def announce() -> None:
            begun.append(now())
            if len(begun) == 11:
                enough.set()
            await asyncio.sleep(0 if len(begun) < 8 else 61)
            failed.append(now())
            raise KeyError("a mistake")

        chores.begin("announce this trainer", announce)
        await enough.wait()
        await chores.end()
        pauses = [round(began - before) for began, before in zip(begun[1:], failed, strict=False)]
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 1, 1, 1]

    with simulated_world() as loop:
        loop.run_until_complete(scenario())


def test_a_chore_that_is_done_stays_so() -> None:
    async def scenario() -> None:
        chores, runs = BackgroundTasks(first_pause_s=0.001), 0

        async def give_up() -> None:
            nonlocal runs
            runs += 1

        chores.begin("stay in the swarm", give_up)
        await asyncio.sleep(0.02)
        assert (runs, chores.failures) == (1, 0)
        await chores.end()

    asyncio.run(scenario())
