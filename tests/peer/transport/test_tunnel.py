"""gRPC through libp2p streams between real peers: calls pass, streams are bounded, and nothing is left behind."""

import asyncio
import errno
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from callers import numbered_identities

from peer.errors import UnreachableError
from peer.identity import Identity, PeerID, certificate_pem
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool, KnownPeer
from peer.rpc.server import server_credentials
from peer.transport.addresses import Multiaddress, RemoteEnd
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig
from peer.transport.pipes import Exit
from peer.transport.tunnel import TunnelLimits, Tunnels

LOCAL = "127.0.0.1"
CALL_S = 30.0


class Peer:
    """A peer's p2pd and its tunnels. Stop it when done."""

    def __init__(self, identity: Identity, *, public: bool) -> None:
        self.peer_id = identity.peer_id
        self.libp2p = Libp2p(identity, Libp2pConfig(LOCAL, public=public), Dialling(AddressScope.LOOPBACK))
        self.tunnels = Tunnels(self.libp2p.open_stream)

    async def start(self, open_exit: Exit | None = None) -> None:
        if open_exit is not None:
            self.tunnels.set_exit(open_exit, 256)
            await self.tunnels.serve_on(self.libp2p)
        await self.libp2p.start()

    async def stop(self) -> None:
        await self.tunnels.close()
        await self.libp2p.stop()


@dataclass(frozen=True)
class Village:
    server: Peer
    caller: Peer
    contact: KnownPeer


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


async def echo(request: bytes, context: Any) -> bytes:
    return request


@asynccontextmanager
async def echo_server(identity: Identity, path: Path) -> AsyncIterator[bytes]:
    """A server that listens only on a unix socket. Yields its certificate."""
    certificate = identity.make_certificate()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {"Echo": handler})])
    server.add_secure_port(f"unix:{path}", server_credentials(identity, certificate))
    await server.start()
    try:
        yield certificate
    finally:
        await server.stop(0)


@asynccontextmanager
async def village(identities: list[Identity]) -> AsyncIterator[Village]:
    server, caller = Peer(identities[0], public=True), Peer(identities[1], public=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exit"
            async with echo_server(identities[0], path) as certificate:
                await server.start(lambda caller, relay: asyncio.open_unix_connection(str(path)))
                await caller.start()
                pem = certificate_pem(certificate, server.peer_id)
                addresses = tuple(await server.libp2p.addresses())
                yield Village(server, caller, KnownPeer(server.peer_id, (), pem, addresses))
    finally:
        await caller.stop()
        await server.stop()


@pytest.fixture(scope="module")
def both(loop: LoopThread, identities: list[Identity]) -> Iterator[Village]:
    made = village(identities)
    yield loop.run(made.__aenter__())
    loop.run(made.__aexit__(None, None, None))


def ask(channel: grpc.aio.Channel, payload: bytes = b"", wait_for_ready: bool = False) -> Any:
    method: Any = channel.unary_unary("/test/Echo")
    return method(payload, timeout=CALL_S, wait_for_ready=wait_for_ready)


async def call(pool: ChannelPool, contact: KnownPeer, payload: bytes) -> bytes:
    answer: bytes = await ask(await pool.reach(contact), payload, wait_for_ready=True)
    return answer


async def until(is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_restarted(peer: Peer) -> None:
    await until(lambda: total(peer.libp2p.restarts) == 1)


def run(loop: LoopThread, test: Callable[[ChannelPool], Awaitable[None]], tunnels: Tunnels) -> None:
    async def main() -> None:
        pool = ChannelPool(tunnels=tunnels)
        try:
            await test(pool)
        finally:
            await pool.close()

    loop.run(main())


def test_a_call_goes_through_a_tunnel_with_its_certificate_pinned(loop: LoopThread, both: Village) -> None:
    async def test(pool: ChannelPool) -> None:
        payload = os.urandom(3 * 2**20)
        assert await call(pool, both.contact, payload) == payload
        assert both.server.tunnels.last_relayed is False

    run(loop, test, both.caller.tunnels)


def test_another_certificate_is_refused_in_the_tunnel(
    loop: LoopThread, both: Village, identities: list[Identity]
) -> None:
    impostor = certificate_pem(identities[1].make_certificate(), identities[1].peer_id)

    async def test(pool: ChannelPool) -> None:
        channel = await pool.reach(
            KnownPeer(both.server.peer_id, (), impostor, both.contact.tunnel_addresses)
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(channel)

    run(loop, test, both.caller.tunnels)


def test_the_tunnel_is_used_when_no_address_answers(loop: LoopThread, both: Village) -> None:
    with socket.socket() as closed:
        closed.bind((LOCAL, 0))
        silent = Endpoint.of(LOCAL, closed.getsockname()[1])
        contact = replace(both.contact, addresses=(silent,))

        async def test(pool: ChannelPool) -> None:
            assert await call(pool, contact, b"ping") == b"ping"
            again = await pool.reach(contact)
            assert again is await pool.reach(contact), "what worked is remembered"

        run(loop, test, both.caller.tunnels)


def test_without_an_address_nothing_is_tried(loop: LoopThread, both: Village) -> None:
    async def test(pool: ChannelPool) -> None:
        with pytest.raises(UnreachableError, match="has no address that can be called from here"):
            await pool.reach(KnownPeer(both.server.peer_id, (), both.contact.certificate_pem))

    run(loop, test, both.caller.tunnels)


def test_streams_end_with_their_channels_and_leave_nothing(loop: LoopThread, both: Village) -> None:
    async def test(pool: ChannelPool) -> None:
        await call(pool, both.contact, b"ping")
        assert total(both.caller.tunnels.streams) == total(both.server.tunnels.streams) == 1
        await pool.close()
        await until(lambda: not total(both.caller.tunnels.streams) and not total(both.server.tunnels.streams))

    run(loop, test, both.caller.tunnels)


def test_a_peer_gets_no_more_streams_than_the_limit(loop: LoopThread, both: Village) -> None:
    limits = TunnelLimits(streams_of_peer=2)

    async def test(pool: ChannelPool) -> None:
        tunnels = both.server.tunnels
        before, tunnels._limits = tunnels._limits, limits
        pools = [ChannelPool(tunnels=both.caller.tunnels) for _ in range(2)]
        try:
            for other in pools:
                await call(other, both.contact, b"ping")
            refused = total(tunnels.opened, way="refused")
            channel = await pool.reach(both.contact)
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(channel)
            assert total(tunnels.opened, way="refused") > refused
        finally:
            tunnels._limits = before
            for other in pools:
                await other.close()

    run(loop, test, both.caller.tunnels)


def test_a_tunnel_works_again_after_p2pd_died_at_either_end(
    loop: LoopThread, identities: list[Identity]
) -> None:
    async def test() -> None:
        async with village(identities) as both:
            pool = ChannelPool(tunnels=both.caller.tunnels)
            try:
                await call(pool, both.contact, b"ping")
                for number, peer in enumerate((both.server, both.caller), start=1):
                    assert peer.libp2p._daemon is not None
                    peer.libp2p._daemon._child.kill()
                    await until_restarted(peer)
                    await until(lambda: not total(both.caller.tunnels.streams))
                    assert await call(pool, both.contact, b"%d" % number) == b"%d" % number
            finally:
                await pool.close()
            folder = Path(both.caller.tunnels.address_of(both.server.peer_id).removeprefix("unix:")).parent
            assert folder.stat().st_mode & 0o077 == 0, "nobody else gets in"
        assert not folder.exists()

    loop.run(test())


def test_a_tunnel_to_nobody_fails_the_call(
    loop: LoopThread, both: Village, identities: list[Identity]
) -> None:
    nobody = KnownPeer(
        identities[1].peer_id,
        (),
        certificate_pem(identities[1].make_certificate(), identities[1].peer_id),
        tunnel_addresses=(Multiaddress.of(Endpoint.of(LOCAL, 9), identities[1].peer_id),),
    )

    async def test(pool: ChannelPool) -> None:
        channel = await pool.reach(nobody)
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(channel)

    run(loop, test, both.server.tunnels)


def test_a_tunnel_is_opened_once_the_machine_has_sockets_again(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def opens_nothing(*arguments: Any) -> Any:
        raise UnreachableError("there is nobody")

    async def has_none_left(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def scenario() -> None:
        tunnels, peer_id = Tunnels(opens_nothing), identities[1].peer_id
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "start_unix_server", has_none_left)
            for _ in range(2):
                with pytest.raises(UnreachableError, match="Too many open files"):
                    await tunnels.open_to(peer_id, ())
        name = (await tunnels.open_to(peer_id, ())).removeprefix("unix:")
        try:
            _, writer = await asyncio.open_unix_connection(name)
            writer.close()
        finally:
            await tunnels.close()
        assert total(tunnels.failures) >= 2

    loop.run(scenario())


def test_a_peer_that_opens_stream_after_stream_is_refused_and_others_are_not(
    loop: LoopThread, identities: list[Identity]
) -> None:
    async def scenario() -> None:
        async def open_stream(*arguments: Any) -> Any:
            raise UnreachableError("not asked")

        async def open_exit(caller: PeerID, origin: str) -> Any:
            raise OSError("it ends at once")

        tunnels = Tunnels(open_stream, TunnelLimits(streams_of_peer=4, opened_per_s=0.001))
        tunnels.set_exit(open_exit, 8)

        async def accept(caller: Identity) -> None:
            here, there = socket.socketpair()
            with there:
                pipe = await asyncio.open_unix_connection(sock=here)
                await tunnels._accept(caller.peer_id, RemoteEnd("192.0.2.1", False), pipe)

        for _ in range(9):
            await accept(identities[0])
        assert total(tunnels.opened, way="refused") == 4
        await accept(identities[1])
        assert total(tunnels.opened, way="refused") == 4
        await tunnels.close()

    loop.run(scenario(), 60)


@asynccontextmanager
async def holding(
    limit: int, of_peer: int
) -> AsyncIterator[Callable[..., Awaitable[list[asyncio.Task[None]]]]]:
    """A function that opens streams, which last until they make room for others."""
    ended = asyncio.Event()

    async def open_stream(*arguments: Any) -> Any:
        raise UnreachableError("not asked")

    async def open_exit(caller: PeerID, origin: str) -> Any:
        await ended.wait()
        raise OSError("it has ended")

    tunnels = Tunnels(open_stream, TunnelLimits(streams_of_peer=of_peer))
    tunnels.set_exit(open_exit, limit)

    async def accept(caller: Identity, line: str) -> None:
        here, there = socket.socketpair()
        with there:
            pipe = await asyncio.open_unix_connection(sock=here)
            await tunnels._accept(caller.peer_id, RemoteEnd(line, False), pipe)

    async def streams(caller: Identity, line: str, number: int) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(accept(caller, line)) for _ in range(number)]
        opened = total(tunnels.opened)
        await until(lambda: total(tunnels.opened) == opened + number)
        return tasks

    yield streams
    assert total(tunnels.opened, way="refused") == 0
    ended.set()
    await tunnels.close()


@pytest.mark.parametrize("line", ["192.0.2.2", "192.0.2.1"])
def test_strangers_that_hold_all_streams_leave_a_newcomer_its_share(loop: LoopThread, line: str) -> None:
    """Whether the newcomers are on the strangers' line or not."""

    async def scenario() -> None:
        async with holding(6, 3) as streams:
            *strangers, first, second = numbered_identities(4)
            hostile = [await streams(each, "192.0.2.1", 3) for each in strangers]
            honest = [*await streams(first, line, 1), *await streams(second, line, 1)]
            await until(lambda: all(sum(task.done() for task in own) == 1 for own in hostile))
            assert not any(task.done() for task in honest)

    loop.run(scenario(), 60)


def test_many_keys_on_one_line_hold_as_many_streams_as_one_newcomer(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with holding(6, 3) as streams:
            *strangers, newcomer = numbered_identities(7)
            hostile = [task for each in strangers for task in await streams(each, "192.0.2.1", 1)]
            honest = await streams(newcomer, "192.0.2.2", 3)
            await until(lambda: sum(task.done() for task in hostile) == 3)
            assert not any(task.done() for task in honest)

    loop.run(scenario(), 60)
