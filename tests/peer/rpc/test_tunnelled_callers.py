"""Callers that come through tunnels are counted by the lines from which they come, like all others."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from callers import numbered_identities
from grpc import StatusCode
from relayed import LOCAL, SWARM, Served, closing, serve

from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient
from peer.transport.pipes import Pipe
from peer.transport.tunnel import Tunnels
from peer.wire import session_pb2, session_pb2_grpc


@contextlib.asynccontextmanager
async def channel_of(caller: Identity, served: Served, line: str = "192.0.2.1") -> AsyncIterator[Any]:
    """A channel to the server that looks like a tunnel of this caller, whose identity libp2p has verified."""

    async def open_stream(*arguments: Any) -> Pipe:
        return await served.server.open_for(caller.peer_id, line)

    tunnels, pool = Tunnels(open_stream), ChannelPool()
    async with closing(tunnels, pool):
        yield await pool.get(await tunnels.open_to(served.peer_id, ()), served.pem)


async def flood(channel: Any, requests: Sequence[session_pb2.OpenRequest]) -> int:
    """Makes many calls without a session. Returns how many were refused for coming too often."""
    refused = 0
    stub = session_pb2_grpc.SessionServiceStub(channel)
    for request in requests:
        try:
            await stub.Open(request, timeout=60)
        except grpc.aio.AioRpcError as error:
            refused += error.code() in {StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE}
    return refused


def test_a_stranger_in_a_tunnel_that_calls_too_often_keeps_no_newcomer_in_another_out(
    loop: LoopThread,
) -> None:
    identity, stranger, newcomer = numbered_identities(3)

    async def scenario() -> None:
        served = await serve(identity)
        sessions = SessionClient(newcomer, SWARM, [session_pb2.RIGHT_FORWARD])
        async with (
            closing(served, sessions),
            channel_of(stranger, served) as hostile,
            channel_of(newcomer, served) as honest,
        ):
            request = session_pb2.OpenRequest(statement=b"made up")
            assert await flood(hostile, 80 * [request]) > 5, "the attack was no attack"
            assert await sessions.metadata(identity.peer_id, honest, 20.0)
            assert total(served.server.connections.closed, reason="abused") >= 1

    loop.run(scenario(), 60)


def test_a_statement_waits_for_its_turn_under_the_name_that_its_connection_proved(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name in the statement does not count: a stranger may write that of a newcomer which it wants to keep out."""
    identity, stranger, newcomer = numbered_identities(3)

    async def scenario() -> None:
        served, sources = await serve(identity), []

        async def turn(_: Any, near: str, source: str) -> bool:
            sources.append(source)
            return True

        monkeypatch.setattr("peer.rates.FairTurns.turn", turn)
        client = SessionClient(newcomer, SWARM, [session_pb2.RIGHT_FORWARD])
        async with closing(served, client), channel_of(stranger, served) as hostile:
            stub = session_pb2_grpc.SessionServiceStub(hostile)
            given = await stub.Challenge(session_pb2.ChallengeRequest(), timeout=60)
            of_connection = len(sources)
            forged = client.statement(identity.peer_id, given.challenge)
            forged.signature = b"forged"
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Open(forged, timeout=60)
        assert len(sources) == of_connection + 1
        assert all(str(stranger.peer_id) in source for source in sources)

    loop.run(scenario(), 60)


def test_callers_share_with_those_on_their_line_however_they_come(loop: LoopThread) -> None:
    identity, *callers = numbered_identities(4)

    async def scenario() -> None:
        served, pool = await serve(identity), ChannelPool()

        async def group_of(caller: Identity, channel: Any) -> str:
            client = SessionClient(caller, SWARM, [session_pb2.RIGHT_FORWARD])
            async with closing(client):
                ((_, named),) = await client.metadata(identity.peer_id, channel, 20.0)
                return served.sessions.find(named, session_pb2.RIGHT_FORWARD).group

        async with closing(served, pool):
            groups = [await group_of(callers[0], await pool.get(served.endpoint, served.pem))]
            for caller, line in zip(callers[1:], (LOCAL, "192.0.2.1"), strict=True):
                async with channel_of(caller, served, line) as channel:
                    groups.append(await group_of(caller, channel))
            assert groups == [LOCAL, LOCAL, "192.0.2.1"]

    loop.run(scenario(), 60)


def test_tunnels_of_one_line_wait_for_each_other_but_others_do_not(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.connections._NEAR_STARTS_AT_ONCE", 4.0)
    monkeypatch.setattr("peer.rpc.connections._NEAR_STARTS_PER_S", 1.0)
    monkeypatch.setattr("peer.rpc.connections._MOST_NEAR_WAITING", 3)
    identity, *callers = numbered_identities(10)

    async def scenario() -> None:
        served = await serve(identity)
        open_for = served.server.open_for
        async with closing(served):
            opening = [asyncio.create_task(open_for(caller.peer_id, "192.0.2.1")) for caller in callers]
            began = time.monotonic()
            async with asyncio.timeout(20):
                while sum(task.done() for task in opening) < 6:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await open_for(callers[0].peer_id, "192.0.2.2")
                waited = sum(task.done() for task in opening) - 6
                assert waited <= time.monotonic() - began, "five are open, three wait, and one is refused"
                outcomes = await asyncio.gather(*opening, return_exceptions=True)
            assert time.monotonic() - began > 2.5, "the last one waited"
            assert sum(isinstance(outcome, ConnectionRefusedError) for outcome in outcomes) == 1
            assert total(served.server.connections.closed, reason="crowded") == 1

    loop.run(scenario(), 60)
