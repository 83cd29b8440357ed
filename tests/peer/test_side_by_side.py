"""Work that waits for many peers is done for a few peers at a time."""

import asyncio
import contextlib

import pytest

from peer.errors import UnreachableError
from peer.loop import LoopThread, first_few, first_success, side_by_side


def test_one_that_waits_holds_no_other_up_and_only_a_few_run(loop: LoopThread) -> None:
    async def scenario() -> None:
        done, running, most, enough = list[int](), 0, 0, asyncio.Event()

        async def work(number: int) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await (enough.wait() if number == 0 else asyncio.sleep(0))
            running -= 1
            done.append(number)
            if len(done) == 9:
                enough.set()

        await side_by_side(map(work, range(10)), 3)
        assert done[-1] == 0
        assert done[:-1] == [*range(1, 10)]
        assert most == 3

    loop.run(scenario(), 60)


def test_the_first_exception_is_raised_as_it_is_and_ends_the_others(loop: LoopThread) -> None:
    async def scenario() -> None:
        waiting = asyncio.Event()

        async def work(number: int) -> None:
            if number == 1:
                raise UnreachableError("nobody answers")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                waiting.set()
                raise

        with pytest.raises(UnreachableError):
            await side_by_side(map(work, range(4)), 2)
        assert waiting.is_set()

    loop.run(scenario(), 60)


def test_a_few_results_are_enough_and_who_has_none_makes_room_for_the_next(loop: LoopThread) -> None:
    async def scenario() -> None:
        tried = list[int]()

        async def work(number: int) -> int | None:
            tried.append(number)
            await asyncio.sleep(0)
            return number if number % 2 else None

        assert sorted(await first_few(map(work, range(20)), 3, 20)) == [1, 3, 5]
        assert tried == [*range(6)]
        assert await first_few(map(work, range(0, 20, 2)), 3, 20) == []

    loop.run(scenario(), 60)


def test_once_there_is_one_result_the_others_get_so_much_longer(loop: LoopThread) -> None:
    async def scenario() -> None:
        ended = list[int]()

        async def work(number: int) -> int | None:
            try:
                await (asyncio.Event().wait() if number else asyncio.sleep(0.01))
            finally:
                ended.append(number)
            return number

        assert await first_few(map(work, range(5)), 3, 0.05) == [0]
        assert sorted(ended) == [0, 1, 2]

    loop.run(scenario(), 60)


def test_an_exception_of_a_few_is_raised_and_ends_the_others(loop: LoopThread) -> None:
    async def scenario() -> None:
        async def work(number: int) -> int | None:
            if number:
                raise UnreachableError("nobody answers")
            await asyncio.Event().wait()
            return None

        with pytest.raises(UnreachableError):
            await first_few(map(work, range(3)), 2, 20)

    loop.run(scenario(), 60)


def test_a_slow_work_goes_on_beside_the_next_and_late_results_are_dropped(loop: LoopThread) -> None:
    async def scenario() -> None:
        started, dropped, may_end = list[str](), list[str](), asyncio.Event()

        async def work(name: str) -> str | None:
            started.append(name)
            if name == "fails":
                return None
            if name == "hangs":
                await asyncio.Event().wait()
            if name in ("slow", "as slow"):
                await may_end.wait()
            if name == "last":
                may_end.set()
                await asyncio.Event().wait()
            return name

        names = ("fails", "hangs", "slow", "as slow", "last", "never")
        found = await first_success(map(work, names), 0.01, drop=dropped.append)
        assert started == [*names[:-1]]
        assert sorted([found or "", *dropped]) == ["as slow", "slow"]

    loop.run(scenario(), 60)


def test_no_work_has_a_head_start_after_one_that_failed(loop: LoopThread) -> None:
    async def scenario() -> None:
        async def work(number: int) -> int | None:
            return number or None

        assert await first_success(map(work, (0, 0, 3, 4)), 1e6) == 3
        assert await first_success(map(work, (0, 0)), 1e6) is None
        assert await first_success(map(work, ()), 1e6) is None

    loop.run(scenario(), 60)


def test_results_of_a_search_that_is_given_up_are_dropped(loop: LoopThread) -> None:
    async def scenario() -> None:
        dropped, started, are_started = list[int | None](), list[int](), asyncio.Event()

        async def work(number: int) -> int | None:
            started.append(number)
            if len(started) == 2:
                are_started.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return number  # it had just ended when it was cancelled

        search = asyncio.create_task(first_success(map(work, (1, 2)), 0.0, drop=dropped.append))
        await are_started.wait()
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        assert set(dropped) == {1, 2}

    loop.run(scenario(), 60)


def test_a_result_is_dropped_if_the_search_is_given_up_while_other_works_still_end(loop: LoopThread) -> None:
    async def scenario() -> None:
        dropped, is_ending, may_end = list[str | None](), asyncio.Event(), asyncio.Event()

        async def work(name: str) -> str | None:
            if name == "slow to end":
                try:
                    await asyncio.Event().wait()
                finally:
                    is_ending.set()
                    with contextlib.suppress(asyncio.CancelledError):
                        await may_end.wait()
            return name

        names = ("slow to end", "first")
        search = asyncio.create_task(first_success(map(work, names), 0.0, drop=dropped.append))
        await is_ending.wait()
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        assert dropped == ["first"]

    loop.run(scenario(), 60)
