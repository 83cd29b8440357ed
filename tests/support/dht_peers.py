"""Nodes of the DHT over real sockets and TLS, for tests."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from callers import numbered_identity

from peer.identity import Identity, PeerID
from peer.kademlia.bootstrap import BootstrapReply, join_through
from peer.kademlia.contacts import ContactBook
from peer.kademlia.node import KademliaNode
from peer.kademlia.server import DHTServer
from peer.kademlia.storage import BoundedStorage
from peer.kademlia.transport import GrpcTransport
from peer.kademlia.validation import Validator
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Sessions
from peer.transport.addresses import Multiaddress
from peer.transport.contacts import OwnContact
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint

LOCAL = "127.0.0.1"
SWARM = "sauna-abcdefghijkl"


@dataclass
class DHTPeer:
    """A DHT peer that listens on a port of its own. Close it when done."""

    identity: Identity
    own: OwnContact
    book: ContactBook
    transport: GrpcTransport
    node: KademliaNode
    handlers: DHTServer
    sessions: Sessions
    server: RpcServer
    port: int = 0
    calls: list[str] = field(default_factory=list)

    @classmethod
    async def start(
        cls,
        number: int,
        *,
        port: int = 0,
        serves_dht: bool = True,
        validator: Validator | None = None,
        certificate: bytes | None = None,
        key_of: int | None = None,
    ) -> "DHTPeer":
        """`key_of`: the number of the peer whose key its server uses; None: its own."""
        identity = numbered_identity(number)
        own = OwnContact(identity, identity.make_certificate())
        book = ContactBook()
        dialling = Dialling(AddressScope.LOOPBACK)
        transport = GrpcTransport(identity, SWARM, book, own, dialling)
        node = KademliaNode(transport, validator, serves_dht=serves_dht)
        handlers = DHTServer(node)
        shown = identity if key_of is None else numbered_identity(key_of)
        sessions = Sessions(SWARM, identity.peer_id)
        server = RpcServer(sessions, most_calls=64)
        transport.add_to(server.services, sessions)
        await handlers.start()
        peer = cls(identity, own, book, transport, node, handlers, sessions, server)
        credentials = server_credentials(shown, shown.make_certificate())
        peer.port = await server.start(credentials, LOCAL, port)
        if serves_dht:
            own.set(addresses=[peer.endpoint])
        return peer

    @property
    def peer_id(self) -> PeerID:
        return self.identity.peer_id

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint.of(LOCAL, self.port)

    @property
    def address(self) -> Multiaddress:
        return Multiaddress.of(self.endpoint, self.peer_id)

    async def join(self, *others: "DHTPeer", deadline_s: float = 10.0) -> list[BootstrapReply]:
        return await join_through(self.node, [other.address for other in others], deadline_s)

    async def close(self) -> None:
        await self.node.close()
        await self.transport.close()
        await self.server.stop(None)


@contextlib.asynccontextmanager
async def dht_peers(count: int, first: int = 0) -> AsyncIterator[list[DHTPeer]]:
    """Starts peers, each of which joins through the first one."""
    async with contextlib.AsyncExitStack() as stack:
        peers: list[DHTPeer] = []
        for number in range(first, first + count):
            peer = await DHTPeer.start(number)
            stack.push_async_callback(peer.close)
            peers.append(peer)
            if len(peers) > 1:
                assert await peer.join(peers[0])
        yield peers


@contextlib.asynccontextmanager
async def running(peer: DHTPeer) -> AsyncIterator[DHTPeer]:
    try:
        yield peer
    finally:
        await peer.close()


def forget_all(storage: BoundedStorage) -> None:
    """Empties it, as a restart does."""
    while storage.keys():
        storage._remove(0)
