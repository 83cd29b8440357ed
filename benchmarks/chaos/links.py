"""A link between every two peers on one machine, so that any of them can be cut off from any others.

Each node listens behind proxies of its own. Who has opened a connection to one is found by the process that holds its
other end, as the kernel tells it.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from talkoot.demo.links import Link, Proxy, Wire, free_ports

_HOST = "127.0.0.1"
_LISTENS = "0A"
"""How /proc/net/tcp calls a socket that listens."""
OUTSIDE = "outside"
"""Whoever is no peer: it is never cut off."""


class PairLinks:
    """Wires between peers, who are known by name."""

    def __init__(self, link: Link, processes: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """`processes` gives the peers that run now, each with the number of its process; children belong to it."""
        self._link = link
        self._processes = processes
        self._wires: dict[frozenset[str], Wire] = {}
        self._cut_off: set[str] = set()
        self._proxies: list[Proxy] = []

    async def before(self, name: str) -> tuple[int, int]:
        """Puts a proxy before a peer; gives the port on which it shall listen, and the one that others dial."""
        (port,) = free_ports(_HOST, 1)
        proxy = await Proxy.start(
            self._wire(name, OUTSIDE), (_HOST, port), _HOST, wire_from=partial(self._wire_from, name)
        )
        self._proxies.append(proxy)
        return port, proxy.port

    def cut(self, names: Iterable[str]) -> None:
        """These peers reach nobody but each other, and nobody reaches them."""
        self._cut_off |= set(names)
        self._apply()

    def mend(self, names: Iterable[str]) -> None:
        self._cut_off -= set(names)
        self._apply()

    async def close(self) -> None:
        for proxy in self._proxies:
            await proxy.close()

    def _wire_from(self, name: str, port: int) -> Wire:
        return self._wire(name, self._owner(port))

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

    def _owner(self, port: int) -> str:
        socket = _socket_at(port)
        if socket is None:
            return OUTSIDE
        for name, pid in self._processes():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if any(_holds(each.pid, socket) for each in (process, *process.children(recursive=True))):
                    return name
        return OUTSIDE


def _socket_at(port: int) -> str | None:
    """The kernel's name of the connected socket with this port, as in /proc/PID/fd. gRPC's are of IPv6."""
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{port:04X}") and fields[3] != _LISTENS and fields[9] != "0":
                return f"socket:[{fields[9]}]"
    return None


def _holds(pid: int, socket: str) -> bool:
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):
        for descriptor in os.listdir(folder):
            with suppress(OSError):  # closed meanwhile
                if os.readlink(f"{folder}/{descriptor}") == socket:
                    return True
    return False
