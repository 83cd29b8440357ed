"""Callers that read neither replies nor the end of their calls, and connections that are slow."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from stranger import HostileCaller, new_identities

from expert_server.serving import call as serving
from peer.codec import CHUNK_BYTES
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rpc import gate, transfer
from peer.rpc.channels import CLIENT_OPTIONS
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Sessions
from peer.transport.endpoints import Endpoint

SWARM, LOCAL = "sauna", "127.0.0.1"
STREAMS = 20
REPLY = bytes(512 * 1024)


async def pour(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    """Sends replies without end."""
    async for _ in requests:
        while True:
            yield REPLY


class Served:
    """A server that sends replies without end, and its callers."""

    def __init__(self, server: RpcServer, identity: Identity, certificate: bytes, port: int) -> None:
        self.server = server
        self.peer_id = identity.peer_id
        self.certificate_pem = certificate_pem(certificate, identity.peer_id)
        self.port = port

    def caller(self, identity: Identity, port: int = 0) -> HostileCaller:
        contact: Any = SimpleNamespace(
            peer_id=self.peer_id,
            addresses=(Endpoint.of(LOCAL, port or self.port),),
            tunnel_addresses=(),
            relay_addresses=(),
            certificate_pem=self.certificate_pem,
        )
        return HostileCaller(contact, SWARM, identity)

    def closed(self, reason: str) -> float:
        value: float = self.server.connections.closed.labels(reason)._value.get()
        return value


async def until(condition: Callable[[], object]) -> None:
    ends = asyncio.get_running_loop().time() + 60
    while not condition():
        assert asyncio.get_running_loop().time() < ends
        await asyncio.sleep(0.05)


@pytest.fixture
def play(
    loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Served], Awaitable[None]]], None]:
    monkeypatch.setattr(gate, "_UNREAD_S", 0.5)
    monkeypatch.setattr(gate, "_END_S", 0.5)

    async def run(scenario: Callable[[Served], Awaitable[None]]) -> None:
        server = RpcServer(Sessions(SWARM, identity.peer_id), STREAMS)
        methods: dict[str, Any] = {"Pour": grpc.stream_stream_rpc_method_handler(pour)}
        server.services.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
        certificate = identity.make_certificate()
        port = await server.start(server_credentials(identity, certificate), LOCAL, 0)
        try:
            await scenario(Served(server, identity, certificate, port))
        finally:
            await server.stop(None)

    return lambda scenario: loop.run(run(scenario), 60)


def test_replies_that_nobody_reads_are_not_kept(play: Any) -> None:
    """gRPC would keep them, each with its stream, as long as the connection is open."""

    async def scenario(served: Served) -> None:
        stranger, honest = (served.caller(identity) for identity in new_identities(2))
        await stranger.open_session()
        await honest.open_session()
        before = len(asyncio.all_tasks())
        narrow = [option for option in CLIENT_OPTIONS if option[0] != "grpc.http2.lookahead_bytes"]
        credentials = grpc.ssl_channel_credentials(served.certificate_pem)
        async with grpc.aio.secure_channel(f"{LOCAL}:{served.port}", credentials, narrow) as channel:
            for _ in range(STREAMS):
                await stranger.stream("test/Pour", channel=channel).write(b"1")
            await until(lambda: served.closed("unread") == 1)
            await until(lambda: len(asyncio.all_tasks()) <= before + 3 * STREAMS)  # its own
            assert len(served.server.gate._slots) == 0
        call = honest.stream("test/Pour")
        await call.write(b"1")
        assert await call.read() == REPLY
        for caller in (stranger, honest):
            await caller.close()

    play(scenario)


def test_a_caller_that_takes_no_byte_any_more_gives_its_places_back(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine, the first stream must not be given up before the last one has begun.
    monkeypatch.setattr(gate, "_UNREAD_S", 2.0)

    async def scenario(served: Served) -> None:
        flows = asyncio.Event()
        flows.set()

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(OSError):
                there = await asyncio.open_connection(LOCAL, served.port)
                with contextlib.closing(there[1]):
                    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer, flows))

        proxy = await asyncio.start_server(forward, LOCAL, 0)
        stranger = served.caller(new_identities(1)[0], proxy.sockets[0].getsockname()[1])
        await stranger.open_session()
        for _ in range(STREAMS):
            await stranger.stream("test/Pour").write(b"1")
        await until(lambda: len(served.server.gate._slots) == STREAMS)
        flows.clear()
        await until(lambda: len(served.server.gate._slots) == 0)
        await until(lambda: served.closed("unread") == 1)
        flows.set()
        await stranger.close()
        proxy.close()

    play(scenario)


async def copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event | None = None
) -> None:
    while data := await reader.read(2**16):
        if flows is not None:
            await flows.wait()
        writer.write(data)
        await writer.drain()


def test_a_slow_line_that_may_go_on_is_never_too_slow_for_the_gate() -> None:
    """Code that reads or sends a payload allows for the slowest honest connection. The gate sees only whole
    messages.
    """
    call_s = serving._GRACE_S + CHUNK_BYTES / serving._LEAST_BYTES_PER_S
    transfer_s = transfer.GRACE_S + CHUNK_BYTES / transfer.LEAST_BYTES_PER_S
    assert max(call_s, transfer_s) <= min(gate._NEXT_MESSAGE_S, gate._UNREAD_S)
    assert CHUNK_BYTES / serving._LEAST_BYTES_PER_S < gate._FIRST_MESSAGE_S, "a header comes with a chunk"
