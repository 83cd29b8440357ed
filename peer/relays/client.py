"""How a peer calls relays: over channels and in sessions that all its reservations and circuits share."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import BoundedDict
from peer.errors import ExpertError, UnreachableError
from peer.formatting import printable
from peer.identity import Identity, PeerID, certificate_pem
from peer.loop import first_of
from peer.relays.pieces import ACCEPT_S, BEAT_S, SENT_BYTES, read_piece
from peer.rpc.calls import make_stub, while_open
from peer.rpc.certificates import fetch_certificate
from peer.rpc.channels import ChannelPool, KnownPeer
from peer.rpc.sessions import Admission, SessionClient
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.pipes import Pipe, SocketStream, copy_both_ways
from peer.wire import relay_pb2, relay_pb2_grpc, session_pb2

Method: TypeAlias = Literal["Reserve", "Dial", "Accept"]
Message: TypeAlias = "relay_pb2.ReserveRequest | relay_pb2.CircuitPiece"
Call: TypeAlias = Any
"""grpc's StreamStreamCall, whose messages are untyped."""
_OWN_CHANNELS, _DIAL_CHANNELS = 16, 256
"""Limits for channels to relays where this peer has reservations, and to the relays of others. They are separate
because strangers name the latter.
"""
_FETCH_S = 5.0
_OPEN_S = ACCEPT_S + 2.0
"""Time for a session and the relay's first reply, which comes when the other end has accepted."""
_IDLE_S = 600.0
"""A circuit that is idle for this long is closed. gRPC opens another when it needs one."""


class RelayClient:
    """Calls relays. For one event loop; close it when done."""

    def __init__(
        self,
        identity: Identity,
        swarm_id: str,
        dialling: Dialling | None = None,
        certificate_of: Callable[[PeerID], bytes | None] = lambda peer_id: None,
        metrics: CollectorRegistry | None = None,
        own_endpoint: Callable[[], Endpoint | None] = lambda: None,
        admission: Admission | None = None,
    ) -> None:
        """`dialling`: the rules for addresses that others wrote; None: any address on this machine may be dialled.

        `certificate_of`: returns a relay's certificate, PEM, if it is known. Otherwise it is fetched.

        `own_endpoint`: where this peer's own server listens on this machine; None: it has none. Through it, this peer
        reaches peers that have their reservation here.

        `admission`: provides this peer's badge.
        """
        self.peer_id: PeerID = identity.peer_id
        self.circuits: int = 0
        """The number of open circuits, to others and from others."""
        self.bytes: Counter = Counter(
            "talkoot_circuit_bytes", "Carried in this peer's circuits, both ways.", registry=metrics
        )
        Gauge(
            "talkoot_circuits", "Connections of this peer through relays, both ways.", registry=metrics
        ).set_function(lambda: self.circuits)
        self._identity = identity
        self._own_endpoint = own_endpoint
        self._dialling = dialling or Dialling(AddressScope.LOOPBACK)
        self._pools = (
            ChannelPool(_OWN_CHANNELS, dialling=self._dialling),
            ChannelPool(_DIAL_CHANNELS, dialling=self._dialling),
        )
        self._sessions = SessionClient(identity, swarm_id, (session_pb2.RIGHT_RELAY,), admission)
        self._certificate_of = certificate_of
        self._fetched = BoundedDict[PeerID, bytes](_DIAL_CHANNELS)

    async def relay(self, peer_id: PeerID, endpoint: Endpoint) -> KnownPeer:
        """A relay whose PeerID and endpoint are known. Raises UnreachableError."""
        if peer_id == self.peer_id:
            own = self._own_endpoint()
            if own is None:
                raise UnreachableError("this peer does not relay")
            return KnownPeer(peer_id, (own,), certificate_pem(self._identity.make_certificate(), peer_id))
        pem = self._certificate_of(peer_id) or self._fetched.get(peer_id)
        if pem is None:
            if not self._dialling.begin(endpoint, peer_id):
                raise UnreachableError(f"the address {endpoint} of a relay may not be dialled now")
            pem = self._fetched[peer_id] = await fetch_certificate(endpoint, peer_id, _FETCH_S)
            self._dialling.reached(endpoint, peer_id)
        return KnownPeer(peer_id, (endpoint,), pem)

    async def open(self, method: Method, relay: KnownPeer, first: Message) -> Call:
        """Begins a long-lived call. Returns after the relay's first reply, which must be empty. Cancel the call when
        done.

        Raises UnreachableError.
        """
        try:
            async with asyncio.timeout(_OPEN_S):
                channel = await self._channel(relay, self._pools[method == "Dial"])
                stub = make_stub(relay_pb2_grpc.RelayServiceStub, channel)
                for may_repeat in (True, False):
                    metadata = await self._sessions.metadata(relay.peer_id, channel, _OPEN_S)
                    call: Call = getattr(stub, method)(metadata=metadata)
                    try:
                        return await _begun(call, first)
                    except ExpertError as error:
                        if error.status is not StatusCode.UNAUTHENTICATED or not may_repeat:
                            raise
                        self._sessions.ended(relay.peer_id, metadata)
        except TimeoutError:
            raise UnreachableError(f"relay {relay.peer_id} does not answer") from None
        except (ExpertError, OSError) as error:
            raise UnreachableError(f"relay {relay.peer_id} refuses: {error}") from error
        raise AssertionError("the second try returns or raises")

    async def carry(self, pipe: Pipe, call: Call) -> None:
        """Copies between a socket and a circuit until either ends, and ends both. Raises OSError if one breaks."""
        self.circuits += 1
        circuit = CircuitStream(call)
        try:
            with contextlib.closing(pipe[1]):
                here = SocketStream(pipe, SENT_BYTES)
                await first_of(copy_both_ways(here, circuit, _IDLE_S, self.bytes.inc), circuit.keep_alive())
        finally:
            self.circuits -= 1
            call.cancel()

    async def close(self) -> None:
        """Ends all calls. Closing twice is harmless."""
        await self._sessions.close()
        for pool in self._pools:
            await pool.close()

    async def _channel(self, relay: KnownPeer, pool: ChannelPool) -> grpc.aio.Channel:
        """Raises UnreachableError."""
        if relay.peer_id == self.peer_id:
            return await pool.get(relay.addresses[0], relay.certificate_pem)
        return await pool.reach(relay)


class CircuitStream:
    """A byte stream over the pieces of a call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._writing = asyncio.Lock()
        self._wrote = False

    async def read(self) -> bytes:
        while True:
            with breaking():
                piece = await self._call.read()
                if piece is grpc.aio.EOF:
                    return b""
                data = read_piece(piece)
            if data:
                return data

    async def write(self, data: bytes) -> None:
        async with self._writing:
            self._wrote = True
            with breaking():
                await self._call.write(relay_pb2.CircuitPiece(data=data))

    async def end(self) -> None:
        """Waits until the relay has ended the call, too, and so has taken everything."""
        with breaking():
            await self._call.done_writing()
            await self._call.code()

    async def keep_alive(self) -> None:
        """Sends an empty piece whenever nothing else was sent for a while. Never returns. Raises OSError."""
        while True:
            await asyncio.sleep(BEAT_S)
            if not self._wrote:
                await self.write(b"")
            self._wrote = False


@contextmanager
def breaking() -> Iterator[None]:
    """Raises ConnectionError if a call inside ends, in any way."""
    try:
        with while_open():
            yield
    except grpc.aio.AioRpcError as error:
        raise ConnectionError(printable(error.details() or error.code().name)) from error
    except (grpc.aio.BaseError, asyncio.InvalidStateError, ExpertError) as error:
        raise ConnectionError(f"the call ended: {error}") from error


async def _begun(call: Call, first: Message) -> Call:
    """Sends a call's first message and reads an empty reply, then returns the call. Raises ExpertError or
    ConnectionError.
    """
    try:
        with breaking():
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the status below says why
                await call.write(first)
                reply = await call.read()
                if reply is not grpc.aio.EOF:
                    if reply.ByteSize():
                        raise ConnectionError("its first reply is not empty")
                    return call
            status, details = await call.code(), await call.details()
    except BaseException:
        call.cancel()
        raise
    raise ExpertError(status, printable(details or "it ended the call"))
