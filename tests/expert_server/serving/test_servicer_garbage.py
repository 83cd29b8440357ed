"""Arbitrary bytes that arrive at the port do not stop the server."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from stranger import new_identity
from tls_expert_server import (
    SWARM,
    Call,
    Edge,
    Runner,
    both_directions,
    check_it_goes_on,
    header_of,
    make,
    piece,
    run,
)

from expert_server.serving.batching import Direction
from peer import PROTOCOL_VERSION
from peer.identity import certificate_pem
from peer.metrics import total
from peer.wire import expert_pb2, expert_pb2_grpc

__all__ = ["run"]


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
                await stub.Info(request, timeout=60)
        assert caught.value.code() is StatusCode.UNAVAILABLE
        assert total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_a_caller_that_pins_another_certificate_does_not_call(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        other = new_identity()
        pem = certificate_pem(other.make_certificate(), other.peer_id)
        outcome = await make(replace(edge, pem=pem), Call(), timeout_s=5)
        assert outcome.code is StatusCode.UNAVAILABLE
        assert total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


METHODS = [
    *("ExpertService/Forward", "ExpertService/Backward", "ExpertService/Info", "StateService/Fetch"),
    *("StateService/Ask", "ProbeService/Probe", "ProbeService/DialBack", "SessionService/Open"),
]


@pytest.mark.parametrize("method", METHODS)
def test_messages_that_are_no_protobuf_are_refused_and_leave_no_trace_in_the_log(
    run: Runner, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    rng = random.Random(1)

    async def scenario(edge: Edge) -> None:
        call: Any = edge.channel.stream_stream(f"/talkoot.v1.{method}")
        for size in (1, 10, 1000):
            stream = call(timeout=60, metadata=edge.session)
            await stream.write(b"\xff" + rng.randbytes(size))
            await stream.done_writing()
            assert await stream.code() in (StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION)
        await check_it_goes_on(edge)

    run(scenario)
    assert caplog.messages == []


@both_directions
@pytest.mark.parametrize("at", [1, 2, 3])
def test_bytes_that_are_no_message_spoil_the_call_wherever_they_come(
    run: Runner, direction: Direction, at: int
) -> None:
    call = Call(direction)
    half = len(call.payload) // 2
    sent = [header_of(call), piece(call.payload[:half]), piece(call.payload[half:])]
    frames = [message.SerializeToString() for message in sent]
    frames.insert(at, b"\xff\xff\xff")

    async def scenario(edge: Edge) -> None:
        method: Any = edge.channel.stream_stream(f"/talkoot.v1.ExpertService/{direction.title()}")
        stream = method(iter(frames), timeout=60, metadata=edge.session)
        with pytest.raises(grpc.RpcError):
            async for _ in stream:
                pass
        assert await stream.code() is StatusCode.INVALID_ARGUMENT
        if at < len(sent):  # else all was there, and may have been computed
            assert edge.updates() == 0
        await check_it_goes_on(edge)

    run(scenario)
