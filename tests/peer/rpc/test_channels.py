"""A pool of channels dials no victim: not again and again, not for many records, and nothing nearby.

It also abandons addresses that lead nowhere.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from relayed import Served, closing, serve

from peer.errors import UnreachableError
from peer.identity import Identity, PeerID, certificate_pem
from peer.rpc.channels import ChannelPool, KnownPeer
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import ENDPOINT_BURST, Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.pipes import Listeners, Pipe, SocketStream, copy_both_ways

LOCAL = "127.0.0.1"


@dataclass
class Victim:
    endpoint: Endpoint
    dials: int = 0


@contextlib.asynccontextmanager
async def victim(is_silent: bool = False) -> AsyncIterator[Victim]:
    """A server that does not speak TLS, and counts connections."""
    accepted: list[asyncio.StreamWriter] = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.dials += 1
        accepted.append(writer)
        if not is_silent:
            writer.close()

    server = await asyncio.start_server(accept, "0.0.0.0" if is_silent else LOCAL, 0)
    here = Victim(Endpoint.of(LOCAL, server.sockets[0].getsockname()[1]))
    try:
        yield here
    finally:
        server.close()
        for writer in accepted:
            writer.close()


@pytest.fixture
def pem(identity: Identity) -> bytes:
    return certificate_pem(identity.make_certificate(), identity.peer_id)


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def test_however_many_records_name_a_victim_it_is_dialled_a_few_times(pem: bytes) -> None:
    async def scenario() -> None:
        dialling = Dialling(AddressScope.LOOPBACK, clock=lambda: 0.0)
        pools = [ChannelPool(dialling=dialling) for _ in range(2)]
        async with victim() as here:
            for number in range(30):
                node = KnownPeer(peer(number), (here.endpoint,), pem)
                with pytest.raises(UnreachableError, match="does not answer"):
                    await pools[number % 2].reach(node)
                assert pools[number % 2].is_silent(node)
            assert here.dials == ENDPOINT_BURST
            assert not any(pool._channels for pool in pools), "gRPC would dial again and again"
        for pool in pools:
            await pool.close()

    asyncio.run(scenario())


def test_a_peer_that_names_silent_machines_is_tried_for_a_while_only(pem: bytes) -> None:
    async def scenario() -> None:
        pool = ChannelPool(try_s=0.2)
        async with victim(is_silent=True) as here:
            silent = [Endpoint.of(f"127.0.0.{n}", here.endpoint.port) for n in range(1, 9)]
            with pytest.raises(UnreachableError, match="does not answer"):
                await pool.reach(KnownPeer(peer(0), tuple(silent), pem))
            assert here.dials == 1
            assert not pool._tries
            assert not pool._channels
        await pool.close()

    asyncio.run(scenario())


def test_what_is_nearer_than_the_swarm_is_not_dialled(pem: bytes) -> None:
    async def scenario() -> None:
        pool = ChannelPool(dialling=Dialling(AddressScope.GLOBAL))
        async with victim() as here:
            with pytest.raises(UnreachableError, match="no address that can be called from here"):
                await pool.reach(KnownPeer(peer(0), (here.endpoint, Endpoint.of("localhost", 1)), pem))
            assert not here.dials
        await pool.close()

    asyncio.run(scenario())


def test_a_closed_pool_calls_nobody_any_more(pem: bytes) -> None:
    async def scenario() -> None:
        pool = ChannelPool()
        async with victim() as here:
            await pool.close()
            with pytest.raises(UnreachableError, match="this peer is stopping"):
                await pool.reach(KnownPeer(peer(0), (here.endpoint,), pem))
            assert not here.dials
            assert not pool._channels, "it leaks"

    asyncio.run(scenario())


def way_to(served: Served, cut_after: float) -> Listeners:
    """A proxy in front of the server. It cuts each connection after `cut_after` bytes to the server."""

    async def lead(peer_id: PeerID, addresses: Sequence[Multiaddress], accepted: Pipe) -> None:
        carried = 0

        def count(size: int) -> None:
            nonlocal carried
            carried += size
            if carried > cut_after:
                raise ConnectionError("cut")

        there = await asyncio.open_connection(LOCAL, served.endpoint.port)
        with contextlib.closing(accepted[1]), contextlib.closing(there[1]), contextlib.suppress(OSError):
            await copy_both_ways(SocketStream(accepted), SocketStream(there), 60.0, count)

    return Listeners(4, lead)


def test_a_tunnel_whose_connections_are_cut_again_and_again_gives_way_to_the_relay(
    identity: Identity,
) -> None:
    """libp2p's relays cut connections after 128 KiB, unless they are configured otherwise."""

    async def scenario() -> None:
        served = await serve(identity)
        tunnel, relay = way_to(served, 2**17), way_to(served, math.inf)
        pool = ChannelPool(tunnels=tunnel, relays=relay)
        some = (Multiaddress.of(served.endpoint, served.peer_id),)
        known = KnownPeer(served.peer_id, (), served.pem, some, some)
        payload = bytes(2**18)
        async with closing(served):
            assert await echo(pool, known, b"small") == b"small"
            assert pool.called_by("tunnel") == 1
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        assert await echo(pool, known, payload) == payload
                        break
            assert pool.called_by("relay") == 1
            await pool.close()
            tunnel.close()
            relay.close()

    asyncio.run(scenario())


async def echo(pool: ChannelPool, known: KnownPeer, payload: bytes) -> bytes:
    method: Any = (await pool.reach(known)).unary_unary("/test/Echo")
    answer: bytes = await method(payload, timeout=60)
    return answer
