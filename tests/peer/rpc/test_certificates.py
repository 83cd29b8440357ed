"""The certificate found at an endpoint is accepted only if its key is the peer's."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import grpc
import pytest
from callers import numbered_identity
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from peer.errors import UnreachableError
from peer.identity import VALID_FROM, Identity, certificate_pem
from peer.loop import LoopThread
from peer.rpc.certificates import _Connection, fetch_certificate
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Sessions
from peer.transport.endpoints import Endpoint

LOCAL = "127.0.0.1"


@contextlib.asynccontextmanager
async def grpc_server(
    identity: Identity, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[Endpoint]:
    server = RpcServer(Sessions("sauna", identity.peer_id), most_calls=8)
    own = server_credentials(identity, identity.make_certificate())
    port = await server.start(credentials or own, LOCAL, 0)
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


def test_a_certificate_of_another_form_is_refused() -> None:
    """With the peer's own key, which TLS proves: whoever pins it would have to keep whatever is in it."""
    identity, name = numbered_identity(0), x509.Name([])
    other = (
        x509.CertificateBuilder(name, name, identity.key.public_key(), 1)
        .not_valid_before(VALID_FROM)
        .not_valid_after(datetime(2099, 1, 1, tzinfo=UTC))
        .sign(identity.key, hashes.SHA256())
    )
    pem = other.public_bytes(serialization.Encoding.PEM)

    async def scenario() -> None:
        credentials = grpc.ssl_server_credentials([(identity.private_key_pem(), pem)])
        async with grpc_server(identity, credentials) as endpoint:
            await refused(fetch_certificate(endpoint, identity.peer_id, 60.0), "not one of a peer")

    asyncio.run(scenario())
