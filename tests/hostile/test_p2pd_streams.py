"""Endless streams, each of which announces a long message, take little of p2pd's memory."""

import asyncio
import contextlib

import pytest
from callers import numbered_identities

from peer.errors import UnreachableError
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.metrics import total
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig
from peer.transport.pipes import Pipe
from peer.transport.tunnel import PROTOCOL, Tunnels

CLAIM = b"\x80\xf8\x07"
"""Announces 130,048 bytes, as a varint."""
STREAMS = 1000
MOST_BYTES = 140 * 2**20
"""p2pd's limit for Go's heap, and other memory that it uses. With all bytes of the streams it would be over 180 MiB."""


def make(identity: Identity, *, public: bool) -> Libp2p:
    return Libp2p(identity, Libp2pConfig("127.0.0.1", public=public), Dialling(AddressScope.LOOPBACK))


@pytest.mark.slow
def test_a_stranger_that_holds_streams_takes_no_memory_of_p2pd(loop: LoopThread) -> None:
    async def scenario() -> None:
        victim, stranger = (
            make(identity, public=n == 0) for n, identity in enumerate(numbered_identities(2))
        )
        tunnels = Tunnels(victim.open_stream)
        opened = asyncio.Event()

        async def open_exit(caller: PeerID, origin: str) -> Pipe:
            opened.set()
            await asyncio.Event().wait()  # a server that takes nothing
            raise AssertionError

        held: list[asyncio.StreamWriter] = []
        async with contextlib.AsyncExitStack() as stack:
            for each in (victim, stranger):
                stack.push_async_callback(each.stop)
            stack.push_async_callback(tunnels.close)
            tunnels.set_exit(open_exit, 256)
            await tunnels.serve_on(victim)
            await victim.start()
            await stranger.start()
            assert victim._daemon is not None
            addresses = await victim.addresses()
            victim_id = addresses[0].peer_id
            with pytest.raises(UnreachableError):
                await stranger.open_stream(victim_id, addresses, "DHTProtocol.rpc_ping", 5.0)
            for _ in range(STREAMS):
                _, writer = await stranger.open_stream(victim_id, addresses, PROTOCOL, 5.0)
                held.append(writer)
                with contextlib.suppress(ConnectionError):
                    writer.write(CLAIM + bytes(130_000))
            async with asyncio.timeout(60):
                await opened.wait()
                while total(tunnels.opened, way="refused") < STREAMS - 64:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert victim._daemon.memory_bytes < MOST_BYTES
            assert total(victim.restarts) == 0
            for writer in held:
                writer.close()

    loop.run(scenario(), 120)
