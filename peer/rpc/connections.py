"""The connections of a server: how many each caller may have, and which one is closed when there are too many. gRPC
can't limit connections by caller. So gRPC listens on a socket within this machine, and `Connections` listens on the
network in its place. Bytes are copied as they are, including TLS. Each connection reaches gRPC from a socket with a
name of its own, by which a call finds its connection. A connection that begins with a name is not for gRPC: it goes to
whoever expects that name.

A connection is *proven* once a call on it is in a session. Few unproven connections are allowed, and neighbourhoods
take turns with TLS handshakes. The neighbourhood with the most connections makes room, with silent ones first.
"""

import asyncio
import contextlib
import secrets
import socket
import time
from collections import Counter as Multiset
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from operator import itemgetter
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import BoundedDict
from peer.errors import PortError
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.metrics import start_at_zero
from peer.platform.processes import most_descriptors, open_descriptors
from peer.platform.sockets import ServerSocket, attach, probe_when_idle, streams_of
from peer.rates import FairTurns
from peer.transport.endpoints import address_of, ip_address, neighbourhood
from peer.transport.pipes import Pipe

MARK = b"talkoot circuit\n"
NAME_BYTES = 16
"""A connection that begins with the mark goes on with a name. TLS begins with another byte."""
_MOST_CONNECTIONS = 2048
_DESCRIPTORS_EACH = 3
_LEAST_LEFT, _MOST_LEFT = 24, 256
"""How many descriptors are left for everything else, such as checkpoints and this peer's own calls: a sixteenth of all,
within these bounds.
"""
_UNPROVEN_SHARE = 1 / 4
_CONNECTIONS_OF_CALLER = 96
"""32 ends of circuits that it dialled, 32 of those that it accepted, and others."""
_FIRST_BYTES_S, _PROOF_S = 5.0, 20.0
"""A connection is closed if it has sent no byte after the first time, or has no call in a session after the second.
"""
_STARTS_PER_S, _STARTS_AT_ONCE = 100.0, 200.0
"""TLS handshakes of all callers together. Each takes less than a millisecond."""
_NEAR_STARTS_PER_S, _NEAR_STARTS_AT_ONCE, _MOST_NEAR_WAITING = 20.0, 40.0, 100
"""The same of all callers in one neighbourhood, and how many of them may wait. On each new connection, 128 calls may
begin before one is refused.
"""
_SWEEP_S = 1.0
_RECOUNT_S = 0.05
_BUFFER_BYTES = 2**20
_STREAM_BYTES = 32 * 2**10
"""While twice as many bytes of a connection with a name wait to be read, no more are received."""
_MOST_UNSENT_BYTES = 64 * 2**20
"""The most bytes that wait for callers to read them, over all connections. This is in addition to the memory for calls.
"""
_FLUSH_S = 5.0
_BACKLOG = 1024


@dataclass(eq=False, slots=True)
class Connection:
    """A caller's connection."""

    peer: str
    """The caller's address as gRPC names it. Through a tunnel or a relay, its neighbourhood and its PeerID, which
    libp2p has proved or which the relay claims.
    """
    origin: str
    """The caller's neighbourhood."""
    close: Callable[[], None]
    began_at: float
    has_spoken: bool = False
    caller: PeerID | None = None
    """The peer that has proved to be at the other end."""
    calls: int = 0
    """Calls in progress."""
    unsent: Callable[[], int] = lambda: 0
    """Bytes that wait for the caller to read them."""


@dataclass(frozen=True)
class Expected:
    """A connection that a caller will open."""

    caller: PeerID
    name: bytes
    """With it the connection begins. Only the caller may learn it."""
    arrived: "asyncio.Future[Pipe]"
    """The rest of the connection."""


class ConnectionTable:
    """The open connections, bounded. Pure: `now` is an argument, and callers close the connections."""

    def __init__(self, most: int) -> None:
        self._most_unproven = max(1, int(most * _UNPROVEN_SHARE))
        self._most_proven = max(1, most - self._most_unproven)
        self._unproven: dict[str, dict[Connection, None]] = {}
        """Unproven connections by origin, the oldest first."""
        self._proven: dict[str, dict[Connection, None]] = {}
        """Proven connections by origin, the one used longest ago first."""
        self._counts: Multiset[bool] = Multiset()
        """The number of connections, by whether they are proven."""
        self._of_caller: Multiset[PeerID] = Multiset()

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, connection: Connection) -> Connection | None:
        """Adds a connection. Returns another one that must be closed to make room, and is no longer in the table."""
        self._put(self._unproven, connection)
        return self.shed() if self._counts[False] > self._most_unproven else None

    def shed(self) -> Connection | None:
        """Returns the unproven connection that is worth least. It must be closed, and is no longer in the table."""
        if not self._unproven:
            return None
        group = _largest(self._unproven)
        silent = (connection for connection in group if not connection.has_spoken)
        return self._drop(next(silent, next(iter(group))))

    def prove(self, connection: Connection, caller: PeerID) -> Connection | None:
        """Records a call of the caller on a connection. Returns a connection that must be closed."""
        if connection not in self:
            return None
        self.remove(connection)
        connection.caller = caller
        self._put(self._proven, connection)
        if self._of_caller[caller] > _CONNECTIONS_OF_CALLER:
            group: dict[Connection, None] | list[Connection] = [
                other for other in self._proven[connection.origin] if other.caller == caller
            ]
        elif self._counts[True] > self._most_proven:
            group = _largest(self._proven)
        else:
            return None
        # the idle connection that was used longest ago
        return self._drop(min(group, key=lambda other: other.calls))

    def remove(self, connection: Connection) -> None:
        """Removing one twice is harmless."""
        groups = self._unproven if connection.caller is None else self._proven
        group = groups.get(connection.origin, {})
        if connection not in group:
            return
        del group[connection]
        self._counts[connection.caller is not None] -= 1
        if not group:
            del groups[connection.origin]
        if connection.caller is not None:
            self._of_caller[connection.caller] -= 1
            if not self._of_caller[connection.caller]:
                del self._of_caller[connection.caller]

    def overdue(self, now: float) -> list[Connection]:
        """Connections that are still unproven although their time is up."""
        return [
            connection
            for group in self._unproven.values()
            for connection in group
            if not connection.calls
            and now > connection.began_at + (_PROOF_S if connection.has_spoken else _FIRST_BYTES_S)
        ]

    def unread(self, most: int) -> list[Connection]:
        """Connections to close so that at most `most` bytes wait to be read.

        The neighbourhood for which the most bytes wait makes room, its fullest connection first.
        """
        waiting: dict[str, list[tuple[int, Connection]]] = {}
        for connection in self.all():
            if unsent := connection.unsent():
                waiting.setdefault(connection.origin, []).append((unsent, connection))
        sums = {origin: sum(size for size, _ in group) for origin, group in waiting.items()}
        for group in waiting.values():
            group.sort(key=itemgetter(0))
        found = []
        while sum(sums.values()) > most:
            origin = max(sums, key=sums.__getitem__)
            size, connection = waiting[origin].pop()
            sums[origin] -= size
            found.append(connection)
        return found

    def __contains__(self, connection: Connection) -> bool:
        groups = self._unproven if connection.caller is None else self._proven
        return connection in groups.get(connection.origin, ())

    def all(self) -> list[Connection]:
        groups = (*self._unproven.values(), *self._proven.values())
        return [connection for group in groups for connection in group]

    def _put(self, groups: dict[str, dict[Connection, None]], connection: Connection) -> None:
        groups.setdefault(connection.origin, {})[connection] = None
        self._counts[connection.caller is not None] += 1
        if connection.caller is not None:
            self._of_caller[connection.caller] += 1

    def _drop(self, connection: Connection) -> Connection:
        self.remove(connection)
        return connection


def _largest(groups: dict[str, dict[Connection, None]]) -> dict[Connection, None]:
    return max(groups.values(), key=len)


class Connections:
    """Listens for a server, and connects callers to it. For one event loop; `close` it when done."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        gauge = Gauge("talkoot_connections", "Connections of callers, open now.", registry=metrics)
        gauge.set_function(lambda: len(self._table))
        closed = Counter(
            "talkoot_connections_closed",
            "Connections closed here: there were too many, their caller said nothing, read nothing, or abused them, or "
            "named a circuit that nobody expects.",
            ["reason"],
            registry=metrics,
        )
        self.closed: Counter = start_at_zero(closed, "crowded", "silent", "unread", "abused", "unexpected")
        self._table = ConnectionTable(most_connections())
        self._by_name: dict[str, Connection] = {}
        self._expected: dict[bytes, Expected] = {}
        self._near_starts = BoundedDict[str, FairTurns](1024)
        self._starts = FairTurns(_STARTS_PER_S, _STARTS_AT_ONCE, same=1)
        self.server: ServerSocket = ServerSocket()
        """Where gRPC must listen."""
        self._short_until = 0.0
        """Until when few descriptors are assumed to be left; 0.0: enough were."""
        self._short_with = 0
        """How many connections there were when descriptors were last counted."""
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self.ends: set[_End] = set()
        """Both ends of all connections from outside."""
        self._tasks = TaskSet()

    async def listen(self, host: str, port: int) -> int:
        """Accepts callers for the server, which must already be listening. Returns the port. Raises PortError."""
        loop = asyncio.get_running_loop()
        try:
            listening = _listening_socket(host, port)
        except OSError as error:
            raise PortError(f"can't listen on {host} port {port}: pass another port") from error
        bound = int(listening.getsockname()[1])
        self._listener = await loop.create_server(lambda: _Outside(self), sock=listening, backlog=_BACKLOG)
        self._sweep()
        return bound

    async def open_for(self, caller: PeerID, origin: str) -> Pipe:
        """A connection to the server for a peer that comes from this neighbourhood, through a tunnel or a relay. Raises
        OSError.
        """
        peer = f"{origin}/{caller}"
        if not await self._has_turn(origin, peer):
            self.closed.labels("crowded").inc()
            raise ConnectionRefusedError(f"too many callers of {origin} wait for a connection")
        made, name = await self.server.dial()
        reader, writer = await streams_of(made)
        connection = Connection(peer, origin, writer.transport.abort, time.monotonic(), has_spoken=True)
        self._by_name[name] = connection
        self.add(connection)
        self._tasks.spawn(self._wait_for_end(writer, connection, name), "wait for the end of a tunnel")
        return reader, writer

    @contextmanager
    def expecting(self, caller: PeerID) -> Iterator[Expected]:
        """Expects one connection of this caller, and closes it at the end."""
        arrived = asyncio.get_running_loop().create_future()
        expected = Expected(caller, secrets.token_bytes(NAME_BYTES), arrived)
        self._expected[expected.name] = expected
        try:
            yield expected
        finally:
            self._expected.pop(expected.name, None)
            if not arrived.cancel() and not arrived.cancelled():
                arrived.result()[1].transport.abort()

    def find(self, peer: str) -> Connection | None:
        """`peer`: the caller's name in gRPC. None if its connection is closed."""
        return self._by_name.get(peer)

    def prove(self, connection: Connection, caller: PeerID) -> None:
        """Records that a call of this caller came on the connection."""
        self._close(self._table.prove(connection, caller), "crowded")

    def punish(self, connection: Connection, reason: str = "abused") -> None:
        """Closes a connection whose caller misbehaves, does not read (`unread`), or names a circuit that nobody expects
        (`unexpected`).
        """
        if connection in self._table:
            self._table.remove(connection)
            self._close(connection, reason)

    def stop_listening(self) -> None:
        """Accepts no more connections. Existing ones stay open."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def close(self) -> None:
        """Ends all connections. Closing twice is harmless."""
        self.stop_listening()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in self._table.all():
            connection.close()
        await self._tasks.aclose()
        while self.ends:
            for end in list(self.ends):  # one may have been accepted since the last turn of the loop
                end.abort()
            await asyncio.sleep(0)  # in its next turn, the loop tells them that they are closed
        self.server.close()

    def add(self, connection: Connection, descriptor: int = 0) -> None:
        """`descriptor`: of the connection's socket. The lowest free descriptor is given out, so a high one means that
        few are left.
        """
        self._close(self._table.add(connection), "crowded")
        if self._are_few_left(descriptor):  # in that case, a new connection must replace another
            self._close(self._table.shed(), "crowded")

    def forget(self, connection: Connection, name: str = "") -> None:
        self._table.remove(connection)
        self._by_name.pop(name, None)

    def begin(self, outside: "_Outside") -> "asyncio.Task[None]":
        """Connects a caller to the server when it is its turn. Cancel the task if it is closed before that."""
        return self._tasks.spawn(self._wait_for_turn(outside), "wait for a caller's turn")

    def hand_over(self, outside: "_Outside", name: bytes) -> None:
        """Gives a connection to whoever expects its name."""
        expected, connection = self._expected.pop(name, None), outside.connection
        if expected is None or expected.arrived.done() or connection not in self._table:
            self.punish(connection, "unexpected")
            return
        connection.calls = 1  # as long as it is open, it is used
        self.prove(connection, expected.caller)
        reader, writer = outside.streams()
        probe_when_idle(writer)
        self._tasks.spawn(self._wait_for_end(writer, connection), "wait for the end of a circuit")
        expected.arrived.set_result((reader, writer))

    async def _wait_for_turn(self, outside: "_Outside") -> None:
        caller = outside.connection
        if not await self._has_turn(caller.origin, caller.peer):
            self._table.remove(caller)
            self._close(caller, "crowded")
        elif outside.is_open:
            self._tasks.spawn(self._connect(outside), "connect a caller with the server")

    async def _has_turn(self, origin: str, peer: str) -> bool:
        """Waits for a caller's turn. False if too many others wait."""
        near = self._near_starts.get(origin) or FairTurns(
            _NEAR_STARTS_PER_S, _NEAR_STARTS_AT_ONCE, near=_MOST_NEAR_WAITING
        )
        self._near_starts[origin] = near
        return await near.turn("", peer) and await self._starts.turn(origin, peer)

    async def _connect(self, outside: "_Outside") -> None:
        caller = outside.connection
        try:
            made, name = await self.server.dial()
        except OSError:  # no descriptor is left, or the server has stopped
            caller.close()
            return
        self._by_name[name] = caller
        inside = _End(lambda: self.forget(caller, name), self.ends)
        try:
            await attach(inside, made)
        except OSError:
            made.close()
            self.forget(caller, name)
            caller.close()
        else:
            outside.join(inside)

    async def _wait_for_end(
        self, writer: asyncio.StreamWriter, connection: Connection, name: str = ""
    ) -> None:
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self.forget(connection, name)

    def _are_few_left(self, descriptor: int) -> bool:
        """Whether few descriptors are left. Counts the open ones only if a high one was given out lately, and then
        again after a while, or as soon as there are fewer connections.
        """
        now, connections = time.monotonic(), len(self._table)
        is_outdated = now >= self._short_until or connections < self._short_with
        if is_outdated and (self._short_until or descriptor >= _most_descriptors()):
            are_few = open_descriptors() >= _most_descriptors()
            self._short_until, self._short_with = (now + _RECOUNT_S if are_few else 0.0), connections
        return bool(self._short_until)

    def _sweep(self) -> None:
        for connection in self._table.overdue(time.monotonic()):
            self._close(connection, "silent")
        for connection in self._table.unread(_MOST_UNSENT_BYTES):
            self._table.remove(connection)
            self._close(connection, "unread")
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _close(self, connection: Connection | None, reason: str) -> None:
        if connection is not None:
            self.closed.labels(reason).inc()
            connection.close()


class _End(asyncio.Protocol):
    """One end of a connection. What it receives is sent by the other end."""

    def __init__(self, lost: Callable[[], None], ends: "set[_End]") -> None:
        """`ends`: the set of all open ends. This one is in it until it is closed."""
        self._lost = lost
        self._ends = ends
        self._early: list[bytes] = []
        self._other: _End | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def unsent(self) -> int:
        """Bytes that wait for the other side to read them."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def join(self, other: "_End") -> None:
        """Joins this end and the other."""
        self._other, other._other = other, self
        if not (self.is_open and other.is_open):
            self.end()
            other.end()
            return
        for data in self._early:
            other.write(data)
        self._early.clear()
        self.read(True)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is not a subclass
        self._ends.add(self)
        self._transport.set_write_buffer_limits(_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._other is not None:
            self._other.write(data)
        else:
            self._early.append(data)
            self.read(False)

    def write(self, data: bytes) -> None:
        if self.is_open:
            assert self._transport is not None
            self._transport.write(data)

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.read(False)

    def resume_writing(self) -> None:
        if self._other is not None:
            self._other.read(True)

    def read(self, on: bool) -> None:
        if self.is_open:
            assert self._transport is not None
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def end(self) -> None:
        """Closes this end once it has sent its remaining bytes, if that does not take long."""
        if self.is_open:
            assert self._transport is not None
            self._transport.close()
            asyncio.get_running_loop().call_later(_FLUSH_S, self.abort)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._ends.discard(self)
        self._early.clear()
        self._lost()
        if self._other is not None:
            self._other.end()


class _Outside(_End):
    """The end towards the caller."""

    connection: Connection

    def __init__(self, connections: Connections) -> None:
        super().__init__(lambda: connections.forget(self.connection), connections.ends)
        self._connections = connections
        self._waiting: asyncio.Task[None] | None = None
        """Waits until this connection is passed on."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = _peer_name(transport)
        now = time.monotonic()
        self.connection = Connection(peer, origin_of(peer), self.abort, now, unsent=self.unsent)
        self._connections.add(self.connection, transport.get_extra_info("socket").fileno())

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.connection.has_spoken:
            return
        head = b"".join(self._early)[: len(MARK) + NAME_BYTES]
        if not head.startswith(MARK[: len(head)]):
            self.connection.has_spoken = True
            self._waiting = self._connections.begin(self)
        elif len(head) < len(MARK) + NAME_BYTES:
            self.read(True)
        else:
            self.connection.has_spoken = True
            self._connections.hand_over(self, head[len(MARK) :])

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._waiting is not None:
            self._waiting.cancel()

    def streams(self) -> Pipe:
        """From now on, streams receive what comes after the connection's name."""
        assert self._transport is not None
        self._ends.discard(self)
        loop, transport = asyncio.get_running_loop(), self._transport
        reader = asyncio.StreamReader(_STREAM_BYTES, loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        transport.set_write_buffer_limits(_STREAM_BYTES)
        transport.resume_reading()
        reader.feed_data(b"".join(self._early)[len(MARK) + NAME_BYTES :])
        self._early.clear()
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def most_connections() -> int:
    """How many connections this process's descriptors allow, besides everything else that needs some."""
    free = _most_descriptors() - open_descriptors()
    return max(4, min(_MOST_CONNECTIONS, free // _DESCRIPTORS_EACH))


def _most_descriptors() -> int:
    """How many descriptors may be in use before no more connections are accepted."""
    limit = most_descriptors()
    return limit - min(max(limit // 16, _LEAST_LEFT), _MOST_LEFT)


def origin_of(peer: str) -> str:
    """The neighbourhood of a caller, from its name in gRPC or from `open_for`."""
    address = address_of(peer)
    return neighbourhood(address) if address is not None else peer.rpartition("/")[0] or "somewhere"


def _peer_name(transport: asyncio.BaseTransport) -> str:
    """The caller's address as gRPC would write it."""
    host, port = (transport.get_extra_info("peername") or ("", 0))[:2]
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # the caller has already left
        return "nobody"
    return f"ipv4:{address}:{port}" if isinstance(address, IPv4Address) else f"ipv6:[{address}]:{port}"


def _listening_socket(host: str, port: int) -> socket.socket:
    """Listens as gRPC would: on all IPv4 and IPv6 addresses if the host is one of the two wildcards."""
    if host in {"0.0.0.0", "::"} and socket.has_dualstack_ipv6():  # noqa: S104  # the owner chooses it
        made = socket.create_server(
            ("::", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
        )
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    # connections inherit it. asyncio sets it only on sockets that name the protocol, and without it an answer may wait
    # 40 ms
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
