"""Work that waits for many peers goes on a few at a time."""

import asyncio

import pytest

from peer.errors import UnreachableError
from peer.loop import LoopThread, side_by_side


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

    loop.run(scenario(), 20)


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

    loop.run(scenario(), 20)
