"""A link between every two peers on one machine, so that any of them can be cut off from any others.

Each node listens behind proxies of its own. To find which peer opened a connection to a proxy, the process that holds
the other end of it is looked up in the kernel's tables.
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
    """The kernel's name of the connected socket with this port, as in /proc/PID/fd. gRPC uses IPv6 sockets."""
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
