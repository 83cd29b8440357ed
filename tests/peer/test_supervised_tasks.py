"""A supervised task that fails is logged and started again."""

import asyncio
import logging

import pytest

from benchmarks.simulated_p2p import simulated_world
from peer.errors import StartError, UnreachableError, UserError
from peer.loop import Restarts, RetryingRounds, TaskSet, keep_running, tolerating
from peer.metrics import total


def test_a_task_that_fails_is_logged_counted_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        restarts = Restarts()
        tasks, runs, well = TaskSet(restarts, first_pause_s=0.001), 0, asyncio.Event()

        async def announce() -> None:
            nonlocal runs
            runs += 1
            if runs < 3:
                raise KeyError("a mistake")
            well.set()
            await asyncio.Event().wait()

        tasks.supervise("announce this trainer", announce)
        async with asyncio.timeout(60):
            await well.wait()
        assert (runs, total(restarts.count)) == (3, 2)
        await tasks.aclose()
        await tasks.aclose()
        assert len(asyncio.all_tasks()) == 1

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert caplog.messages[0].startswith("could not announce this trainer")
    assert all(record.exc_info for record in caplog.records)


def test_a_task_that_something_else_was_cancelled_for_is_started_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For example, gRPC cancels the calls of a channel that is closed, and so the tasks that wait for them."""

    async def scenario() -> None:
        tasks, begun = TaskSet(first_pause_s=0.001), asyncio.Queue[asyncio.Future[None]]()

        async def fetch() -> None:
            await begun.put(call := asyncio.get_running_loop().create_future())
            await call

        tasks.supervise("fetch a state", fetch)
        async with asyncio.timeout(60):
            (await begun.get()).cancel()
            await begun.get()
        await tasks.aclose()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())
    assert "could not fetch a state" in caplog.text


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
        restarts = Restarts()
        tasks, runs = TaskSet(restarts, first_pause_s=0.001), 0

        async def give_up() -> None:
            nonlocal runs
            runs += 1

        tasks.supervise("stay in the swarm", give_up)
        await asyncio.sleep(0.02)
        assert (runs, total(restarts.count)) == (1, 0)
        await tasks.aclose()

    asyncio.run(scenario())


def test_a_fatal_error_ends_the_task_and_other_errors_do_not() -> None:
    async def scenario() -> None:
        restarts, errors = Restarts(), [KeyError(), UserError(""), StartError("")]

        async def announce() -> None:
            raise errors.pop(0)

        with pytest.raises(StartError):
            await keep_running("announce", announce, restarts, fatal=StartError, first_pause_s=0.001)
        assert total(restarts.count) == 2

    asyncio.run(scenario())


def test_what_fails_in_one_step_keeps_no_other_from_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        restarts, done = Restarts(), list[str]()
        rounds = RetryingRounds(1.0, restarts=restarts)

        async def break_down() -> None:
            raise TypeError("a stranger's bytes")

        async def announce() -> None:
            done.append("announced")

        async def miss() -> None:
            raise UnreachableError("nobody answers")

        await rounds.run("look", break_down, announce, miss, announce)
        assert done == ["announced", "announced"]
        assert total(restarts.count) == 1
        assert rounds.are_failing

    asyncio.run(scenario())
    assert [record.exc_info is not None for record in caplog.records] == [True, False]


@pytest.mark.parametrize("failures", range(4))
def test_a_round_in_which_the_dht_did_not_answer_is_tried_once_more(failures: int) -> None:
    async def scenario() -> None:
        restarts, done = Restarts(), list[str]()
        rounds = RetryingRounds(0.001, restarts=restarts)

        async def break_down() -> None:
            done.append("broken")
            raise TypeError("a stranger's bytes")

        async def announce() -> None:
            done.append("announced")
            if done.count("announced") <= failures:
                raise UnreachableError("nobody answers")

        async def publish() -> None:
            done.append("published")

        await rounds.insist("announce", break_down, announce, publish)
        assert done == min(failures + 1, 2) * ["broken", "announced", "published"]
        assert rounds.are_failing is (failures >= 2)

    asyncio.run(scenario())


def test_an_expected_error_passes_and_an_unexpected_one_is_counted() -> None:
    restarts = Restarts()
    with pytest.raises(UnreachableError), tolerating("look around", restarts):
        raise UnreachableError("nobody answers")
    with tolerating("look around", restarts):
        raise RecursionError
    assert total(restarts.count) == 1


def test_a_task_that_fails_too_often_is_named_until_it_runs_well() -> None:
    now = 0.0
    restarts = Restarts(clock=lambda: now)
    for task, at in [("announce", 0.0), ("look", 1.0), ("announce", 300.0), ("announce", 600.0)]:
        assert not restarts.unsteady
        now = at
        restarts.note(task)
    assert restarts.unsteady == ("announce",)
    now = 899.0
    assert restarts.unsteady == ("announce",)
    now = 901.0
    assert not restarts.unsteady
