"""Streams of bytes in both directions, whatever carries them, and the sockets that this process's own gRPC dials for
them.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

from peer.bounded import BoundedDict
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.loop import first_of
from peer.platform.sockets import SocketFolder, bind_within, remove_socket, serve_within
from peer.transport.addresses import Multiaddress

Pipe: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Exit: TypeAlias = Callable[[PeerID, str], Awaitable[Pipe]]
"""Connects a caller to a gRPC server of this peer. The caller comes from this neighbourhood, through a tunnel or a
relay. Raises OSError.
"""
CHUNK_BYTES = 256 * 2**10
_FLUSH_S = 5.0
"""How long the last bytes of one side may take to reach the other."""


@contextmanager
def aborting(pipe: Pipe) -> Iterator[None]:
    """Closes the pipe at the end, and drops what its other end has not read. If a stranger is there, who reads nothing,
    `close` would keep the socket open without end.
    """
    try:
        yield
    finally:
        pipe[1].transport.abort()


class ByteStream(Protocol):
    """One side of a two-way copy."""

    async def read(self) -> bytes:
        """Some bytes as soon as there are any; empty once the other end has ended. Raises OSError."""

    async def write(self, data: bytes) -> None:
        """Returns when the stream accepts more. Raises OSError."""

    async def end(self) -> None:
        """Waits until everything written has been sent, and ends the stream. Raises OSError."""


class SocketStream:
    """A byte stream over a socket."""

    def __init__(self, pipe: Pipe, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._reader, self._writer = pipe
        self._chunk_bytes = chunk_bytes

    async def read(self) -> bytes:
        return await self._reader.read(self._chunk_bytes)

    async def write(self, data: bytes) -> None:
        # uvloop would raise RuntimeError if the other end has reset the connection
        if self._writer.is_closing():
            raise ConnectionResetError("the other end has closed the connection")
        self._writer.write(data)
        await self._writer.drain()

    async def end(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def copy_both_ways(
    here: ByteStream, there: ByteStream, idle_s: float, count: Callable[[int], object]
) -> None:
    """Copies both ways until either side ends. Reads no faster than the other side accepts. `count`: called with
    numbers of bytes.

    Raises OSError if a stream breaks, or if nothing is copied in either direction for `idle_s`.
    """
    now = asyncio.get_running_loop().time

    async def copy(source: ByteStream, target: ByteStream) -> None:
        while data := await source.read():
            count(len(data))
            await target.write(data)
            idle.reschedule(now() + idle_s)
        async with asyncio.timeout(_FLUSH_S):
            await target.end()

    async with asyncio.timeout(idle_s) as idle:
        await first_of(copy(here, there), copy(there, here))


class Listeners:
    """Sockets by which this process's own gRPC reaches other peers, one for each peer. For one event loop."""

    def __init__(
        self, most: int, accept: Callable[[PeerID, Sequence[Multiaddress], Pipe], Awaitable[None]]
    ) -> None:
        """`most`: sockets. If there are too many, the least recently used is closed, and its streams stay open.

        `accept`: handles a connection to a peer, and gets the peer's addresses. It must not raise.
        """
        self._accept = accept
        self._folder = SocketFolder()
        self._listeners = BoundedDict[PeerID, _Listener](most)

    def limit(self, most: int) -> None:
        self._listeners.most = most

    async def open_to(self, peer_id: PeerID, addresses: Sequence[Multiaddress]) -> str:
        """Returns the address at which gRPC reaches that peer. Nothing is dialled yet.

        `addresses`: the multiaddresses that the peer announces now. Raises UnreachableError if this machine has no
        sockets left.
        """
        listener = self._listeners.get(peer_id) or await self._listen_for(peer_id)
        listener.addresses = tuple(addresses)
        self._keep(peer_id, listener)
        return listener.address

    def address_of(self, peer_id: PeerID) -> str:
        """The address that `open_to` returned for the peer; empty if its socket is closed."""
        listener = self._listeners.get(peer_id)
        return "" if listener is None else listener.address

    def close(self) -> None:
        """Closing twice is harmless."""
        while self._listeners:
            self._listeners.popitem()[1].close()
        self._folder.close()

    async def _listen_for(self, peer_id: PeerID) -> "_Listener":
        try:
            # short, because a unix socket's path has at most 107 bytes
            bound, address = bind_within(self._folder, str(peer_id.to_base58()[-16:]))
        except OSError as error:
            raise UnreachableError(f"can't connect to {peer_id}: {error}") from error
        listener = _Listener(address, bound)
        self._keep(peer_id, listener)
        try:
            listener.server = await serve_within(
                lambda reader, writer: self._accept(peer_id, listener.addresses, (reader, writer)),
                bound,
                CHUNK_BYTES,
            )
        except OSError as error:
            listener.close()
            self._listeners.pop(peer_id, None)  # the next call tries again
            raise UnreachableError(f"can't connect to {peer_id}: {error}") from error
        return listener

    def _keep(self, peer_id: PeerID, listener: "_Listener") -> None:
        """Keeps the listener as the most recently used one."""
        for oldest in self._listeners.put(peer_id, listener):
            oldest.close()


class _Listener:
    """The socket at which gRPC reaches one peer."""

    def __init__(self, address: str, bound: socket.socket) -> None:
        self.address = address
        self.addresses: tuple[Multiaddress, ...] = ()
        self.server: asyncio.Server | None = None
        self._bound = bound

    def close(self) -> None:
        """Open streams stay open."""
        if self.server is not None:
            self.server.close()
        self._bound.close()
        remove_socket(self.address)
