"""A supervised task logs that it failed, and is started again."""

import asyncio
import logging

import pytest
from prometheus_client import Counter

from benchmarks.simulated_p2p import simulated_world
from peer.errors import StartError, UserError
from peer.loop import TaskSet, keep_running
from peer.metrics import total


def test_a_task_that_fails_is_logged_counted_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        restarts = Counter("restarts", "Of tasks.", registry=None)
        tasks, runs, well = TaskSet(restarts, first_pause_s=0.001), 0, asyncio.Event()

        async def announce() -> None:
            nonlocal runs
            runs += 1
            if runs < 3:
                raise KeyError("a mistake")
            well.set()
            await asyncio.Event().wait()

        tasks.supervise("announce this trainer", announce)
        async with asyncio.timeout(30):
            await well.wait()
        assert (runs, total(restarts)) == (3, 2)
        await tasks.aclose()
        await tasks.aclose()
        assert len(asyncio.all_tasks()) == 1

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert caplog.messages[0].startswith("could not announce this trainer")
    assert all(record.exc_info for record in caplog.records)


def test_after_a_long_good_run_a_task_begins_again_soon() -> None:
    async def scenario() -> None:
        now = asyncio.get_running_loop().time
        tasks, enough = TaskSet(), asyncio.Event()
        begun: list[float] = []
        failed: list[float] = []

        async def announce() -> None:
            begun.append(now())
            if len(begun) == 11:
                enough.set()
            await asyncio.sleep(0 if len(begun) < 8 else 61)
            failed.append(now())
            raise KeyError("a mistake")

        tasks.supervise("announce this trainer", announce)
        await enough.wait()
        await tasks.aclose()
        pauses = [round(began - before) for began, before in zip(begun[1:], failed, strict=False)]
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 1, 1, 1]

    with simulated_world() as loop:
        loop.run_until_complete(scenario())


def test_a_task_that_is_done_stays_so() -> None:
    async def scenario() -> None:
        restarts = Counter("restarts", "Of tasks.", registry=None)
        tasks, runs = TaskSet(restarts, first_pause_s=0.001), 0

        async def give_up() -> None:
            nonlocal runs
            runs += 1

        tasks.supervise("stay in the swarm", give_up)
        await asyncio.sleep(0.02)
        assert (runs, total(restarts)) == (1, 0)
        await tasks.aclose()

    asyncio.run(scenario())


def test_a_fatal_error_ends_the_task_and_other_errors_do_not() -> None:
    async def scenario() -> None:
        restarts, errors = (
            Counter("restarts", "Of tasks.", registry=None),
            [KeyError(), UserError(""), StartError("")],
        )

        async def announce() -> None:
            raise errors.pop(0)

        with pytest.raises(StartError):
            await keep_running("announce", announce, restarts, fatal=StartError, first_pause_s=0.001)
        assert total(restarts) == 2

    asyncio.run(scenario())
