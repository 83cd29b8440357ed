"""An error that passes through a helper is freed with what it keeps, without the garbage collector.

An error keeps the frames that it came through. If one of them has a task or a future that ended with the error, both
stay in memory until the next collection of old objects. In a process with many objects, it may be hours away.
"""

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from collector import without_collector

from expert_server.serving.runtime import Runtime
from peer.errors import UnreachableError
from peer.loop import RetryingRounds, first_of, side_by_side


class Read:
    """What a stranger sent."""


class Reader:
    """Reads, and fails."""

    def __init__(self) -> None:
        self.read: list[weakref.ref[Read]] = []

    def __call__(self) -> None:
        read = Read()
        self.read.append(weakref.ref(read))
        raise UnreachableError("nobody answers")

    async def later(self) -> None:
        await asyncio.sleep(0)
        self()


async def in_runtime(reader: Reader) -> None:
    runtime = Runtime({}, max_queued_rows=1, max_batch_rows=1, threads=1)
    try:
        with suppress(UnreachableError):
            await runtime.run(reader)
    finally:
        await runtime.stop()


@pytest.mark.parametrize(
    "work",
    [
        lambda reader: first_of(reader.later(), asyncio.sleep(60)),
        lambda reader: side_by_side((reader.later() for _ in range(3)), 2),
        lambda reader: RetryingRounds(1.0).run("look", reader.later, reader.later),
        in_runtime,
    ],
    ids=["first_of", "side_by_side", "rounds", "runtime"],
)
def test_what_was_read_is_freed(work: Callable[[Reader], Awaitable[None]]) -> None:
    reader = Reader()

    async def scenario() -> None:
        with suppress(UnreachableError):
            await work(reader)

    with without_collector():
        asyncio.run(scenario())
        assert reader.read
        assert [read() for read in reader.read] == [None] * len(reader.read)
