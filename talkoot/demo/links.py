"""Emulated network links: a TCP proxy with a rate, delay, jitter, packet loss and cuts.

It carries any TCP traffic, such as gRPC and libp2p: start a `Proxy` for each port of a peer, and announce the proxy's
address. The rate counts TCP's payload without headers. TCP's slow start is not emulated. As with TCP, a lost packet
holds up everything behind it on its connection.
"""

import asyncio
import contextlib
import errno
import math
import random
import re
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from peer.errors import SettingsError
from peer.loop import TaskSet

_PACKET_BYTES = 1448
_MOST_AT_ONCE = 64 * 1024
_TURN_S = 0.004
"""How long one connection may use the link before others get their turn."""
_QUEUE_S = 0.05
"""How much data may wait for its turn on a link, in seconds, like the buffer of a router."""
_FREE_BYTES = 16 * 2**20
"""Bytes that may be in flight on each connection of a link without a rate."""
_SOCKET_BYTES = 64 * 1024
"""The size of the kernel's buffers for a link with a rate. They are small, because bytes in them have not been slowed
down yet.
"""
_RETRANSMIT_S = 0.2
"""Linux's shortest retransmission timeout."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with 0 s, so that closing a socket sends a reset."""

_UNASSIGNED_PORTS = range(20_000, 32_768)
"""Ports below those that Linux assigns automatically; other systems' are higher still."""

_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(kbit|mbit|gbit|ms|s|%)")
_MBIT = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_SECONDS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Link:
    """The properties of a link. Both directions have the same."""

    rate_mbit: float | None = None
    """Mbit/s in each direction, shared by all connections; None: unlimited."""
    delay_s: float = 0.0
    """The round-trip delay, as shown by `ping`."""
    jitter_s: float = 0.0
    """The largest random delay added in each direction, uniformly distributed."""
    loss: float = 0.0
    """Share of packets that are lost, below 1."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `100mbit,80ms`, optionally with jitter and loss: `20mbit,80ms,5ms,0.1%`. Raises SettingsError."""
        rates, times, losses = [], [], []
        for part in text.replace(" ", "").lower().split(","):
            match = _PART.fullmatch(part)
            if match is None:
                raise SettingsError(
                    f"{part!r} is not part of a link: write for example 100mbit,80ms or 20mbit,80ms,5ms,0.1% "
                    "(rate, round-trip delay, jitter, packet loss)"
                )
            number, unit = float(match[1]), match[2]
            if unit in _MBIT:
                rates.append(number * _MBIT[unit])
            elif unit in _SECONDS:
                times.append(number * _SECONDS[unit])
            else:
                losses.append(number / 100)
        if len(rates) > 1 or len(times) > 2 or len(losses) > 1 or 0.0 in rates or 1 in losses:
            raise SettingsError(
                f"{text!r} is not a link: write a rate above 0, a delay, a jitter and a loss below 100%, each once"
            )
        delay_s, jitter_s = (*times, 0.0, 0.0)[:2]
        return cls(rates[0] if rates else None, delay_s, jitter_s, losses[0] if losses else 0.0)

    @property
    def bytes_per_s(self) -> float:
        return math.inf if self.rate_mbit is None else self.rate_mbit * 125_000

    @property
    def most_in_flight(self) -> float:
        """The most bytes of one connection in one direction: those that fill the link, and those in its queue."""
        if self.rate_mbit is None:
            return _FREE_BYTES
        seconds = self.delay_s / 2 + self.jitter_s + _QUEUE_S
        return max(2 * self.most_at_once, self.bytes_per_s * seconds)

    @property
    def most_at_once(self) -> int:
        """The most bytes that one connection sends before others get their turn."""
        return int(min(_MOST_AT_ONCE, max(_PACKET_BYTES, self.bytes_per_s * _TURN_S)))


class Direction:
    """One direction of a link, shared by all its connections. Pure: time and randomness are arguments."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.bytes_carried = 0
        self._free_at = -math.inf

    def backlog_s(self, now: float) -> float:
        """How long a byte that arrives now waits for its turn."""
        return max(0.0, self._free_at - now)

    def carry(self, size: int, now: float, rng: random.Random) -> float:
        """Accepts `size` bytes. Returns when they arrive at the other end."""
        self.bytes_carried += size
        self._free_at = max(now, self._free_at) + size / self.link.bytes_per_s
        arrives = self._free_at + self.link.delay_s / 2 + rng.random() * self.link.jitter_s
        passes = (1 - self.link.loss) ** math.ceil(size / _PACKET_BYTES)
        if rng.random() >= passes:
            arrives += max(_RETRANSMIT_S, self.link.delay_s)
        return arrives


class Wire:
    """A link in use. It can be changed and cut. Give all proxies of a peer the same wire."""

    def __init__(self, link: Link, seed: int = 0) -> None:
        self.link: Link = link
        self.there: Direction = Direction(link)
        self.back: Direction = Direction(link)
        self.connections = 0
        """Connections opened since the start."""
        self._seed = seed
        self._whole = asyncio.Event()
        self._whole.set()

    def change(self, link: Link) -> None:
        """Gives the wire other properties from now on."""
        self.link = self.there.link = self.back.link = link

    def cut(self) -> None:
        """Lets nothing pass from now on, like an unplugged cable."""
        self._whole.clear()

    def mend(self) -> None:
        """Ends a cut. Data that was sent during it now passes."""
        self._whole.set()

    async def whole(self) -> None:
        await self._whole.wait()

    def next_chances(self) -> tuple[random.Random, random.Random]:
        """The random generators for both directions of the next connection, the same in each run."""
        self.connections += 1
        there, back = (random.Random(f"{self._seed} {self.connections} {way}") for way in range(2))  # noqa: S311
        return there, back


WireFrom = Callable[[int], Awaitable[Wire]]


class Proxy:
    """Listens, and carries each connection over a wire to the target. Create it with `start`; close it when done."""

    def __init__(
        self, wire: Wire, listener: socket.socket, target: tuple[str, int], wire_from: WireFrom | None
    ) -> None:
        self.wire = wire
        self._target = target
        self._wire_from = wire_from
        self._listener = listener
        self._tasks = TaskSet()
        self._tasks.spawn(self._accept(), "accept connections")

    @classmethod
    async def start(
        cls,
        wire: Wire,
        target: tuple[str, int],
        host: str = "127.0.0.1",
        port: int = 0,
        wire_from: WireFrom | None = None,
    ) -> Self:
        """`target`: an IP address and port. Nobody needs to listen there yet.

        `wire_from`: returns the wire of a connection by its source port, if not all connections use `wire`.
        """
        listener = _socket(wire.link, host)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        return cls(wire, listener, target, wire_from)

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    async def close(self) -> None:
        """Ends all connections. Closing twice is harmless."""
        await self._tasks.aclose()
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, address = await loop.sock_accept(self._listener)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tasks.spawn(self._carry(client, address[1]), "carry a connection")

    async def _carry(self, client: socket.socket, port: int) -> None:
        with contextlib.closing(client):
            wire = self.wire if self._wire_from is None else await self._wire_from(port)
            await self._carry_over(wire, client)

    async def _carry_over(self, wire: Wire, client: socket.socket) -> None:
        there, back = wire.next_chances()
        with contextlib.closing(_socket(wire.link, self._target[0])) as server:
            # otherwise a second small message waits until the first is acknowledged
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                async with asyncio.TaskGroup() as group:
                    await self._connect(wire, server)
                    _Pipe(wire, wire.there, client, server, there).run(group)
                    _Pipe(wire, wire.back, server, client, back).run(group)
            except* OSError:
                for side in (client, server):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    async def _connect(self, wire: Wire, server: socket.socket) -> None:
        """Connects, which takes a round trip before anything can be sent."""
        await wire.whole()
        await asyncio.sleep(wire.link.delay_s)
        await asyncio.get_running_loop().sock_connect(server, self._target)


class _Pipe:
    """One direction of one connection."""

    def __init__(
        self,
        wire: Wire,
        direction: Direction,
        source: socket.socket,
        sink: socket.socket,
        rng: random.Random,
    ) -> None:
        self._wire = wire
        self._direction = direction
        self._source = source
        self._sink = sink
        self._rng = rng
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._in_flight = 0
        self._changed = asyncio.Event()

    def run(self, group: asyncio.TaskGroup) -> None:
        """Runs until everything from the source has arrived. The tasks raise OSError if either side is reset."""
        group.create_task(self._take_in())
        group.create_task(self._deliver())

    async def _take_in(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            while self._in_flight >= self._wire.link.most_in_flight:
                await self._change()
            await asyncio.sleep(self._direction.backlog_s(time.monotonic()) - _QUEUE_S)
            data = await loop.sock_recv(self._source, self._wire.link.most_at_once)
            arrives = self._direction.carry(len(data), time.monotonic(), self._rng)
            self._waiting.append((arrives, data))  # delivered after everything before it
            self._in_flight += len(data)
            self._changed.set()

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            while not self._waiting:
                await self._change()
            arrives, data = self._waiting[0]
            await asyncio.sleep(arrives - time.monotonic())
            await self._wire.whole()
            await loop.sock_sendall(self._sink, data)
            self._waiting.popleft()
            self._in_flight -= len(data)
            self._changed.set()
        self._sink.shutdown(socket.SHUT_WR)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _socket(link: Link, host: str) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setblocking(False)
    if link.rate_mbit is not None:
        for side in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            made.setsockopt(socket.SOL_SOCKET, side, _SOCKET_BYTES)
    return made


def free_ports(host: str, count: int) -> list[int]:
    """TCP ports that are free now, for peers that must know their ports in advance.

    They are outside the range that the system assigns automatically, so that no other program gets one in the meantime.
    """
    free: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(_UNASSIGNED_PORTS, len(_UNASSIGNED_PORTS)):
            if len(free) == count:
                break
            try:
                stack.enter_context(socket.create_server((host, port)))
                free.append(port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
    return free
