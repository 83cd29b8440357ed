"""Slots for calls are shared fairly by neighbourhood and caller, and callers cannot hold them by keeping a server
waiting.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest
from grpc import StatusCode

from peer.errors import ExpertError
from peer.rpc.gate import Requests, Slot, Slots


def slot(origin: str, caller: str, waits_since: float | None = None) -> Slot:
    task: Any = None
    return Slot(origin, caller, task, waits_since)


def test_a_caller_may_have_all_places_while_nobody_else_calls() -> None:
    slots = Slots(8)
    assert [slots.take(slot("here", "stranger"), 0.0) for _ in range(8)] == [None] * 8
    with pytest.raises(ExpertError) as refused:
        slots.take(slot("here", "stranger"), 0.0)
    assert refused.value.status is StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.retry_after_s > 0


def test_whoever_has_most_makes_room_for_others_up_to_a_fair_share() -> None:
    slots = Slots(8)
    for _ in range(8):
        slots.take(slot("here", "stranger"), 0.0)
    losers = [slots.take(slot("here", "trainer"), 0.0) for _ in range(4)]
    assert [loser is not None and loser.caller for loser in losers] == ["stranger"] * 4
    with pytest.raises(ExpertError):
        slots.take(slot("here", "trainer"), 0.0)
    assert len(slots) == 8


def test_many_keys_of_one_neighbourhood_have_one_share() -> None:
    slots = Slots(8)
    for number in range(8):
        slots.take(slot("here", f"stranger {number}"), 0.0)
    losers = [slots.take(slot("there", "trainer"), 0.0) for _ in range(4)]
    assert [loser is not None and loser.origin for loser in losers] == ["here"] * 4


def test_a_call_that_only_waits_for_its_caller_makes_room_first() -> None:
    slots = Slots(4)
    for number in range(4):
        slots.take(slot("here", f"stranger {number}", 10.0 if number == 2 else None), 10.0)
    with pytest.raises(ExpertError):
        slots.take(slot("here", "trainer"), 10.5)
    loser = slots.take(slot("here", "trainer"), 11.5)
    assert loser is not None
    assert (loser.caller, loser.lost) == ("stranger 2", True)


def test_calls_that_last_keep_their_places_while_they_wait() -> None:
    slots = Slots(4, patience_s=float("inf"))
    taken = [slot("here", f"peer {number}", 0.0) for number in range(4)]
    for each in taken:
        slots.take(each, 0.0)
    with pytest.raises(ExpertError):
        slots.take(slot("here", "newcomer"), 3600.0)
    for each in taken[1:3]:
        slots.release(each)
        slots.take(slot("here", "peer 0", 0.0), 0.0)
    loser = slots.take(slot("here", "newcomer"), 3600.0)
    assert loser is not None
    assert loser.caller == "peer 0", "whoever has several still makes room"


def test_a_place_that_was_lost_is_released_only_once() -> None:
    async def scenario() -> None:
        slots = Slots(1)
        first = slot("here", "stranger", 0.0)
        slots.take(first, 0.0)
        assert slots.take(slot("here", "trainer"), 5.0) is first
        slots.release(first)
        assert len(slots) == 1

    asyncio.run(scenario())


def test_a_read_that_has_begun_is_not_cancelled_with_its_call() -> None:
    """Otherwise gRPC would not free what it has read (issue 43360)."""

    async def scenario() -> None:
        arrives, ended = asyncio.Event(), asyncio.Event()

        async def requests() -> AsyncIterator[bytes]:
            await arrives.wait()
            ended.set()
            yield b"late"

        reading = asyncio.ensure_future(anext(Requests(requests(), slot("here", "me"), nullcontext())))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
        arrives.set()
        await asyncio.wait_for(ended.wait(), 60)

    asyncio.run(scenario())
