"""A link between every two peers on one machine, so that any of them can be cut off from any others.

Each node listens behind proxies of its own. To find which peer opened a connection to a proxy, the process that holds
the other end of it is looked up in the kernel's tables.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from talkoot.demo.links import Link, Proxy, Wire, free_ports

_HOST = "127.0.0.1"
_LISTENS = "0A"
"""The code for a listening socket in /proc/net/tcp."""
OUTSIDE = "outside"
"""The name of every process that is not a peer: it is never cut off."""


class PairLinks:
    """Wires between peers, which are known by name."""

    def __init__(self, link: Link, processes: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """`processes`: returns the peers that run now, each with its process id. Child processes count as part of the
        peer.
        """
        self._link = link
        self._processes = processes
        self._wires: dict[frozenset[str], Wire] = {}
        self._cut_off: set[str] = set()
        self._proxies: list[Proxy] = []
        self._looking = asyncio.Lock()
        self._looked_at = -math.inf
        self._owners: dict[int, str] = {}

    async def before(self, name: str) -> tuple[int, int]:
        """Puts a proxy in front of a peer. Returns the port that the peer should listen on, and the port that others
        dial.
        """
        (port,) = free_ports(_HOST, 1)
        proxy = await Proxy.start(
            self._wire(name, OUTSIDE), (_HOST, port), _HOST, wire_from=partial(self._wire_from, name)
        )
        self._proxies.append(proxy)
        return port, proxy.port

    def cut(self, names: Iterable[str]) -> None:
        """From now on these peers reach nobody but each other, and nobody else reaches them."""
        self._cut_off |= set(names)
        self._apply()

    def mend(self, names: Iterable[str]) -> None:
        self._cut_off -= set(names)
        self._apply()

    async def close(self) -> None:
        for proxy in self._proxies:
            await proxy.close()

    async def _wire_from(self, name: str, port: int) -> Wire:
        return self._wire(name, await self._owner(port))

    def _wire(self, *ends: str) -> Wire:
        pair = frozenset(ends)
        if pair not in self._wires:
            self._wires[pair] = Wire(self._link, seed=len(self._wires))
            self._apply()
        return self._wires[pair]

    def _apply(self) -> None:
        for pair, wire in self._wires.items():
            apart = OUTSIDE not in pair and 0 < len(pair & self._cut_off) < len(pair)
            (wire.cut if apart else wire.mend)()

    async def _owner(self, port: int) -> str:
        """The peer that has opened a connection from this port. One look at the kernel's tables, in a thread, answers
        for all connections that wait for it: in a burst, looking for each of them would hold up all links.
        """
        asked_at = time.monotonic()
        async with self._looking:
            if self._looked_at < asked_at:
                self._looked_at = time.monotonic()
                peers = {pid: name for name, pid in self._processes()}
                self._owners = await asyncio.to_thread(_owners_of_ports, peers)
        return self._owners.get(port, OUTSIDE)


def _owners_of_ports(peers: Mapping[int, str]) -> dict[int, str]:
    """The name of the peer that holds each connected socket, by the socket's port. `peers`: names by process id."""
    parents = {process.pid: process.info["ppid"] for process in psutil.process_iter(["ppid"])}
    holders: dict[str, str] = {}
    for pid in parents:
        ancestor: int | None = pid
        while ancestor is not None and ancestor not in peers:
            ancestor = parents.get(ancestor)
        if ancestor is not None:
            holders |= dict.fromkeys(_open_files(pid), peers[ancestor])
    return {port: holders[socket] for port, socket in _connections() if socket in holders}


def _open_files(pid: int) -> Iterator[str]:
    """What a process has open, as the kernel names it. Nothing if the process has ended."""
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):
        for descriptor in os.listdir(folder):
            with suppress(OSError):  # closed meanwhile
                yield os.readlink(f"{folder}/{descriptor}")


def _connections() -> Iterator[tuple[int, str]]:
    """The port and the kernel's name, as in /proc/PID/fd, of each connected socket. gRPC uses IPv6 sockets."""
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != _LISTENS:
                yield int(fields[1].rpartition(":")[2], 16), f"socket:[{fields[9]}]"
