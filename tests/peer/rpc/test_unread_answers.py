"""Callers that ask for answers but don't read them occupy no memory, whatever their flow-control windows allow."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import CLIENT_OPTIONS
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Sessions

MIB = 2**20


async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
    while True:
        yield bytes(MIB // 4)


async def echo(request: bytes, context: Any) -> bytes:
    return request


@asynccontextmanager
async def deaf_way(port: int) -> AsyncIterator[int]:
    """A proxy that forwards what a caller sends, and after a while stops reading the answers."""
    tasks: list[asyncio.Task[None]] = []
    pipes: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", port)

        async def back() -> None:
            left = MIB // 4
            while left > 0 and (data := await there.read(2**14)):
                writer.write(data)
                left -= len(data)
            await asyncio.Event().wait()

        tasks.append(asyncio.create_task(back()))
        pipes.extend((writer, onward))
        while data := await reader.read(2**14):
            onward.write(data)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pipe in pipes:
            pipe.transport.abort()


def test_answers_that_nobody_reads_are_dropped_with_their_connections(
    loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.connections._MOST_UNSENT_BYTES", 4 * MIB)

    async def scenario() -> None:
        server = RpcServer(Sessions("sauna", identity.peer_id), 8)
        certificate = identity.make_certificate()
        methods: dict[str, Any] = {
            "Endless": grpc.unary_stream_rpc_method_handler(endless),
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
        }
        server.services.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
        port = await server.start(server_credentials(identity, certificate), "127.0.0.1", 0)
        trusted = grpc.ssl_channel_credentials(certificate_pem(certificate, identity.peer_id))
        channels, calls = [], []
        try:
            async with (
                deaf_way(port) as deaf,
                grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted, CLIENT_OPTIONS) as honest,
            ):
                echoed: Any = honest.unary_unary("/test/Echo")
                assert await echoed(b"well", timeout=60) == b"well"
                for _ in range(8):
                    channel = grpc.aio.secure_channel(f"127.0.0.1:{deaf}", trusted, CLIENT_OPTIONS)
                    endless_call: Any = channel.unary_stream("/test/Endless")
                    channels.append(channel)
                    calls.append(asyncio.ensure_future(endless_call(b"", timeout=60).read()))
                deadline = time.monotonic() + 60
                while total(server.connections.closed, reason="unread") < 4:
                    held = [connection.unsent() for connection in server.connections._table.all()]
                    assert time.monotonic() < deadline, f"bytes are held for those that don't read: {held}"
                    await asyncio.sleep(0.05)
                assert await echoed(b"still", timeout=60) == b"still"
        finally:
            await asyncio.gather(*calls, return_exceptions=True)
            for channel in channels:
                await channel.close()
            await server.stop(0)

    loop.run(scenario(), 90)
