"""Tasks are held until they are done, end with their owner, and report their failures."""

import asyncio
import logging
from typing import Any

import pytest

from peer.errors import UnreachableError
from peer.loop import TaskSet


async def for_ever() -> None:
    await asyncio.Event().wait()


async def end_at_once() -> None: ...


def test_closing_ends_what_still_runs() -> None:
    async def scenario() -> None:
        tasks = TaskSet()
        running = [tasks.spawn(for_ever(), "wait") for _ in range(3)]
        done = tasks.spawn(asyncio.sleep(0, "done"), "sleep")
        assert await done == "done"
        await asyncio.sleep(0)
        assert len(tasks) == 3
        await tasks.aclose()
        await tasks.aclose()
        assert all(task.cancelled() for task in running)
        assert not len(tasks)

    asyncio.run(scenario())


def test_closing_ends_what_was_started_meanwhile_too() -> None:
    async def scenario() -> None:
        tasks, late = TaskSet(), list[asyncio.Task[None]]()

        async def start_another() -> None:
            try:
                await for_ever()
            finally:
                late.append(tasks.spawn(for_ever(), "wait"))

        tasks.spawn(start_another(), "start another")
        await asyncio.sleep(0)
        await tasks.aclose()
        assert late[0].cancelled()
        assert not len(tasks)

    asyncio.run(scenario())


def test_closing_returns_when_a_task_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callback, which takes it out of the set, has not run yet."""

    def gather(*tasks: asyncio.Task[Any], return_exceptions: bool) -> asyncio.Future[list[Any]]:
        """As in Python 3.12 and later: awaiting tasks that have all ended lets no callback run."""
        done = asyncio.get_running_loop().create_future()
        if all(task.done() for task in tasks):
            done.set_result([])
            return done
        return gather_before(*tasks, return_exceptions=return_exceptions)

    async def scenario() -> None:
        tasks = TaskSet()
        ended = tasks.spawn(end_at_once(), "end")
        await asyncio.sleep(0)
        assert ended.done()
        assert len(tasks) == 1
        await tasks.aclose()
        assert not len(tasks)

    gather_before = asyncio.gather
    monkeypatch.setattr(asyncio, "gather", gather)
    asyncio.run(scenario())


def test_a_task_may_close_the_set_that_holds_it() -> None:
    async def scenario() -> None:
        tasks = TaskSet()
        other = tasks.spawn(for_ever(), "wait")
        closing = tasks.spawn(tasks.aclose(), "close")
        await asyncio.wait([closing], timeout=60)
        assert closing.done()
        assert other.cancelled()

    asyncio.run(scenario())


def test_a_mistake_is_logged_and_an_expected_error_is_left_to_the_waiter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(error: Exception) -> None:
        raise error

    async def scenario() -> None:
        tasks = TaskSet()
        mistake = tasks.spawn(fail(KeyError("a mistake")), "announce this trainer")
        expected = tasks.spawn(fail(UnreachableError("nobody")), "look around")
        await asyncio.wait([mistake, expected])
        assert not len(tasks)

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    (record,) = caplog.records
    assert record.getMessage().startswith("could not announce this trainer")
    assert record.exc_info is not None


def test_a_task_of_somebody_else_ends_with_the_others() -> None:
    async def scenario() -> None:
        tasks, inside = TaskSet(), asyncio.Event()

        async def callback() -> None:
            with tasks.including_current():
                inside.set()
                await for_ever()

        running = asyncio.create_task(callback())
        await inside.wait()
        assert len(tasks) == 1
        await tasks.aclose()
        assert running.cancelled()
        assert not len(tasks)

    asyncio.run(scenario())
