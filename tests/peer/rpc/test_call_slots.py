"""Slots for calls are shared fairly by neighbourhood and caller, and callers cannot hold them by keeping a server
waiting.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import grpc
import pytest
from callers import numbered_identities, opened
from grpc import StatusCode
from relayed import CALLER, RELAY, SWARM, Served, closing, serve, until

from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from peer.rpc.gate import Requests, Slot, Slots
from peer.rpc.sessions import Metadata, SessionClient
from peer.wire import session_pb2

CREDIT = "talkoot.v1.CreditService"


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


def test_without_patience_others_displace_the_call_that_has_waited_longest() -> None:
    slots = Slots(4, patience_s=0.0)
    for number in range(4):
        slots.take(slot(f"place {number}", f"stranger {number}", 10.0 - number / 100), 10.0)
    loser = slots.take(slot("there", "newcomer", 10.01), 10.01)
    assert loser is not None
    assert loser.caller == "stranger 3"
    own = Slots(2, patience_s=0.0)
    for _ in range(2):
        own.take(slot("here", "stranger", 10.0), 10.0)
    with pytest.raises(ExpertError):
        own.take(slot("here", "stranger"), 10.5)


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


def test_silent_calls_from_many_places_keep_nobody_from_opening_a_session(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are begun again before anybody loses patience with them."""
    monkeypatch.setattr("peer.rpc.gate._CALLS_WITHOUT_SESSION", 4)
    monkeypatch.setattr("peer.rpc.gate._PATIENCE_S", 60.0)
    keys, rights = numbered_identities(2), (session_pb2.RIGHT_DHT,)

    async def scenario() -> None:
        served, newcomers, pools = await serve(keys[RELAY]), ChannelPool(), [ChannelPool() for _ in range(4)]
        async with closing(served, newcomers, *pools):
            silent: list[Any] = []
            for pool in pools:
                channel = await pool.reach(served.as_relay)
                silent.append(channel.stream_unary("/talkoot.v1.SessionService/Challenge")(timeout=60))
                silent[-1].add_done_callback(lambda ended: None)
            await until(lambda: len(served.server.gate._opening_slots) == 4)
            channel = await newcomers.reach(served.as_relay)
            assert await SessionClient(keys[1], SWARM, rights).metadata(served.peer_id, channel, 30.0)
            for call in silent:
                call.cancel()

    loop.run(scenario(), 60)


async def takes_long(request: bytes, context: Any) -> bytes:
    await asyncio.sleep(60)
    return request


def add_long_calls(served: Served, service: str) -> None:
    handlers: Any = {"List": grpc.unary_unary_rpc_method_handler(takes_long)}
    served.server.services.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])


async def call_long(served: Served, service: str, pool: ChannelPool, session: Metadata = ()) -> None:
    call: Any = (await pool.reach(served.as_relay)).unary_unary(f"/{service}/List")
    calling = asyncio.ensure_future(call(b"", timeout=60, metadata=session))
    calling.add_done_callback(lambda ended: ended.exception())


def test_calls_without_a_session_that_take_long_keep_nobody_from_opening_one(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.gate._CALLS_WITHOUT_SESSION", 4)
    keys, rights = numbered_identities(3), (session_pb2.RIGHT_DHT,)

    async def scenario() -> None:
        served, newcomers, pools = await serve(keys[RELAY]), ChannelPool(), [ChannelPool() for _ in range(5)]
        add_long_calls(served, CREDIT)
        async with closing(served, newcomers, *pools):
            for pool in pools:
                await call_long(served, CREDIT, pool)
            await until(lambda: total(served.server.gate.refused, reason="crowded") == 1)
            channel = await newcomers.reach(served.as_relay)
            assert await SessionClient(keys[CALLER], SWARM, rights).metadata(served.peer_id, channel, 30.0)

    loop.run(scenario(), 60)


def test_calls_for_receipts_take_no_places_from_other_calls(loop: LoopThread) -> None:
    """They need no token, and wait for their turns for up to ten seconds."""

    async def scenario() -> None:
        server, *callers = numbered_identities(6)
        served, pool = await serve(server, most_calls=4), ChannelPool()
        sessions = [opened(served.sessions, server, SWARM, each, str(n)) for n, each in enumerate(callers)]
        add_long_calls(served, CREDIT)
        async with closing(served, pool):
            for session in sessions[1:]:
                await call_long(served, CREDIT, pool, session)
            await until(lambda: len(served.server.gate._own_slots[CREDIT]) == 4)
            echo: Any = (await pool.reach(served.as_relay)).unary_unary("/test/Echo")
            assert await echo(b"ping", timeout=30, metadata=sessions[0]) == b"ping"

    loop.run(scenario(), 60)


def test_who_needs_no_token_takes_no_places_from_those_who_have_one(loop: LoopThread) -> None:
    """However many neighbourhoods such callers are in."""
    rights = (session_pb2.RIGHT_DHT,)

    async def scenario() -> None:
        server, member, *callers = numbered_identities(7)
        served, pool = await serve(server, most_calls=4), ChannelPool()
        add_long_calls(served, "long")
        async with closing(served, pool):
            for number, each in enumerate(callers):
                session = opened(served.sessions, server, SWARM, each, str(number), rights)
                await call_long(served, "long", pool, session)
            gate = served.server.gate
            await until(lambda: len(gate._strange_slots) + len(gate._slots) >= 4)
            session = opened(served.sessions, server, SWARM, member, "member")
            echo: Any = (await pool.reach(served.as_relay)).unary_unary("/test/Echo")
            assert await echo(b"ping", timeout=30, metadata=session) == b"ping"

    loop.run(scenario(), 60)
