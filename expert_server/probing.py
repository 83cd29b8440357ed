"""The caller's side of measuring the way to a node: clock, bandwidth, and whether the node can dial back."""

import asyncio
import ipaddress
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from peer import PROTOCOL_VERSION
from peer.errors import UnreachableError
from peer.garbage import make_stub
from peer.wire import probe_pb2, probe_pb2_grpc

_ROUND_TRIPS = 4
_FIRST_BYTES = 128 * 1024
"""What even a slow line carries in the time that a node gives a probe."""
_MORE_BYTES = 2 * 2**20
"""What is sent then, if it takes a second at most; else what takes about a second."""
_MESSAGE_BYTES = 128 * 1024
_PROBE_DEADLINE_S = 15.0
_DIAL_DEADLINE_S = 8.0
_MOST_CHARACTERS = 200


@dataclass(frozen=True)
class Link:
    """The way to a node and back."""

    round_trip_s: float
    clock_offset_s: float
    """The node's clock minus this machine's, give or take half the round trip."""
    upload_mbit: float
    """Mbit/s, as is `download_mbit`."""
    download_mbit: float


@dataclass(frozen=True)
class DialledBack:
    """What a node said of its attempt to connect to us."""

    connected: bool
    address: str
    """This machine's IP address, as the node sees it."""
    message: str


async def call_probe(channel: grpc.aio.Channel, swarm_id: str, now: Callable[[], float] = time.time) -> Link:
    """Measures by way of one call, in which about 4 MiB travel. Raises UnreachableError with the cause."""
    stub = make_stub(probe_pb2_grpc.ProbeServiceStub, channel)
    probe = _Probe(stub.Probe(timeout=_PROBE_DEADLINE_S), swarm_id)
    try:
        return await _measure(probe, now)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter for a call that has ended already
        raise _unreachable(await probe.call.code(), await probe.call.details()) from None
    finally:
        probe.call.cancel()


async def call_dial_back(channel: grpc.aio.Channel, swarm_id: str, port: int) -> DialledBack:
    """Lets the node connect to `port` of this machine. Raises UnreachableError when it does not try."""
    stub = make_stub(probe_pb2_grpc.ProbeServiceStub, channel)
    request = probe_pb2.DialBackRequest(protocol_version=PROTOCOL_VERSION, swarm_id=swarm_id, port=port)
    try:
        reply: probe_pb2.DialBackReply = await stub.DialBack(request, timeout=_DIAL_DEADLINE_S)
        address = str(ipaddress.ip_address(reply.address))
    except grpc.aio.AioRpcError as error:
        raise _unreachable(error.code(), error.details()) from error
    except ValueError:
        raise UnreachableError("the node named no IP address that it dialled") from None
    return DialledBack(reply.connected, address, _short(reply.message))


class _Probe:
    """One call, in which every request has one reply."""

    def __init__(self, call: Any, swarm_id: str) -> None:
        self.call = call
        self._swarm_id = swarm_id

    async def exchange(self, sizes: list[tuple[int, int]]) -> float:
        """Sends requests at once, of so many bytes and for replies of so many, and gives the last reply's time."""
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
            if len(reply.payload) != wanted or not math.isfinite(reply.time):
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
    return UnreachableError(f"{code.name}: {_short(details or 'no reason given')}")


def _short(text: str) -> str:
    """What a node said, fit for a terminal."""
    return "".join(c for c in text[:_MOST_CHARACTERS] if c.isprintable())
