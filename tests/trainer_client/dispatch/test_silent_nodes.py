"""GrpcCaller against a real TLS server that falls silent, and callers that give up."""

import asyncio
import socket
from dataclasses import replace

import pytest
from expert_fakes import Collected, make_call
from grpc import StatusCode
from misbehaving_node import (
    ANSWERED_0,
    LONG,
    SHORT,
    Behaviour,
    Context,
    Server,
    answer,
    answer_all,
    ask_in_vain,
    caller,
    identities,
    pool,
    requests_for,
    running_server,
    sends,
    server,
    until,
)

from dht.announcements import NodeInfo
from dht.uid import UID
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from peer.transport.endpoints import Endpoint
from peer.wire.expert_pb2 import CallReply
from talkoot.demo.links import Link, Proxy, Wire
from trainer_client.dispatch.grpc_caller import GrpcCaller

__all__ = ["caller", "identities", "pool", "running_server", "server"]


# Silence and interruption


async def says_nothing(server: Server, context: Context) -> None:
    await server.read(context)
    await asyncio.sleep(LONG)


async def stops_after_one_answer(server: Server, context: Context) -> None:
    await sends(*ANSWERED_0)(server, context)
    await asyncio.sleep(LONG)


async def trickles(server: Server, context: Context) -> None:
    await sends(answer(0))(server, context)
    while True:
        await context.write(CallReply(chunk=b"\0"))
        await asyncio.sleep(SHORT / 4)


async def reads_nothing(server: Server, context: Context) -> None:
    await asyncio.sleep(LONG)


async def does_not_end(server: Server, context: Context) -> None:
    await answer_all(server, context)
    await asyncio.sleep(LONG)


@pytest.mark.parametrize(
    ("behave", "answered"),
    [
        (says_nothing, []),
        (stops_after_one_answer, [UID(0, (0,))]),
        (trickles, []),
        (reads_nothing, []),
        (does_not_end, [UID(0, (1,)), UID(0, (0,))]),
    ],
)
def test_silence_ends_at_the_deadline(
    loop: LoopThread, server: Server, caller: GrpcCaller, behave: Behaviour, answered: list[UID]
) -> None:
    loop.run(ask_in_vain(caller, server.info, requests_for(0, 1)))  # connects
    server.behave = behave
    deadline_s = 3.0 if answered else SHORT  # a busy machine needs time for the first answers
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0, 1), deadline_s=deadline_s))
    assert collected.status is StatusCode.DEADLINE_EXCEEDED
    assert collected.answered == answered
    assert deadline_s * 0.9 <= collected.seconds < LONG / 3


def test_node_that_takes_no_payload_ends_at_the_deadline(
    loop: LoopThread, server: Server, pool: ChannelPool
) -> None:
    server.behave = reads_nothing
    requests = requests_for(0, rows=16000, width=512)  # 32 MB, more than the transport takes in by itself
    caller = GrpcCaller(pool, "s", 512)
    collected = loop.run(ask_in_vain(caller, server.info, requests, deadline_s=SHORT))
    assert collected.status in (StatusCode.DEADLINE_EXCEEDED, StatusCode.UNAVAILABLE)
    assert collected.seconds < LONG / 3
    assert total(caller.metrics.bytes, direction="sent") < requests[0].inputs.nbytes


def test_no_time_left_is_deadline_exceeded(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    collected = loop.run(ask_in_vain(caller, server.info, requests_for(0), deadline_s=-1.0))
    assert collected.status is StatusCode.DEADLINE_EXCEEDED
    assert not collected.replies


@pytest.mark.parametrize("behave", [says_nothing, reads_nothing])
def test_channel_that_the_pool_closes_ends_its_calls_with_unavailable(
    loop: LoopThread, server: Server, behave: Behaviour
) -> None:
    server.behave = behave
    pool = ChannelPool(limit=1)
    rows = 8000 if behave is reads_nothing else 3
    caller = GrpcCaller(pool, "s", 512)

    async def scenario() -> Collected:
        call = asyncio.create_task(ask_in_vain(caller, server.info, requests_for(0, rows=rows, width=512)))
        await until(lambda: server.running == 1)
        await pool.get("127.0.0.1:1", server.info.certificate_pem)  # takes the only place
        return await call

    collected = loop.run(scenario())
    assert collected.status is StatusCode.UNAVAILABLE
    assert collected.seconds < LONG / 3
    loop.run(pool.close())


@pytest.mark.parametrize("behave", [says_nothing, stops_after_one_answer, reads_nothing])
def test_cancelling_the_caller_is_felt_as_such_and_ends_the_call_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller, behave: Behaviour
) -> None:
    server.behave = behave

    async def scenario() -> bool:
        call = asyncio.create_task(ask_in_vain(caller, server.info, requests_for(0, 1)))
        await until(lambda: server.running == 1)
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: server.running == 0)
        return call.cancelled()

    assert loop.run(scenario())


def test_consumer_that_stops_early_ends_the_call_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = stops_after_one_answer

    async def scenario() -> None:
        call = make_call(server.info, "forward", requests_for(0, 1), LONG)
        replies = caller.call(call)
        assert (await anext(replies)).batch is call.batch
        await replies.aclose()
        await until(lambda: server.running == 0)

    loop.run(scenario())


# Connections


async def call_in_vain(caller: GrpcCaller, node: NodeInfo) -> StatusCode | None:
    return (await ask_in_vain(caller, node, requests_for(0), deadline_s=SHORT)).status


def test_a_node_that_accepts_and_says_nothing_is_silent_and_one_that_computes_is_not(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = says_nothing

    async def scenario(frozen: socket.socket) -> None:
        node = replace(server.info, addresses=(Endpoint.of("127.0.0.1", frozen.getsockname()[1]),))
        assert not caller.is_silent(node), "nobody has called it yet"
        both = [
            asyncio.create_task(ask_in_vain(caller, info, requests_for(0), deadline_s=LONG))
            for info in (node, server.info)
        ]
        await until(lambda: server.running == 1)
        assert caller.is_silent(node)
        assert not caller.is_silent(server.info)
        for call in both:
            call.cancel()
        await asyncio.wait(both)

    with socket.create_server(("127.0.0.1", 0)) as frozen:  # the kernel accepts for it
        loop.run(scenario(frozen))


def test_a_node_that_refuses_the_connection_is_silent(
    loop: LoopThread, server: Server, caller: GrpcCaller, closed_port: int
) -> None:
    node = replace(server.info, addresses=(Endpoint.of("127.0.0.1", closed_port),))
    assert loop.run(call_in_vain(caller, node)) is StatusCode.UNAVAILABLE
    assert caller.is_silent(node)
    assert not caller.is_silent(replace(server.info, addresses=()))


# Health checks


@pytest.mark.parametrize("behave", [answer_all, says_nothing, reads_nothing])
def test_a_node_that_computes_responds_to_a_health_check(
    loop: LoopThread, server: Server, caller: GrpcCaller, behave: Behaviour
) -> None:
    """This server even lacks the health service: any answer shows that its loop runs."""
    server.behave = behave

    async def scenario() -> None:
        call = asyncio.create_task(ask_in_vain(caller, server.info, requests_for(0)))
        await until(lambda: server.running == 1 or call.done())
        assert await caller.responds(server.info, LONG)
        call.cancel()
        await asyncio.wait([call])

    loop.run(scenario())


def test_a_node_whose_line_is_cut_does_not_respond_until_it_is_mended(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def scenario() -> None:
        wire = Wire(Link())
        proxy = await Proxy.start(wire, ("127.0.0.1", server.info.addresses[0].port))
        node = replace(server.info, addresses=(Endpoint.of("127.0.0.1", proxy.port),))
        assert await caller.responds(node, LONG)
        wire.cut()
        assert not await caller.responds(node, SHORT)
        wire.mend()
        assert await caller.responds(node, LONG)
        await proxy.close()

    loop.run(scenario())


def test_a_node_that_refuses_the_connection_does_not_respond(
    loop: LoopThread, server: Server, caller: GrpcCaller, closed_port: int
) -> None:
    node = replace(server.info, addresses=(Endpoint.of("127.0.0.1", closed_port),))
    assert not loop.run(caller.responds(node, LONG))
