"""The certificate found at an endpoint is accepted only if its key is the peer's."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from callers import numbered_identity

from peer.errors import UnreachableError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rpc.certificates import _Connection, fetch_certificate
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Sessions
from peer.transport.endpoints import Endpoint

LOCAL = "127.0.0.1"


@contextlib.asynccontextmanager
async def grpc_server(identity: Identity) -> AsyncIterator[Endpoint]:
    server = RpcServer(Sessions("sauna", identity.peer_id), most_calls=8)
    port = await server.start(server_credentials(identity, identity.make_certificate()), LOCAL, 0)
    try:
        yield Endpoint.of(LOCAL, port)
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def tcp_server(
    say: Callable[[asyncio.StreamWriter], None],
) -> AsyncIterator[Endpoint]:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        say(writer)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while await reader.read(2**16):
                pass

    server = await asyncio.start_server(accept, LOCAL, 0)
    try:
        yield Endpoint.of(LOCAL, server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()


async def refused(fetching: Awaitable[bytes], why: str) -> None:
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=why):
        await fetching
    assert time.monotonic() - began < 30


def test_a_peers_certificate_is_fetched() -> None:
    async def scenario() -> None:
        identity = numbered_identity(0)
        async with grpc_server(identity) as endpoint:
            pem = await fetch_certificate(endpoint, identity.peer_id, 60.0)
            assert pem == certificate_pem(identity.make_certificate(), identity.peer_id)

    asyncio.run(scenario())


def test_another_peer_at_the_endpoint_is_refused() -> None:
    async def scenario() -> None:
        async with grpc_server(numbered_identity(1)) as endpoint:
            await refused(fetch_certificate(endpoint, numbered_identity(0).peer_id, 60.0), "is not at")

    asyncio.run(scenario())


def test_what_is_no_tls_server_or_silent_or_gone_is_refused_in_time() -> None:
    async def scenario() -> None:
        peer_id = numbered_identity(0).peer_id
        async with tcp_server(lambda writer: writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as endpoint:
            await refused(fetch_certificate(endpoint, peer_id, 60.0), "no TLS server")
        async with tcp_server(lambda writer: writer.close()) as endpoint:
            await refused(fetch_certificate(endpoint, peer_id, 60.0), "no TLS server")
        async with tcp_server(lambda writer: None) as endpoint:
            await refused(fetch_certificate(endpoint, peer_id, 0.2), "took too long")
        await refused(fetch_certificate(endpoint, peer_id, 60.0), "no TLS server")

    asyncio.run(scenario())


def test_who_is_cancelled_as_tls_stands_leaves_no_connection(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orderly close waited for the server's end of TLS, and the loop could not be closed meanwhile."""
    identity, made = numbered_identity(0), list[asyncio.BaseTransport]()

    async def scenario(endpoint: Endpoint) -> None:
        fetching = asyncio.create_task(fetch_certificate(endpoint, identity.peer_id, 60.0))

        class Cancelling(_Connection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                made.append(transport)
                fetching.cancel()

        monkeypatch.setattr("peer.rpc.certificates._Connection", Cancelling)
        await asyncio.wait([fetching])
        assert fetching.cancelled()

    async def on_another_loop() -> None:
        async with grpc_server(identity) as endpoint:
            with contextlib.closing(LoopThread()) as client:
                await asyncio.wrap_future(client.submit(scenario(endpoint)))

    loop.run(on_another_loop(), 120)
    assert made


def test_a_certificate_that_is_too_large_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.identity._MAX_CERTIFICATE_BYTES", 100)

    async def scenario() -> None:
        identity = numbered_identity(0)
        async with grpc_server(identity) as endpoint:
            await refused(fetch_certificate(endpoint, identity.peer_id, 60.0), "bytes, more than 100")

    asyncio.run(scenario())
