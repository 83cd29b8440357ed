"""gRPC over libp2p streams, for peers whose router accepts no incoming connections.

The caller's gRPC dials a unix socket here. Each connection becomes a stream to the other peer's p2pd, which connects it
to the unix socket that the peer's gRPC listens on. TLS runs from gRPC to gRPC, so neither p2pd nor a relay can read it.
If either side ends a stream, p2pd ends both directions: there is no half-close, and gRPC needs none.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import Owner
from peer.budget import FairBudget
from peer.errors import ExpertError, UnreachableError
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.metrics import start_at_zero
from peer.rates import TokenBuckets
from peer.transport.addresses import Multiaddress, RemoteEnd
from peer.transport.pipes import Exit, Listeners, Pipe, SocketStream, aborting, copy_both_ways

logger: logging.Logger = logging.getLogger(__name__)

PROTOCOL = "/talkoot/grpc/1"
OPEN_DEADLINE_S = 15.0
"""Time to open a stream: dialling, perhaps through a relay, and agreeing on the protocol."""

StreamHandler: TypeAlias = Callable[[PeerID, RemoteEnd, Pipe], Awaitable[None]]
"""Takes a stream that another peer opened. Its arguments are that peer, where the stream comes from, and the stream."""
OpenStream: TypeAlias = Callable[[PeerID, Sequence[Multiaddress], str, float], Awaitable[Pipe]]
"""Takes a peer, its addresses, the protocol and a deadline in seconds. Raises UnreachableError."""


class StreamServer(Protocol):
    async def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        """Passes other peers' streams of this protocol to the handler."""


@dataclass(frozen=True)
class TunnelLimits:
    """How much of this machine tunnels may use."""

    streams: int = 256
    """Open at the same time. Streams that others opened and streams that this peer opened are counted separately."""
    streams_of_peer: int = 16
    """Open at the same time from any one peer."""
    opened_per_s: float = 2.0
    """Rate at which one peer may open further streams, once it has opened as many as it may have open."""
    idle_s: float = 600.0
    """A stream that is idle for this long is closed. gRPC opens another one when it needs it."""


class Tunnels:
    """A peer's tunnels, both those to others and those that others open to it."""

    def __init__(
        self,
        open_stream: OpenStream,
        limits: TunnelLimits = TunnelLimits(),
        metrics: CollectorRegistry | None = None,
    ) -> None:
        self.streams: Gauge = Gauge(
            "talkoot_tunnel_streams", "Streams open in tunnels, both ways.", registry=metrics
        )
        opened = Counter(
            "talkoot_tunnel_opened", "Streams that others opened here.", ["way"], registry=metrics
        )
        self.opened: Counter = start_at_zero(opened, "relayed", "punched", "refused")
        self.failures: Counter = Counter(
            "talkoot_tunnel_failures", "Streams that this peer could not open.", registry=metrics
        )
        self.bytes: Counter = Counter(
            "talkoot_tunnel_bytes", "Carried in tunnels, both ways.", registry=metrics
        )
        self.last_relayed: bool | None = None
        """Whether the last stream that another peer opened came through a relay."""
        self._open_stream = open_stream
        self._limits = limits
        self._listeners = Listeners(limits.streams, self._forward)
        self._exit: Exit | None = None
        self._room = FairBudget(limits.streams)
        """Limits streams that others opened. Neighbourhoods, and then the peers in each, have fair shares."""
        self._opening = TokenBuckets[PeerID](limits.opened_per_s, limits.streams_of_peer)
        self._tasks = TaskSet()
        self.streams.set_function(lambda: len(self._tasks))

    def set_exit(self, open_exit: Exit, most_streams: int) -> None:
        """Connects other peers' streams there from now on. Until then, none is accepted."""
        self._exit = open_exit
        self._limits = replace(self._limits, streams=most_streams)
        self._room = FairBudget(most_streams)
        self._listeners.limit(most_streams)

    async def serve_on(self, server: StreamServer) -> None:
        """Accepts other peers' streams on a server, once an exit is set."""
        if self._exit is not None:
            await server.serve_streams(PROTOCOL, self._accept)

    async def open_to(self, peer_id: PeerID, addresses: Sequence[Multiaddress]) -> str:
        """See `Listeners.open_to`."""
        try:
            return await self._listeners.open_to(peer_id, addresses)
        except UnreachableError:
            self.failures.inc()
            raise

    def address_of(self, peer_id: PeerID) -> str:
        """The address that `open_to` returned for the peer."""
        return self._listeners.address_of(peer_id)

    async def close(self) -> None:
        """Ends all streams. Closing twice is harmless."""
        self._exit = None
        self._listeners.close()
        await self._tasks.aclose()

    async def _accept(self, caller: PeerID, end: RemoteEnd, pipe: Pipe) -> None:
        """Handles a stream that another peer opened."""
        now, task = time.monotonic(), asyncio.current_task()
        assert task is not None
        exit_, room, owner = self._exit, None, Owner(end.neighbourhood, caller)

        def give_up() -> None:
            task.cancel()

        is_modest = self._room.held(owner) < self._limits.streams_of_peer
        if exit_ is not None and is_modest and not self._opening.wait_s(caller, now):
            with contextlib.suppress(ExpertError):
                room = self._room.reserve(owner, 1, give_up)
        if exit_ is None or room is None:
            self.opened.labels("refused").inc()
            pipe[1].close()
            return
        self._opening.take(caller, 1, now)
        self.last_relayed = end.is_relayed
        self.opened.labels("relayed" if end.is_relayed else "punched").inc()
        try:
            await self._connect_pipes(pipe, exit_(caller, end.neighbourhood))
        finally:
            room.release()

    async def _forward(self, peer_id: PeerID, addresses: Sequence[Multiaddress], accepted: Pipe) -> None:
        """Handles a connection from this process's own gRPC."""
        if len(self._tasks) >= 2 * self._limits.streams:
            accepted[1].close()
            return
        stream = self._open_stream(peer_id, addresses, PROTOCOL, OPEN_DEADLINE_S)
        await self._connect_pipes(accepted, stream)

    async def _connect_pipes(self, here: Pipe, opening: Awaitable[Pipe]) -> None:
        """Copies between a pipe and one that is still being opened. `close` cancels the task that runs this."""
        try:
            with self._tasks.including_current(), aborting(here):
                there = await opening
                with aborting(there):
                    idle_s = self._limits.idle_s
                    await copy_both_ways(SocketStream(here), SocketStream(there), idle_s, self.bytes.inc)
        except UnreachableError as error:
            self.failures.inc()
            logger.debug("%s", error)
        except (OSError, TimeoutError) as error:
            logger.debug("a tunnel ended: %s", error)
