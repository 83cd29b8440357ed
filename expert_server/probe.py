"""Measures the connection between two peers: round trip, clock offset, bandwidth, and whether the other peer can dial
back.

`ProbeServicer` is the node's side. A hostile caller costs it at most two probes at a time, of 8 MiB and 10 s each, and
a short TCP connection to the caller's own address. The node's bandwidth limits apply to probes, too. `call_probe` and
`call_dial_back` are the caller's side.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import StatusCode

from peer import PROTOCOL_VERSION, clock
from peer.codec import MAX_CHUNK_BYTES
from peer.errors import ExpertError, UnreachableError, WireError
from peer.formatting import printable
from peer.rates import Bandwidth, TokenBuckets
from peer.rpc.calls import abort_on_error, make_stub, require_same_swarm
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint, IpAddress, address_of, ip_address, neighbourhood
from peer.wire import probe_pb2, probe_pb2_grpc

MAX_PROBE_BYTES = 8 * 2**20
MAX_PROBE_REQUESTS = 256
LOWEST_PORT = 1024

ProbeContext = grpc.aio.ServicerContext[probe_pb2.ProbeRequest, probe_pb2.ProbeReply]
DialContext = grpc.aio.ServicerContext[probe_pb2.DialBackRequest, probe_pb2.DialBackReply]

_REMEMBERED_CALLERS = 1024
_PROBE_DEADLINE_S = 15.0
_DIAL_DEADLINE_S = 8.0
_ROUND_TRIPS = 4
_MESSAGE_BYTES = 128 * 1024
_FIRST_BYTES = 128 * 1024
"""The bytes sent first. Even a slow line carries them within the time that a node allows for a probe."""
_MORE_BYTES = 2 * 2**20
"""The bytes sent next, or fewer if these would take longer than about a second."""


@dataclass(frozen=True)
class ProbeLimits:
    """What callers may ask for. Times in seconds."""

    probe_s: float = 10.0
    dial_s: float = 3.0
    at_once: int = 2
    """Probes at the same time, and as many dials."""
    burst: int = 6
    """Calls that one caller may make in a row; after that, one every `every_s`."""
    every_s: float = 10.0
    all_burst: int = 16
    """Calls that all callers together may make in a row; after that, one every `all_every_s`."""
    all_every_s: float = 2.0


class ProbeServicer(probe_pb2_grpc.ProbeServiceServicer):
    """Lets the peers of a swarm measure the connection to this node."""

    def __init__(
        self,
        swarm_id: str,
        traffic: Bandwidth,
        limits: ProbeLimits = ProbeLimits(),
        dialling: Dialling | None = None,
    ) -> None:
        """`dialling`: the rules for addresses that may be dialled; None: any on this machine."""
        self._swarm_id = swarm_id
        self._dialling = dialling or Dialling(AddressScope.LOOPBACK)
        self._traffic = traffic
        self._limits = limits
        self._probes, self._dials = CallLimiter(limits), CallLimiter(limits)

    async def Probe(self, requests: AsyncIterator[probe_pb2.ProbeRequest], context: ProbeContext) -> None:
        stream = aiter(requests)
        try:
            async with abort_on_error(context, self._limits.probe_s, "the probe lasted too long"):
                # read first: grpc.aio shows INTERNAL without a reason to a caller that is refused while it writes
                first = await anext(stream, None)
                with self._probes.turn(context.peer()):
                    await self._answer(first, stream, context)
        except _NotReadError:
            raise asyncio.CancelledError from None  # gRPC then drops the call; it takes no status any more

    async def DialBack(
        self, request: probe_pb2.DialBackRequest, context: DialContext
    ) -> probe_pb2.DialBackReply:
        async with abort_on_error(context):
            require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
            if not LOWEST_PORT <= request.port <= 65535:
                raise WireError(f"ports from {LOWEST_PORT} to 65535 are dialled, not {request.port}")
            with self._dials.turn(context.peer()) as address:
                # behind a proxy on this machine, such as a container's, all callers have the proxy's address
                if not self._dialling.allows(Endpoint.of(str(address), request.port)):
                    raise ExpertError(
                        StatusCode.FAILED_PRECONDITION,
                        f"{address} is in a nearer network than this swarm's addresses: not dialled",
                    )
                return await self._dial(address, request.port)
        raise AssertionError("abort raises")

    async def _answer(
        self,
        first: probe_pb2.ProbeRequest | None,
        others: AsyncIterator[probe_pb2.ProbeRequest],
        context: ProbeContext,
    ) -> None:
        if first is not None:
            require_same_swarm(self._swarm_id, first.protocol_version, first.swarm_id)
        count = total = 0
        request = first
        while request is not None:
            count += 1
            sent = len(request.payload)
            if max(sent, request.reply_bytes) > MAX_CHUNK_BYTES:
                raise WireError(f"a message has at most {MAX_CHUNK_BYTES} bytes of payload")
            total += sent + request.reply_bytes
            if total > MAX_PROBE_BYTES or count > MAX_PROBE_REQUESTS:
                raise ExpertError(
                    StatusCode.RESOURCE_EXHAUSTED,
                    f"a probe has at most {MAX_PROBE_BYTES} bytes and {MAX_PROBE_REQUESTS} requests",
                )
            await self._traffic.down.take(sent)
            await self._traffic.up.take(request.reply_bytes)
            reply = probe_pb2.ProbeReply(time=clock.now(), payload=bytes(request.reply_bytes))
            try:
                await context.write(reply)
            except asyncio.CancelledError:
                raise _NotReadError from None
            request = await anext(others, None)

    async def _dial(self, address: IpAddress, port: int) -> probe_pb2.DialBackReply:
        reply = probe_pb2.DialBackReply(address=str(address))
        try:
            async with asyncio.timeout(self._limits.dial_s):
                _, writer = await asyncio.open_connection(str(address), port)
        except TimeoutError:
            reply.message = f"no answer within {self._limits.dial_s:.0f} s"
        except OSError as error:
            reply.message = error.strerror or str(error)
        else:
            reply.connected = True
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return reply


class CallLimiter:
    """Who may be served now, for one kind of call."""

    def __init__(self, limits: ProbeLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        # a bucket may be overdrawn by one call, so its burst is one less
        self._each = TokenBuckets[str](1 / limits.every_s, limits.burst - 1, _REMEMBERED_CALLERS)
        self._all = TokenBuckets[None](1 / limits.all_every_s, limits.all_burst - 1)
        self._running = 0

    @contextmanager
    def turn(self, peer: str) -> Iterator[IpAddress]:
        """Wraps a call. `peer`: its name in gRPC. Raises ExpertError if it is not this caller's turn."""
        address = address_of(peer)
        if address is None:
            raise ExpertError(StatusCode.FAILED_PRECONDITION, "this call comes from no IP address")
        if self._running >= self._limits.at_once:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "other callers are being served: try again in some seconds"
            )
        caller, now = neighbourhood(address), self._clock()
        if wait_s := max(self._each.wait_s(caller, now), self._all.wait_s(None, now)):
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, f"too many calls: try again in {wait_s:.0f} s", wait_s
            )
        self._each.take(caller, 1, now)
        self._all.take(None, 1, now)
        self._running += 1
        try:
            yield address
        finally:
            self._running -= 1


class _NotReadError(Exception):
    """The call ended before the caller read a reply."""


@dataclass(frozen=True)
class Link:
    """The measured connection to a node."""

    round_trip_s: float
    clock_offset_s: float
    """The node's clock minus this machine's, accurate to half the round trip."""
    upload_mbit: float
    """In Mbit/s, like `download_mbit`."""
    download_mbit: float


@dataclass(frozen=True)
class DialledBack:
    """What a node reported about its attempt to connect to this peer."""

    connected: bool
    address: str
    """This machine's IP address, as the node sees it."""
    message: str


async def call_probe(channel: grpc.aio.Channel, swarm_id: str, now: Callable[[], float] = time.time) -> Link:
    """Measures the connection with one call that carries about 4 MiB. Raises UnreachableError with the cause."""
    stub = make_stub(probe_pb2_grpc.ProbeServiceStub, channel)
    probe = _Probe(stub.Probe(timeout=_PROBE_DEADLINE_S), swarm_id)
    try:
        return await _measure(probe, now)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # InvalidStateError: the call has already ended
        raise _unreachable(await probe.call.code(), await probe.call.details()) from None
    finally:
        probe.call.cancel()


async def call_dial_back(channel: grpc.aio.Channel, swarm_id: str, port: int) -> DialledBack:
    """Asks the node to connect to `port` of this machine. Raises UnreachableError if it does not try."""
    stub = make_stub(probe_pb2_grpc.ProbeServiceStub, channel)
    request = probe_pb2.DialBackRequest(protocol_version=PROTOCOL_VERSION, swarm_id=swarm_id, port=port)
    try:
        reply: probe_pb2.DialBackReply = await stub.DialBack(request, timeout=_DIAL_DEADLINE_S)
        address = str(ip_address(reply.address))
    except grpc.aio.AioRpcError as error:
        raise _unreachable(error.code(), error.details()) from error
    except ValueError:
        raise UnreachableError("the node named no IP address that it dialled") from None
    return DialledBack(reply.connected, address, printable(reply.message))


class _Probe:
    """One call in which every request gets one reply."""

    def __init__(self, call: Any, swarm_id: str) -> None:
        self.call = call
        self._swarm_id = swarm_id

    async def exchange(self, sizes: list[tuple[int, int]]) -> float:
        """Sends requests of these sizes (bytes sent, bytes wanted back). Returns the time that the last reply gives."""
        for sent, wanted in sizes:
            request = probe_pb2.ProbeRequest(
                protocol_version=PROTOCOL_VERSION,
                swarm_id=self._swarm_id,
                payload=bytes(sent),
                reply_bytes=wanted,
            )
            await self.call.write(request)
        answered = math.nan
        for _, wanted in sizes:
            reply = await self.call.read()
            if reply is grpc.aio.EOF:
                raise asyncio.InvalidStateError
            if len(reply.payload) != wanted or not clock.is_time(reply.time):
                raise UnreachableError("the node does not answer a probe as it should")
            answered = reply.time
        return answered


async def _measure(probe: _Probe, now: Callable[[], float]) -> Link:
    await probe.exchange([(0, 0)])  # opens the connection
    trips = []
    for _ in range(_ROUND_TRIPS):
        began, sent_at = time.perf_counter(), now()
        answered_at = await probe.exchange([(0, 0)])
        trip_s = time.perf_counter() - began
        trips.append((trip_s, answered_at - (sent_at + trip_s / 2)))
    round_trip_s, offset_s = min(trips)
    up = await _rate_mbit(probe, round_trip_s, upload=True)
    down = await _rate_mbit(probe, round_trip_s, upload=False)
    return Link(round_trip_s, offset_s, up, down)


async def _rate_mbit(probe: _Probe, round_trip_s: float, *, upload: bool) -> float:
    message = (_MESSAGE_BYTES, 0) if upload else (0, _MESSAGE_BYTES)
    size = _FIRST_BYTES
    while True:
        began = time.perf_counter()
        await probe.exchange([message] * (size // _MESSAGE_BYTES))
        seconds = max(time.perf_counter() - began - round_trip_s, 1e-6)
        rate = size / seconds
        if size > _FIRST_BYTES or rate < 2 * _FIRST_BYTES:
            return rate * 8 / 1e6
        size = int(min(rate, _MORE_BYTES))


def _unreachable(code: grpc.StatusCode, details: str | None) -> UnreachableError:
    return UnreachableError(f"{code.name}: {printable(details or 'no reason given')}")
