"""How a peer calls relays: over channels and in sessions that all its reservations and circuits share. What a circuit
carries has a connection of its own to the relay.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import BoundedDict
from peer.errors import ExpertError, UnreachableError
from peer.formatting import printable
from peer.identity import Identity, PeerID, certificate_pem
from peer.platform.sockets import probe_when_idle
from peer.relays.circuits import ACCEPT_S, IDLE_S
from peer.rpc.calls import make_stub, while_open
from peer.rpc.certificates import fetch_certificate
from peer.rpc.channels import ChannelPool, KnownPeer, Options, small_messages
from peer.rpc.connections import MARK, NAME_BYTES
from peer.rpc.sessions import Admission, Metadata, SessionClient
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.pipes import CHUNK_BYTES, Pipe, SocketStream, aborting, copy_both_ways
from peer.wire import relay_pb2, relay_pb2_grpc, session_pb2

Call: TypeAlias = Any
"""grpc's StreamStreamCall or UnaryStreamCall, whose messages are untyped."""
_OWN_CHANNELS, _DIAL_CHANNELS = 16, 256
"""Limits for channels to relays where this peer has reservations, and to the relays of others. They are separate
because strangers name the latter.
"""
_OPTIONS: Options = small_messages(16 * 2**10)
_FETCH_S = 5.0
_OPEN_S = ACCEPT_S + 2.0
"""Time for a session and the relay's first reply, which comes when the other end has accepted."""


@dataclass(frozen=True)
class Circuit:
    """A circuit that this peer has dialled."""

    relay: PeerID
    pipe: Pipe
    call: Call

    def close(self) -> None:
        """Closing twice is harmless."""
        self.pipe[1].transport.abort()
        self.call.cancel()


class _OtherEnd(SocketStream):
    """The other end of a circuit."""

    def __init__(self, circuit: Pipe, answer_s: float | None) -> None:
        super().__init__(circuit)
        self._answer_s = answer_s

    async def read(self) -> bytes:
        if self._answer_s is None:
            return await super().read()
        async with asyncio.timeout(self._answer_s):
            data = await super().read()
        self._answer_s = None
        return data


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
            ChannelPool(_OWN_CHANNELS, dialling=self._dialling, options=_OPTIONS),
            ChannelPool(_DIAL_CHANNELS, dialling=self._dialling, options=_OPTIONS),
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

    async def reserve(self, relay: KnownPeer) -> Call:
        """Begins a reservation. Cancel the call when done. Raises UnreachableError."""
        call, reply = await self._open(
            relay, self._pools[0], lambda stub, metadata: stub.Reserve(metadata=metadata)
        )
        if reply.ByteSize():
            call.cancel()
            raise UnreachableError(f"relay {relay.peer_id} refuses: its first reply is not empty")
        return call

    async def dial(self, relay: KnownPeer, peer_id: PeerID) -> Circuit:
        """Opens a circuit to a peer that has a reservation at the relay. Close it when done.

        Raises UnreachableError.
        """
        request = relay_pb2.DialRequest(peer_id=peer_id.to_bytes())
        call, reply = await self._open(
            relay, self._pools[1], lambda stub, metadata: stub.Dial(request, metadata=metadata)
        )
        try:
            if len(reply.circuit) != NAME_BYTES:
                raise UnreachableError(f"relay {relay.peer_id} names something that is not a circuit")
            return Circuit(relay.peer_id, await self.connect(relay, reply.circuit), call)
        except BaseException:
            call.cancel()
            raise

    async def connect(self, relay: KnownPeer, circuit: bytes) -> Pipe:
        """This peer's end of a circuit. `circuit`: its name, NAME_BYTES long. Raises UnreachableError."""
        endpoint = relay.addresses[0]
        try:
            async with asyncio.timeout(ACCEPT_S):
                pipe = await asyncio.open_connection(endpoint.host, endpoint.port, limit=CHUNK_BYTES)
            probe_when_idle(pipe[1])
            await SocketStream(pipe).write(MARK + circuit)
        except OSError as error:
            raise UnreachableError(f"relay {relay.peer_id} does not answer at {endpoint}: {error}") from error
        return pipe

    async def _open(
        self,
        relay: KnownPeer,
        pool: ChannelPool,
        begin: Callable[[relay_pb2_grpc.RelayServiceStub, Metadata], Call],
    ) -> tuple[Call, Any]:
        """Begins a long-lived call. Returns it, and the relay's first reply. Raises UnreachableError."""
        try:
            async with asyncio.timeout(_OPEN_S):
                channel = await self._channel(relay, pool)
                stub = make_stub(relay_pb2_grpc.RelayServiceStub, channel)
                for may_repeat in (True, False):
                    metadata = await self._sessions.metadata(relay.peer_id, channel, _OPEN_S)
                    call = begin(stub, metadata)
                    try:
                        return call, await _first_reply(call)
                    except ExpertError as error:
                        if error.status is not StatusCode.UNAUTHENTICATED or not may_repeat:
                            raise
                        self._sessions.ended(relay.peer_id, metadata)
        except TimeoutError:
            raise UnreachableError(f"relay {relay.peer_id} does not answer") from None
        except (ExpertError, OSError) as error:
            raise UnreachableError(f"relay {relay.peer_id} refuses: {error}") from error
        raise AssertionError("the second try returns or raises")

    async def carry(self, here: Pipe, circuit: Pipe, answer_s: float | None = None) -> None:
        """Copies between a socket and a circuit until either ends, and ends both. Raises OSError if one breaks.

        `answer_s`: the time in which the circuit's other end must send its first byte.
        """
        self.circuits += 1
        try:
            with aborting(here), aborting(circuit):
                there = _OtherEnd(circuit, answer_s)
                await copy_both_ways(SocketStream(here), there, IDLE_S, self.bytes.inc)
        finally:
            self.circuits -= 1

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


async def _first_reply(call: Call) -> Any:
    """Raises ExpertError or ConnectionError, and cancels the call, if there is none."""
    try:
        with breaking():
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the status below says why
                if isinstance(call, grpc.aio.StreamStreamCall):
                    await call.write(relay_pb2.ReserveRequest())
                reply = await call.read()
                if reply is not grpc.aio.EOF:
                    return reply
            status, details = await call.code(), await call.details()
    except BaseException:
        call.cancel()
        raise
    raise ExpertError(status, printable(details or "it ended the call"))
