"""gRPC over libp2p streams, for peers whose router accepts no incoming connections.

The caller's gRPC dials a unix socket here. Each connection becomes a stream to the other peer's p2pd, which pipes it to
the unix socket that the peer's gRPC listens on. TLS runs from gRPC to gRPC, so neither p2pd nor a relay can read it. If
either side ends a stream, p2pd ends both directions: there is no half-close, and gRPC needs none.
"""

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import BoundedDict
from peer.budget import FairBudget
from peer.errors import ExpertError, UnreachableError
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.metrics import start_at_zero
from peer.processes import private_socket_folder
from peer.rates import TokenBuckets
from peer.transport.addresses import Multiaddress, is_circuit

logger = logging.getLogger(__name__)

PROTOCOL = "/talkoot/grpc/1"
OPEN_DEADLINE_S = 15.0
"""To open a stream: dialling, a relay, and agreeing on the protocol."""
_FLUSH_DEADLINE_S = 5.0
"""For the last bytes of one side to reach the other."""
_CHUNK_BYTES = 256 * 2**10

Pipe: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OpenExit: TypeAlias = Callable[[PeerID], Awaitable[Pipe]]
"""Connects a peer whose tunnel ends here with this peer's gRPC server. Raises OSError."""
OpenStream: TypeAlias = Callable[[PeerID, Sequence[Multiaddress], str, float], Awaitable[Pipe]]
"""Takes a peer, its addresses, the protocol and a deadline in seconds. Raises UnreachableError."""


@dataclass(frozen=True)
class TunnelLimits:
    """How much of this machine tunnels may use."""

    streams: int = 256
    """Open at the same time, counted separately for those that others opened and those that this peer opened."""
    streams_of_peer: int = 16
    """Open at the same time from one other peer."""
    opened_per_s: float = 2.0
    """By one other peer, once it has opened as many as it may have open."""
    idle_s: float = 600.0
    """A stream that is idle for this long is closed; gRPC opens another one when it needs it."""


class Tunnels:
    """A peer's tunnels, both those to others and those that others open to it."""

    def __init__(
        self,
        open_stream: OpenStream,
        limits: TunnelLimits = TunnelLimits(),
        metrics: CollectorRegistry | None = None,
    ) -> None:
        self.streams = Gauge(
            "talkoot_tunnel_streams", "Streams open in tunnels, both ways.", registry=metrics
        )
        opened = Counter(
            "talkoot_tunnel_opened", "Streams that others opened here.", ["way"], registry=metrics
        )
        self.opened = start_at_zero(opened, "relayed", "punched", "refused")
        self.failures = Counter(
            "talkoot_tunnel_failures", "Streams that this peer could not open.", registry=metrics
        )
        self.bytes = Counter("talkoot_tunnel_bytes", "Carried in tunnels, both ways.", registry=metrics)
        self.last_relayed: bool | None = None
        """Whether the last stream that another peer opened came through a relay."""
        self._open_stream = open_stream
        self._limits = limits
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._listeners = BoundedDict[PeerID, _Listener](limits.streams)  # least recently used first
        self._exit: OpenExit | None = None
        self._room = FairBudget(limits.streams)
        """Streams that others opened. When all are open, the peer with the most gives one up for another peer."""
        self._opening = TokenBuckets[PeerID](limits.opened_per_s, limits.streams_of_peer)
        self._tasks = TaskSet()
        self.streams.set_function(lambda: len(self._tasks))

    def set_exit(self, open_exit: OpenExit, most_streams: int) -> None:
        """Leads other peers' streams there from now on. Before, none is accepted."""
        self._exit = open_exit
        self._limits = replace(self._limits, streams=most_streams)
        self._room = FairBudget(most_streams)
        self._listeners.most = most_streams

    async def serve_on(self, daemon: Any) -> None:
        """Accepts other peers' streams from this p2pd, if an exit is set."""
        if self._exit is not None:
            await daemon.add_binary_stream_handler(PROTOCOL, self._accept)

    async def open_to(self, peer_id: PeerID, addresses: Sequence[Multiaddress]) -> str:
        """Returns the address at which gRPC reaches that peer through a tunnel; nothing is dialled yet.

        `addresses`: the multiaddresses that the peer announces now. Raises UnreachableError if this machine has no
        sockets left.
        """
        listener = self._listeners.get(peer_id) or await self._listen_for(peer_id)
        listener.addresses = tuple(addresses)
        self._keep(peer_id, listener)
        return _grpc_name(listener.path)

    async def _listen_for(self, peer_id: PeerID) -> "_Listener":
        listener = _Listener(self._path(_file_name(peer_id)))
        self._keep(peer_id, listener)
        try:
            listener.server = await asyncio.start_unix_server(
                lambda reader, writer: self._forward(peer_id, listener, (reader, writer)),
                str(listener.path),
                limit=_CHUNK_BYTES,
            )
        except OSError as error:
            self._listeners.pop(peer_id, None)  # the next call tries again
            self.failures.inc()
            raise UnreachableError(f"can't open a tunnel to {peer_id}: {error}") from error
        return listener

    def _keep(self, peer_id: PeerID, listener: "_Listener") -> None:
        """As the one used last; the least recently used ones are closed when there are too many."""
        for oldest in self._listeners.put(peer_id, listener):
            oldest.close()

    def address_of(self, peer_id: PeerID) -> str:
        """The address that `open_to` returned for the peer."""
        return _grpc_name(self._path(_file_name(peer_id)))

    async def close(self) -> None:
        """Ends all streams. Closing twice is harmless."""
        self._exit = None
        while self._listeners:
            self._listeners.popitem()[1].close()
        await self._tasks.aclose()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    async def _accept(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handles a stream that another peer opened; hivemind calls it."""
        caller: PeerID = info.peer_id
        now, task = time.monotonic(), asyncio.current_task()
        assert task is not None
        exit_, room = self._exit, None

        def give_up() -> None:
            task.cancel()

        is_modest = self._room.held(caller) < self._limits.streams_of_peer
        if exit_ is not None and is_modest and not self._opening.wait_s(caller, now):
            with contextlib.suppress(ExpertError):
                room = self._room.reserve(caller, 1, give_up)
        if exit_ is None or room is None:
            self.opened.labels("refused").inc()
            writer.close()
            return
        self._opening.take(caller, 1, now)
        self.last_relayed = is_circuit(info.addr.to_bytes())
        self.opened.labels("relayed" if self.last_relayed else "punched").inc()
        try:
            await self._connect_pipes((reader, writer), exit_(caller))
        finally:
            room.release()

    async def _forward(self, peer_id: PeerID, listener: "_Listener", accepted: Pipe) -> None:
        """Handles a connection of this process's own gRPC."""
        if len(self._tasks) >= 2 * self._limits.streams:
            accepted[1].close()
            return
        stream = self._open_stream(peer_id, listener.addresses, PROTOCOL, OPEN_DEADLINE_S)
        await self._connect_pipes(accepted, stream)

    async def _connect_pipes(self, here: Pipe, opening: Awaitable[Pipe]) -> None:
        """Copies between a pipe and one that is still being opened. `close` cancels the current task."""
        try:
            with self._tasks.including_current(), contextlib.closing(here[1]):
                there = await opening
                with contextlib.closing(there[1]):
                    await self._copy_both_ways(here, there)
        except UnreachableError as error:
            self.failures.inc()
            logger.debug("%s", error)
        except (OSError, TimeoutError) as error:
            logger.debug("a tunnel ended: %s", error)

    async def _copy_both_ways(self, here: Pipe, there: Pipe) -> None:
        """Copies both ways until either side ends. Reads no faster than the other side accepts."""
        ways = [
            asyncio.create_task(self._copy(here[0], there[1])),
            asyncio.create_task(self._copy(there[0], here[1])),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for error in await asyncio.gather(*ways, return_exceptions=True):
                if isinstance(error, OSError):
                    logger.debug("a tunnel broke: %s", error)

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(self._limits.idle_s):
                chunk = await source.read(_CHUNK_BYTES)
            if not chunk:
                break
            self.bytes.inc(len(chunk))
            target.write(chunk)
            async with asyncio.timeout(self._limits.idle_s):
                await target.drain()
        target.close()
        async with asyncio.timeout(_FLUSH_DEADLINE_S):
            await target.wait_closed()

    def _path(self, name: str) -> Path:
        if self._folder is None:
            self._folder = private_socket_folder()
        return Path(self._folder.name) / name


class _Listener:
    """The unix socket at which gRPC reaches one peer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.addresses: tuple[Multiaddress, ...] = ()
        self.server: asyncio.Server | None = None

    def close(self) -> None:
        """Streams that are open stay open."""
        if self.server is not None:
            self.server.close()
        self.path.unlink(missing_ok=True)


def _file_name(peer_id: PeerID) -> str:
    """Short, because a unix socket's path has at most 107 bytes."""
    return str(peer_id.to_base58()[-16:])


def _grpc_name(path: Path) -> str:
    return f"unix:{path}"
