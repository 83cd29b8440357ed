"""A peer that joins a swarm by the real protocol and then does as it likes, for tests and for `benchmarks.chaos`.

    async with Stranger.joined(invite) as stranger:
        await stranger.publish_node(tunnel_addresses=["/onion/x:80"])  # signed and listed, whatever it says
        await stranger.publish(payload)                                # any record, under any key
        await stranger.store_at(peer_id, request)                      # any bytes, at one peer
        await stranger.answer(find=lie)                                # other handlers of the DHT
        address = await stranger.serve({"talkoot.v1.StateService/Fetch": trickle})
        caller = stranger.caller_of(node)                              # gRPC without a client's checks

`HostileCaller` also works alone, against any server and with any identity.
"""

import asyncio
import contextlib
import functools
import itertools
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import grpc
from google.protobuf.message import Message

from dht.admission import Role
from dht.announcements import NodeInfo
from dht.invites import Invite
from dht.records import sign_record
from dht.swarm import Swarm, join_swarm
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.host import NetworkConfig
from peer.identity import SESSION_DOMAIN, Identity, PeerID
from peer.kademlia.lookups import Item
from peer.kademlia.node import KademliaNode
from peer.kademlia.routing import id_bytes, key_id_of, node_id_of
from peer.kademlia.validation import pack
from peer.rpc.channels import CLIENT_OPTIONS, SERVER_OPTIONS, Contact
from peer.rpc.server import server_credentials
from peer.rpc.sessions import SESSION_KEY, Metadata, Right, Sessions, SessionServicer
from peer.wire import dht_pb2, records_pb2, session_pb2, session_pb2_grpc

LOCAL = "127.0.0.1"
LIFETIME_S = 60.0
"""The lifetime of what a stranger publishes, unless it says otherwise."""
ALL_RIGHTS: tuple[Right, ...] = (
    session_pb2.RIGHT_FORWARD,
    session_pb2.RIGHT_BACKWARD,
    session_pb2.RIGHT_FETCH,
    session_pb2.RIGHT_EXPORT,
    session_pb2.RIGHT_AVERAGE,
)
_DEADLINE_S = 10.0

Frames: TypeAlias = AsyncIterator[bytes]
Handler: TypeAlias = Callable[[Frames, Any], Frames]
"""Answers a call's messages with others, all as bytes. It may read `context`, a grpc.aio.ServicerContext."""
DHTHandler: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
"""Takes the request and its sender. Returns the answer."""
_REQUESTS: dict[str, type[Message]] = {
    "ping": dht_pb2.PingRequest,
    "store": dht_pb2.StoreRequest,
    "find": dht_pb2.FindRequest,
}


class Stranger:
    """A peer of a swarm, in its DHT and with an identity of its own. It checks nothing that it sends."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.identity = swarm.host.identity
        self.keys = swarm.keys
        self.address = ""
        """The address of its gRPC server, once it has one."""
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    @contextlib.asynccontextmanager
    async def joined(
        cls, invite: Invite, identity: Identity | None = None, *, serves_dht: bool = True
    ) -> AsyncIterator[Self]:
        """`identity`: by default one that nobody has met. `serves_dht`: whether others ask it and store at it."""
        config = NetworkConfig(LOCAL, serves_dht=serves_dht)
        swarm = await join_swarm(identity or new_identity(), invite, config, roles=tuple(Role))
        stranger = cls(swarm)
        try:
            yield stranger
        finally:
            await stranger._stack.aclose()
            await swarm.stop()

    @property
    def peer_id(self) -> PeerID:
        return self.identity.peer_id

    @property
    def dht(self) -> KademliaNode:
        return self.swarm.host.dht

    async def publish(
        self,
        payload: records_pb2.RecordPayload,
        *,
        subkey: int | bytes | None = None,
        lifetime_s: float = LIFETIME_S,
    ) -> bytes:
        """Signs a record unchecked, and stores it under its key, by default with this peer's subkey. Returns what was
        stored.
        """
        payload.expires_at = payload.expires_at or time.time() + lifetime_s
        if self.swarm.admission.badge is not None and not payload.HasField("badge"):
            payload.badge.CopyFrom(self.swarm.admission.badge)
        record = sign_record(self.identity, payload)
        own = self.peer_id.to_bytes() if subkey is None else subkey
        await self.store([Item(payload.key, own, record, payload.expires_at)])
        return record

    async def publish_node(self, lifetime_s: float = LIFETIME_S, **fields: Any) -> None:
        """Publishes a node record and lists the node. `fields`: replace those of a valid record."""
        await self.swarm.registry.publish_node(self.node_record(**fields), lifetime_s)

    async def publish_trainer(self, lifetime_s: float = LIFETIME_S, **fields: Any) -> None:
        """Publishes a trainer record and lists the trainer."""
        right: dict[str, Any] = {
            "name": "stranger",
            "protocol_version": PROTOCOL_VERSION,
            "software_version": SOFTWARE_VERSION,
            "started_at": time.time(),
            "addresses": [self.address] if self.address else [],
            "certificate": self.identity.make_certificate() if self.address else b"",
        }
        await self.swarm.registry.publish_trainer(records_pb2.TrainerRecord(**right | fields), lifetime_s)

    def node_record(self, **fields: Any) -> records_pb2.NodeRecord:
        """A valid record of this peer, apart from `fields`."""
        right: dict[str, Any] = {
            "addresses": [self.address or f"{LOCAL}:1"],
            "certificate": self.identity.make_certificate(),
            "protocol_version": PROTOCOL_VERSION,
            "software_version": SOFTWARE_VERSION,
            "started_at": time.time(),
            "expert_capacity": 1,
            "name": "stranger",
        }
        return records_pb2.NodeRecord(**right | fields)

    async def store(self, items: Sequence[Item]) -> set[tuple[str, int | bytes]]:
        """Stores entries at the peers nearest to their keys, as honest peers do. Returns those that any
        peer accepted.
        """
        return await self.swarm.registry.lookups.store(items)

    async def store_at(self, peer: PeerID, request: dht_pb2.StoreRequest) -> dht_pb2.StoreResponse:
        """Sends any store request to one peer. See `store_request`."""
        return dht_pb2.StoreResponse.FromString(await self._ask(peer, "store", request))

    async def find_at(self, peer: PeerID, request: dht_pb2.FindRequest) -> dht_pb2.FindResponse:
        """Asks one peer for keys."""
        return dht_pb2.FindResponse.FromString(await self._ask(peer, "find", request))

    async def _ask(self, peer: PeerID, method: str, request: Message) -> bytes:
        """Calls a DHT method of a peer. Raises TimeoutError if there is no answer."""
        answer = await self.dht.transport.call(peer, method, request.SerializeToString(), _DEADLINE_S)
        if answer is None:
            raise TimeoutError
        return answer

    def store_request(
        self, entries: Sequence[tuple[str | bytes, bytes, bytes, float]]
    ) -> dht_pb2.StoreRequest:
        """`entries`: the key as text or digest, the subkey as packed bytes or the coordinate of an index entry, the
        value as packed bytes, the expiration time.
        """
        keys, subkeys, values, expires = zip(*entries, strict=True)
        return dht_pb2.StoreRequest(
            peer=self.dht.info,
            keys=[digest(key) for key in keys],
            subkeys=subkeys,
            values=values,
            expiration_time=expires,
            in_cache=[False] * len(entries),
        )

    async def answer(self, **handlers: DHTHandler) -> None:
        """Replaces its DHT handlers `ping`, `store` and `find`."""
        assert self.dht.serves_dht, "nobody asks a client"
        for method, handler in handlers.items():
            await self.dht.transport.serve(method, functools.partial(_answer, _REQUESTS[method], handler))

    async def serve(self, handlers: Mapping[str, Handler], *, sessions: bool = True, port: int = 0) -> str:
        """Serves these methods (`talkoot.v1.StateService/Fetch`) over TLS, and opens sessions. Returns `host:port`.

        Publish the record that names the address afterwards.
        """
        certificate = self.identity.make_certificate()
        server = grpc.aio.server(handlers=[_Handlers(handlers)], options=[*SERVER_OPTIONS, *_UNLIMITED])
        if sessions:
            servicer = SessionServicer(Sessions(self.keys.swarm_id, self.peer_id))
            session_pb2_grpc.add_SessionServiceServicer_to_server(servicer, server)
        credentials = server_credentials(self.identity, certificate)
        self.address = f"{LOCAL}:{server.add_secure_port(f'{LOCAL}:{port}', credentials)}"
        await server.start()
        self._stack.push_async_callback(server.stop, None)
        return self.address

    async def nodes(self) -> list[NodeInfo]:
        """The swarm's other nodes, as read from the DHT."""
        registry = self.swarm.registry
        found = await registry.nodes(await registry.node_ids())
        return [node for peer_id, node in found.items() if peer_id != self.peer_id]

    async def node(self, peer_id: PeerID) -> NodeInfo:
        """One node, as read from the DHT. Waits until it is announced."""
        async with asyncio.timeout(60):
            while True:
                found = await self.swarm.registry.nodes([peer_id])
                if peer_id in found:
                    return found[peer_id]
                await asyncio.sleep(0.1)

    def caller_of(self, node: Contact, identity: Identity | None = None) -> "HostileCaller":
        """`identity`: used instead of the stranger's own. The caller is closed with the stranger."""
        caller = HostileCaller(node, self.keys.swarm_id, identity or self.identity)
        self._stack.push_async_callback(caller.close)
        return caller


class HostileCaller:
    """Calls one server with none of a client's checks and limits, with or without a session. Close it when done."""

    def __init__(self, server: Contact, swarm_id: str, identity: Identity | None = None) -> None:
        self.server = server
        self.swarm_id = swarm_id
        self.identity = identity or new_identity()
        self.session: Metadata = ()
        """The session that its calls carry. Empty until one is opened."""
        self._channels: list[grpc.aio.Channel] = []

    @property
    def endpoint(self) -> tuple[str, int]:
        host, port = self.server.addresses[0].rsplit(":", 1)
        return host, int(port)

    def new_channel(self) -> grpc.aio.Channel:
        """Opens another connection."""
        credentials = grpc.ssl_channel_credentials(self.server.certificate_pem)
        options = [*CLIENT_OPTIONS, *_UNLIMITED]
        self._channels.append(grpc.aio.secure_channel(self.server.addresses[0], credentials, options))
        return self._channels[-1]

    @property
    def channel(self) -> grpc.aio.Channel:
        """The caller's first connection."""
        return self._channels[0] if self._channels else self.new_channel()

    async def challenge(self) -> bytes:
        """A challenge from the server, for one statement. Raises grpc.aio.AioRpcError."""
        answer = await self.unary("talkoot.v1.SessionService/Challenge", b"")
        given: bytes = session_pb2.ChallengeReply.FromString(answer).challenge
        return given

    def statement(
        self, challenge: bytes, identity: Identity | None = None, **fields: Any
    ) -> session_pb2.OpenRequest:
        """A signed statement that asks for all rights. `fields`: replace the valid ones."""
        identity = identity or self.identity
        right: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "swarm_id": self.swarm_id,
            "caller": identity.peer_id.to_bytes(),
            "server": self.server.peer_id.to_bytes(),
            "challenge": challenge,
            "rights": ALL_RIGHTS,
        }
        data = session_pb2.OpenStatement(**right | fields).SerializeToString()
        return session_pb2.OpenRequest(
            statement=data, public_key=identity.public_key, signature=identity.sign(data, SESSION_DOMAIN)
        )

    async def open_session(self, identity: Identity | None = None, **fields: Any) -> Metadata:
        """Opens a session, which later calls carry. Raises grpc.aio.AioRpcError."""
        request = self.statement(await self.challenge(), identity, **fields).SerializeToString()
        answer = await self.unary("talkoot.v1.SessionService/Open", request)
        self.session = ((SESSION_KEY, session_pb2.OpenReply.FromString(answer).session),)
        return self.session

    async def unary(self, method: str, request: bytes, *, timeout_s: float = _DEADLINE_S) -> bytes:
        """Sends one message and returns the answer. Raises grpc.aio.AioRpcError."""
        call: Any = self.channel.unary_unary(f"/{method}")
        answer: bytes = await call(request, timeout=timeout_s, metadata=self.session)
        return answer

    def stream(
        self, method: str, *, timeout_s: float | None = None, channel: grpc.aio.Channel | None = None
    ) -> Any:
        """A call in which both sides are streams of bytes: `write`, `done_writing`, `read`, `cancel`."""
        make: Any = (channel or self.channel).stream_stream(f"/{method}")
        return make(timeout=timeout_s, metadata=self.session)

    async def tcp(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A plain TCP connection to the server."""
        return await asyncio.open_connection(*self.endpoint)

    async def tls(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TLS connection on which the caller writes HTTP/2 frames itself."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        return await asyncio.open_connection(*self.endpoint, ssl=context)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def new_identity() -> Identity:
    """An identity that nobody has met."""
    return next(_identities())


def new_identities(count: int) -> list[Identity]:
    """Identities that nobody has met."""
    return list(itertools.islice(_identities(), count))


def identities_near(key: str, count: int, among: int = 1000) -> list[Identity]:
    """The identities nearest to a key in the DHT, out of `among` new ones."""
    place = int.from_bytes(digest(key), "big")

    def distance(identity: Identity) -> int:
        return node_id_of(identity.peer_id.to_bytes()) ^ place

    return sorted(itertools.islice(_identities(), among), key=distance)[:count]


def digest(key: str | bytes) -> bytes:
    """The DHT's id of a key. A key that is bytes is returned unchanged."""
    return id_bytes(key_id_of(key)) if isinstance(key, str) else key


def packed(value: object) -> bytes:
    """Packs a value as the DHT packs subkeys and values."""
    return pack(value)


async def _answer(request: type[Message], handler: DHTHandler, sender: PeerID, data: bytes) -> bytes:
    answer: Message = await handler(request.FromString(data), sender)
    return answer.SerializeToString()


_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._handlers.get(handler_call_details.method.removeprefix("/"))
        return None if handler is None else grpc.stream_stream_rpc_method_handler(handler)


@functools.cache
def _identities() -> Iterator[Identity]:
    """Identities that this process has not used yet."""
    folder = Path(_key_folder().name)
    return (Identity.load_or_create(folder / f"{number}.key") for number in itertools.count())


@functools.cache
def _key_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory()
