"""A relay, peers that it relays to and callers, with real sockets, for tests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from peer.identity import Identity, certificate_pem
from peer.relays.client import RelayClient
from peer.relays.dialler import RelayDialler
from peer.relays.reservations import Reservations
from peer.relays.service import RelayServicer
from peer.rpc.channels import ChannelPool, KnownPeer
from peer.rpc.connections import Connections
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Admission, Sessions
from peer.transport.endpoints import Endpoint

LOCAL = "127.0.0.1"
SWARM = "sauna"
RELAY, HIDDEN, CALLER, OTHER = range(4)
"""Places of these peers among a test's identities."""
FAST_MBIT = 10_000.0


class Served:
    """The server of one peer, with any services."""

    def __init__(self, identity: Identity, server: RpcServer, port: int, sessions: Sessions) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.server = server
        self.sessions = sessions
        self.pem = certificate_pem(identity.make_certificate(), identity.peer_id)
        self.endpoint = Endpoint.of(LOCAL, port)
        self.relay: RelayServicer | None = None
        self.echoes = 0

    @property
    def as_relay(self) -> KnownPeer:
        return KnownPeer(self.peer_id, (self.endpoint,), self.pem)

    @property
    def relaying(self) -> RelayServicer:
        assert self.relay is not None
        return self.relay

    async def stop(self) -> None:
        await self.server.stop(0)


async def serve(
    identity: Identity,
    relay_mbit: float | None = None,
    make_relay: Callable[[Sessions, Connections, float], RelayServicer] = RelayServicer,
    most_calls: int = 8,
    admission: Admission | None = None,
) -> Served:
    """`relay_mbit`: None: it has no relay service at all, not even to refuse."""
    sessions = Sessions(SWARM, identity.peer_id, admission)
    server = RpcServer(sessions, most_calls)
    relay = None
    if relay_mbit is not None:
        relay = make_relay(sessions, server.connections, relay_mbit)
        relay.add_to(server.services)

    async def echo(request: bytes, context: Any) -> bytes:
        served.echoes += 1
        return request

    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    server.services.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test", {"Echo": handler})]
    )
    bound = await server.start(server_credentials(identity, identity.make_certificate()), LOCAL, 0)
    served = Served(identity, server, bound, sessions)
    served.relay = relay
    return served


@dataclass
class Hidden:
    """A peer that is reached only through relays."""

    served: Served
    client: RelayClient
    reservations: Reservations
    relays: list[Any] = field(default_factory=list)

    @property
    def contact(self) -> KnownPeer:
        relay_addresses = self.reservations.addresses
        return KnownPeer(self.served.peer_id, (), self.served.pem, relay_addresses=relay_addresses)

    async def candidates(self) -> Sequence[Any]:
        return self.relays

    async def close(self) -> None:
        await self.reservations.close()
        await self.client.close()
        await self.served.stop()


async def hide(identity: Identity, relays: Sequence[Served], reservations: int = 1) -> Hidden:
    """A peer with `reservations` reservations at these relays."""
    served = await serve(identity)
    client = RelayClient(identity, SWARM)
    hidden = Hidden(served, client, Reservations(client), [relay.as_relay for relay in relays])
    hidden.reservations.set_exit(served.server.open_for)
    hidden.reservations.keep(hidden.candidates)
    await until(lambda: len(hidden.reservations.addresses) == reservations)
    return hidden


class Caller:
    """A peer that calls others through relays."""

    def __init__(self, identity: Identity, own: Served | None = None) -> None:
        """`own`: the caller's server, if it has one."""
        self.client = RelayClient(identity, SWARM, own_endpoint=lambda: None if own is None else own.endpoint)
        self.dialler = RelayDialler(self.client)
        self.pool = ChannelPool(relays=self.dialler)

    async def ask(self, contact: Any, payload: bytes = b"ping") -> bytes:
        channel = await self.pool.reach(contact)
        method: Any = channel.unary_unary("/test/Echo")
        answer: bytes = await method(payload, timeout=60, wait_for_ready=True)
        return answer

    async def ask_until_answered(self, contact: Any, payload: bytes) -> bytes:
        """Calls again if the old connection has broken, as callers do."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return await self.ask(contact, payload)
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self.pool.close()
        await self.dialler.close()
        await self.client.close()


@contextlib.asynccontextmanager
async def closing(*things: Any) -> AsyncIterator[None]:
    """Closes or stops what it is given when the block ends, the last first."""
    try:
        yield
    finally:
        for thing in reversed(things):
            await (thing.stop() if isinstance(thing, Served) else thing.close())


@contextlib.asynccontextmanager
async def behind_relay(
    keys: Sequence[Identity], relay_mbit: float = FAST_MBIT, **options: Any
) -> AsyncIterator[tuple[Served, Hidden, Caller]]:
    """A relay, a peer that is reached through it, and one that calls this peer. `options`: the relay's."""
    relay = await serve(keys[RELAY], relay_mbit, **options)
    hidden = await hide(keys[HIDDEN], [relay])
    caller = Caller(keys[CALLER])
    async with closing(relay, hidden, caller):
        yield relay, hidden, caller


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
