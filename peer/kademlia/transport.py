"""The DHT's calls over gRPC: pinned to the certificates in contacts, in sessions, on the peer's own server.

Opening a session has one deadline and the answer another, because a busy peer may need most of a deadline for TLS. A
peer that can't be dialled is not called for a while, unless a newer contact names other addresses.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
from grpc import StatusCode

from peer.bounded import BoundedDict
from peer.errors import ExpertError, UnreachableError
from peer.identity import Identity, PeerID
from peer.kademlia.contacts import ContactBook
from peer.kademlia.node import Handler
from peer.kademlia.validation import MAX_MESSAGE_BYTES
from peer.loop import is_cancelled
from peer.rpc.calls import abort_on_error
from peer.rpc.certificates import fetch_certificate
from peer.rpc.channels import ChannelPool, KnownPeer, Options, small_messages
from peer.rpc.sessions import SessionClient, Sessions
from peer.transport.contacts import OwnContact
from peer.transport.dialling import Dialling
from peer.transport.endpoints import address_of
from peer.wire import contact_pb2, dht_pb2, session_pb2

_CHANNELS = 512
"""The most connections to others. Those unused for a while are closed."""
_CALLS, _CALLS_OF_PEER = 1024, 64
"""Calls in progress, to all peers and to each. Further calls to a peer wait, because it would refuse them."""
_TRY_S = 5.0
"""How long the addresses of a peer are tried."""
_SILENT_S = 5.0
"""How long a peer is not called after nobody answered at its addresses."""
_REFUSED = (StatusCode.FAILED_PRECONDITION, StatusCode.PERMISSION_DENIED, StatusCode.UNAUTHENTICATED)
"""The statuses by which a server says that it will not open a session with this peer, now or later."""
_IDLE_MS = 60_000
_OPTIONS: Options = [
    *small_messages(MAX_MESSAGE_BYTES),
    ("grpc.client_idle_timeout_ms", _IDLE_MS),
]
_SERVICE = dht_pb2.DESCRIPTOR.services_by_name["DhtService"]


class _Turns:
    """The calls to one peer."""

    def __init__(self) -> None:
        self.calls = 0
        self.free = asyncio.Semaphore(_CALLS_OF_PEER)


class GrpcTransport:
    """One peer's calls to the DHT nodes of others, and their calls to its own. Close it when done."""

    def __init__(
        self,
        identity: Identity,
        swarm_id: str,
        contacts: ContactBook,
        own: OwnContact,
        dialling: Dialling,
    ) -> None:
        """`contacts`, `dialling`: the process's."""
        self.peer_id: PeerID = identity.peer_id
        self.contacts = contacts
        self._own = own
        self._dialling = dialling
        self._pool = ChannelPool(_CHANNELS, dialling=self._dialling, options=_OPTIONS, try_s=_TRY_S)
        self._sessions = SessionClient(identity, swarm_id, (session_pb2.RIGHT_DHT,))
        self._handlers: dict[str, Handler] = {}
        self._given = BoundedDict[PeerID, KnownPeer](_CHANNELS)
        """Peers at addresses that the owner gave. Their certificates were fetched from there."""
        self._silent = BoundedDict[PeerID, tuple[float, object]](_CALLS)
        """For each silent peer: until when it is not called, and where it was believed to be."""
        self._refusals = BoundedDict[PeerID, str](_CHANNELS)
        self._turns: dict[PeerID, _Turns] = {}
        """The calls to each peer, for peers that are being called."""

    def own_contact(self) -> contact_pb2.Contact | None:
        """Where others reach this peer; None if they can't."""
        return self._own.message()

    async def call(self, peer_id: PeerID, method: str, request: bytes, deadline_s: float) -> bytes | None:
        """The peer's reply; None if none comes in time, or if nobody knows where the peer is.

        `deadline_s`: for opening a session, and again for the reply.
        """
        if sum(turns.calls for turns in self._turns.values()) >= _CALLS or not self._may_be_there(peer_id):
            return None
        now = asyncio.get_running_loop().time()
        try:
            async with self._turn(peer_id, now + deadline_s):
                reply = await self._call(peer_id, method, request, deadline_s, now + 2 * deadline_s)
        except (UnreachableError, TimeoutError):
            silent_until = asyncio.get_running_loop().time() + _SILENT_S
            self._silent[peer_id] = silent_until, self.contacts.get(peer_id)
            return None
        except ExpertError as error:
            if error.status in _REFUSED:
                self._refusals[peer_id] = str(error)
            return None
        except grpc.aio.AioRpcError:
            return None
        self._silent.pop(peer_id, None)
        self._refusals.pop(peer_id, None)
        if (endpoint := self._pool.endpoint_of(peer_id)) is not None:
            self.contacts.reached(peer_id, endpoint)
        return reply

    def refusal_of(self, peer_id: PeerID) -> str | None:
        """The peer's reason why it opens no session with this one; None if it has not refused."""
        return self._refusals.get(peer_id)

    async def serve(self, method: str, handler: Handler) -> None:
        """Answers other peers' calls from now on, on the servers that `add_to` was called with."""
        self._handlers[method] = handler

    def add_to(self, server: grpc.aio.Server, sessions: Sessions) -> None:
        """Serves the DHT on a server, to callers in sessions. Call it before the server starts."""
        methods: dict[str, Any] = {
            method.name: grpc.unary_unary_rpc_method_handler(
                partial(self._answer, sessions, method.name.lower())
            )
            for method in _SERVICE.methods
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, methods),))

    async def close(self) -> None:
        await self._sessions.close()
        await self._pool.close()

    def _may_be_there(self, peer_id: PeerID) -> bool:
        if self.contacts.given(peer_id):
            return True
        until, known = self._silent.get(peer_id, (-math.inf, None))
        if asyncio.get_running_loop().time() < until and known == self.contacts.get(peer_id):
            return False
        return self.contacts.reaches(peer_id)

    @contextlib.asynccontextmanager
    async def _turn(self, peer_id: PeerID, until: float) -> AsyncIterator[None]:
        """Waits for a place among the calls to a peer. Raises TimeoutError."""
        turns = self._turns.setdefault(peer_id, _Turns())
        turns.calls += 1
        try:
            async with asyncio.timeout_at(until):
                await turns.free.acquire()
            try:
                yield
            finally:
                turns.free.release()
        finally:
            turns.calls -= 1
            if not turns.calls:
                del self._turns[peer_id]

    async def _call(
        self, peer_id: PeerID, method: str, request: bytes, deadline_s: float, until: float
    ) -> bytes:
        """Calls the peer, and again if the session has ended, or the channel was closed to make room for others.

        `deadline_s`: for the session, and again for the reply. `until`: for everything. Raises UnreachableError,
        TimeoutError, ExpertError and AioRpcError.
        """
        clock = asyncio.get_running_loop().time
        path = f"/{_SERVICE.full_name}/{method.capitalize()}"
        for last in (False, True):
            open_until = min(clock() + deadline_s, until)
            async with asyncio.timeout_at(open_until):
                peer = await self._find(peer_id, open_until - clock())
                channel = await self._pool.reach(peer)
                metadata = await self._sessions.metadata(peer_id, channel, open_until - clock())
            call: Any = channel.unary_unary(path)
            try:
                # gRPC enforces the deadline itself: it leaks calls that are cancelled (issue 43360)
                left_s = max(0.0, min(deadline_s, until - clock()))
                reply: bytes = await call(request, timeout=left_s, metadata=metadata)
                return reply
            except grpc.aio.AioRpcError as error:
                if error.code() is not StatusCode.UNAUTHENTICATED or last:
                    raise
                self._sessions.ended(peer_id, metadata)
            except (asyncio.CancelledError, grpc.aio.UsageError):
                if is_cancelled():
                    raise
        raise UnreachableError(f"the channel to {peer_id} was closed during the call")

    async def _find(self, peer_id: PeerID, deadline_s: float) -> KnownPeer:
        """Where the peer is: what its own contact says, or else the owner. Raises UnreachableError."""
        contact = self.contacts.get(peer_id)
        if contact is not None:
            return KnownPeer(peer_id, contact.addresses, contact.certificate_pem)
        if (given := self._given.get(peer_id)) is not None:
            return given
        endpoints = self.contacts.given(peer_id)
        for endpoint in filter(partial(self._dialling.begin, peer_id=peer_id), endpoints):
            with contextlib.suppress(UnreachableError):
                pem = await fetch_certificate(endpoint, peer_id, deadline_s / len(endpoints))
                self._dialling.reached(endpoint, peer_id)
                self._given[peer_id] = found = KnownPeer(peer_id, (endpoint,), pem)
                return found
        raise UnreachableError(f"peer {peer_id} does not answer at {', '.join(endpoints) or 'any address'}")

    async def _answer(
        self,
        sessions: Sessions,
        method: str,
        request: bytes,
        context: "grpc.aio.ServicerContext[bytes, bytes]",
    ) -> bytes:
        async with abort_on_error(context):
            session = sessions.require(context, session_pb2.RIGHT_DHT)
            self.contacts.called(session.caller, session.near)
            if (address := address_of(context.peer())) is not None:
                self._dialling.met(session.caller, address)
            await self._pool.forget_broken(session.caller)  # it may have started again
            if len(request) > MAX_MESSAGE_BYTES:
                raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, f"at most {MAX_MESSAGE_BYTES} bytes")
            handler = self._handlers.get(method)
            if handler is None:
                raise ExpertError(StatusCode.UNAVAILABLE, "this peer serves no DHT now")
            return await handler(session.caller, request)
        raise AssertionError("abort raises")
