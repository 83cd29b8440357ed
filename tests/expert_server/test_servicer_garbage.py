"""Whatever else may come to the port: it does not stop the server."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from callers import new_identity
from edge import SWARM, Call, Edge, Runner, check_it_goes_on, make, running, serving
from grpc import StatusCode

from peer import PROTOCOL_VERSION
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.wire import expert_pb2, expert_pb2_grpc


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    with running(loop, identity, caplog) as runner:
        yield runner


GARBAGE = {
    "nothing": b"",
    "random": random.Random(0).randbytes(5000),
    "zeros": bytes(5000),
    "http": b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "half a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_on_the_port_does_not_stop_the_server(run: Runner, name: str) -> None:
    async def scenario(edge: Edge) -> None:
        host, port = edge.address.split(":")
        writers = [(await asyncio.open_connection(host, int(port)))[1] for _ in range(8)]
        for writer in writers:
            writer.write(GARBAGE[name])
        await check_it_goes_on(edge)
        for writer in writers:
            writer.close()
        await check_it_goes_on(edge)

    run(scenario)


def test_grpc_without_tls_gets_nothing(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        async with grpc.aio.insecure_channel(edge.address) as channel:
            stub: Any = expert_pb2_grpc.ExpertServiceStub(channel)
            request = expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Info(request, timeout=5)
        assert caught.value.code() is StatusCode.UNAVAILABLE
        assert edge.runtime.stats.rows == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_a_caller_that_pins_another_certificate_does_not_call(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        other = new_identity()
        pem = certificate_pem(other.make_certificate(), other.peer_id)
        outcome = await make(replace(edge, pem=pem), Call(), timeout_s=5)
        assert outcome.code is StatusCode.UNAVAILABLE
        assert edge.runtime.stats.rows == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_messages_that_are_no_protobuf_are_refused(
    loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(1)

    async def scenario() -> None:
        async with serving(identity) as edge:
            for name in ("Forward", "Backward"):
                method: Any = edge.channel.stream_stream(f"/talkoot.v1.ExpertService/{name}")
                for size in (1, 10, 1000):
                    stream = method(timeout=10, metadata=edge.session)
                    await stream.write(b"\xff" + rng.randbytes(size))
                    await stream.done_writing()
                    assert await stream.code() is not StatusCode.OK
            await check_it_goes_on(edge)

    loop.run(scenario(), 60)
    caplog.clear()  # grpc logs each with a traceback
