"""gRPC over libp2p streams, for peers whose router lets no connections in.

The caller's gRPC dials a unix socket here; each connection becomes a stream to that peer's p2pd, which pipes it to the
unix socket that its gRPC listens on. TLS runs from gRPC to gRPC: whoever is in between (p2pd, relays) sees none of it.
p2pd ends a stream whole when either side ends it: there is no half-close, and gRPC needs none.
"""

import asyncio
import contextlib
import logging
import os
import tempfile
from collections import Counter as Multiset
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.metrics import start_at_zero
from peer.processes import socket_folder, sweep_dead_folders
from peer.transport.addresses import is_relayed

logger = logging.getLogger(__name__)

_FOLDERS = "talkoot-tunnel-"
PROTOCOL = "/talkoot/grpc/1"
OPEN_DEADLINE_S = 15.0
"""Longest that opening a stream may take: dialling, a relay, and asking for the protocol."""
_PIECE_BYTES = 256 * 2**10
_END_DEADLINE_S = 5.0
"""Longest that what one side sent last may take to reach the other."""

Pipe: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OpenStream: TypeAlias = Callable[[PeerID, Sequence[str], str, float], Awaitable[Pipe]]
"""Of a peer, addresses of it, the protocol and a deadline in seconds. Raises UnreachableError."""


@dataclass(frozen=True)
class TunnelLimits:
    """What tunnels may take of this machine."""

    streams: int = 256
    """Open at the same time, those that others opened and those of this peer each."""
    streams_of_peer: int = 16
    """Of those, that one other peer may have opened."""
    idle_s: float = 600.0
    """A stream over which nothing went for so long is ended; gRPC opens another when it needs one."""


class Tunnels:
    """A peer's tunnels: those that it digs to others, and the end of those that others dig to it."""

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
        """Whether the stream that another peer opened last came through a relay."""
        self._open_stream = open_stream
        self._limits = limits
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._entrances: OrderedDict[PeerID, _Listener] = OrderedDict()  # least recently used first
        self._exit: Path | None = None
        self._incoming: Multiset[PeerID] = Multiset()
        self._tasks: set[asyncio.Task[None]] = set()
        self.streams.set_function(lambda: len(self._tasks))

    def exit_path(self) -> Path:
        """Where this peer's gRPC server is to listen, to be reached by tunnels."""
        return self._path("exit")

    def set_exit(self, path: Path, most_streams: int) -> None:
        """From now on streams of other peers lead to this unix socket. Before, none is accepted."""
        self._exit = path
        self._limits = replace(self._limits, streams=most_streams)

    async def serve_on(self, daemon: Any) -> None:
        """Lets other peers' streams in through this p2pd, if they lead anywhere."""
        if self._exit is not None:
            await daemon.add_binary_stream_handler(PROTOCOL, self._accept)

    async def open_to(self, peer_id: PeerID, addresses: Sequence[str]) -> str:
        """Where gRPC dials that peer through a tunnel; nothing is dialled yet.

        `addresses`: multiaddresses of the peer, such as it announces now. Raises UnreachableError when this machine has
        no more sockets.
        """
        entrance = self._entrances.get(peer_id) or await self._entrance_to(peer_id)
        entrance.addresses = tuple(addresses)
        self._entrances.move_to_end(peer_id)
        while len(self._entrances) > self._limits.streams:
            _, oldest = self._entrances.popitem(last=False)
            oldest.close()
        return _grpc_name(entrance.path)

    async def _entrance_to(self, peer_id: PeerID) -> "_Listener":
        entrance = self._entrances[peer_id] = _Listener(self._path(_file_name(peer_id)))
        try:
            entrance.server = await asyncio.start_unix_server(
                lambda reader, writer: self._dig(peer_id, entrance, (reader, writer)),
                str(entrance.path),
                limit=_PIECE_BYTES,
            )
        except OSError as error:
            self._entrances.pop(peer_id, None)  # the next call tries again
            self.failures.inc()
            raise UnreachableError(f"no tunnel to {peer_id} can be dug here: {error}") from error
        return entrance

    def address_of(self, peer_id: PeerID) -> str:
        """What `to` gave for the peer."""
        return _grpc_name(self._path(_file_name(peer_id)))

    async def close(self) -> None:
        """Ends all streams. Closing twice is harmless."""
        self._exit = None
        while self._entrances:
            self._entrances.popitem()[1].close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    async def _accept(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A stream that another peer opened, as hivemind hands it over."""
        caller: PeerID = info.peer_id
        if self._exit is None or not self._has_room(caller):
            self.opened.labels("refused").inc()
            writer.close()
            return
        self.last_relayed = is_relayed(str(info.addr))
        self.opened.labels("relayed" if self.last_relayed else "punched").inc()
        self._incoming[caller] += 1
        try:
            await self._carried((reader, writer), self._connect(self._exit))
        finally:
            self._incoming[caller] -= 1
            if not self._incoming[caller]:
                del self._incoming[caller]

    def _has_room(self, caller: PeerID) -> bool:
        limits = self._limits
        return self._incoming[caller] < limits.streams_of_peer and self._incoming.total() < limits.streams

    async def _connect(self, path: Path) -> Pipe:
        return await asyncio.open_unix_connection(str(path), limit=_PIECE_BYTES)

    async def _dig(self, peer_id: PeerID, entrance: "_Listener", accepted: Pipe) -> None:
        """For a connection of this process's own gRPC."""
        if len(self._tasks) >= 2 * self._limits.streams:
            accepted[1].close()
            return
        stream = self._open_stream(peer_id, entrance.addresses, PROTOCOL, OPEN_DEADLINE_S)
        await self._carried(accepted, stream)

    async def _carried(self, here: Pipe, opening: Awaitable[Pipe]) -> None:
        """Carries between one end and another that is still to be opened, as a task that `close` ends."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.closing(here[1]):
                there = await opening
                with contextlib.closing(there[1]):
                    await self._carry(here, there)
        except UnreachableError as error:
            self.failures.inc()
            logger.debug("%s", error)
        except (OSError, TimeoutError) as error:
            logger.debug("a tunnel ended: %s", error)
        finally:
            self._tasks.discard(task)

    async def _carry(self, here: Pipe, there: Pipe) -> None:
        """Until either side ends. What one end does not take, is not read from the other."""
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
                piece = await source.read(_PIECE_BYTES)
            if not piece:
                break
            self.bytes.inc(len(piece))
            target.write(piece)
            async with asyncio.timeout(self._limits.idle_s):
                await target.drain()
        target.close()
        async with asyncio.timeout(_END_DEADLINE_S):
            await target.wait_closed()

    def _path(self, name: str) -> Path:
        if self._folder is None:  # mode 0700: only this user's processes get in
            sweep_dead_folders(_FOLDERS)
            self._folder = tempfile.TemporaryDirectory(
                prefix=f"{_FOLDERS}{os.getpid()}-", dir=socket_folder()
            )
        return Path(self._folder.name) / name


def _file_name(peer_id: PeerID) -> str:
    """Short: a unix socket's path has at most 107 bytes."""
    return str(peer_id.to_base58()[-16:])


def _grpc_name(path: Path) -> str:
    return f"unix:{path}"


class _Listener:
    """A unix socket by which gRPC reaches one peer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.addresses: tuple[str, ...] = ()
        self.server: asyncio.Server | None = None

    def close(self) -> None:
        """Streams that are open go on."""
        if self.server is not None:
            self.server.close()
        self.path.unlink(missing_ok=True)
