"""Sockets between the parts of one process: unix sockets, or connections on loopback where Python has none.

gRPC in this process listens on some of them and dials others. Only this user can enter the folder of unix sockets. On
loopback any program on this machine can connect, so the accepting side checks that the connection comes from this
process.
"""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from peer.platform.files import user_id

_LOOPBACK = "127.0.0.1"
_PREFIX = "talkoot-sockets-"
"""The prefix of a folder's name. The process id and a random word follow."""
_PROCESS_ID = re.compile(r"[0-9]{1,9}")
_IDLE_S, _PROBE_EVERY_S, _PROBES = 15, 5, 3
_LONGEST_PARENT = 40
"""The longest parent folder, in bytes. A unix socket's path has at most 107, and the folder and the socket need the
rest.
"""

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ServerSocket:
    """Where this process's gRPC server listens. gRPC sees each connection to it under a name of its own."""

    def __init__(self) -> None:
        self._folder = SocketFolder()
        self._numbers = 0
        self._port = 0

    @property
    def to_bind(self) -> str:
        """The address for `add_secure_port`. Pass the port that it returns to `bound`."""
        return f"{_LOOPBACK}:0" if sys.platform == "win32" else f"unix:{self._folder.path('server')}"

    def bound(self, port: int) -> None:
        self._port = port

    async def dial(self) -> tuple[socket.socket, str]:
        """A socket that is connected to the server, and the name by which gRPC knows it. Raises OSError."""
        if sys.platform == "win32":
            made = socket.socket()
            try:
                made.setblocking(False)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await asyncio.get_running_loop().sock_connect(made, (_LOOPBACK, self._port))
            except BaseException:
                made.close()
                raise
            return made, f"ipv4:{_LOOPBACK}:{made.getsockname()[1]}"
        self._numbers += 1
        path = self._folder.path(str(self._numbers))
        made = socket.socket(socket.AF_UNIX)
        try:
            made.setblocking(False)
            made.bind(str(path))
            try:
                made.connect(str(self._folder.path("server")))
            finally:
                path.unlink()  # the socket keeps its name
        except OSError:
            made.close()
            raise
        return made, f"unix:{path}"

    def close(self) -> None:
        """Closing twice is harmless."""
        self._folder.close()


class SocketFolder:
    """A folder for unix sockets, created when it is first needed."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def path(self, name: str) -> Path:
        if self._folder is None:
            self._folder = private_socket_folder()
        return Path(self._folder.name) / name

    def close(self) -> None:
        """Removes the folder. Closing twice is harmless."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def bind_within(folder: SocketFolder, name: str) -> tuple[socket.socket, str]:
    """A socket for `serve_within`, and the address at which gRPC in this process reaches it. Raises OSError.

    `name`: at most 16 characters.
    """
    if sys.platform == "win32":
        made = socket.create_server((_LOOPBACK, 0))
        return made, f"{_LOOPBACK}:{made.getsockname()[1]}"
    path = folder.path(name)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(path))
        made.listen()
    except OSError:
        made.close()
        raise
    return made, f"unix:{path}"


async def serve_within(accept: Accept, bound: socket.socket, limit: int) -> asyncio.Server:
    """Accepts connections from this process only. Raises OSError. `limit`: bytes that a stream buffers."""
    if sys.platform != "win32":
        return await asyncio.start_unix_server(accept, sock=bound, limit=limit)

    async def accept_own(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        if await asyncio.to_thread(_is_own, port):
            await accept(reader, writer)
        else:
            writer.close()

    return await asyncio.start_server(accept_own, sock=bound, limit=limit)


def remove_socket(address: str) -> None:
    """Removes what `bind_within` left on disk. Open connections stay open."""
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)


async def streams_of(made: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The streams of a socket from `ServerSocket.dial`. Raises OSError."""
    if sys.platform == "win32":
        return await asyncio.open_connection(sock=made)
    return await asyncio.open_unix_connection(sock=made)


async def attach(protocol: asyncio.Protocol, made: socket.socket) -> None:
    """Connects a protocol to a socket from `ServerSocket.dial`. Raises OSError."""
    loop = asyncio.get_running_loop()
    if sys.platform == "win32":
        await loop.create_connection(lambda: protocol, sock=made)
    else:
        await loop.create_unix_connection(lambda: protocol, sock=made)


def probe_when_idle(writer: asyncio.StreamWriter) -> None:
    """Makes TCP probe the other end of a connection that is idle: routers forget idle connections, and an end that has
    gone is noticed within half a minute.
    """
    made = writer.get_extra_info("socket")
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    with contextlib.suppress(OSError):  # the other end has already gone
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((idle, _IDLE_S), ("TCP_KEEPINTVL", _PROBE_EVERY_S), ("TCP_KEEPCNT", _PROBES)):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def private_socket_folder() -> "tempfile.TemporaryDirectory[str]":
    """A new folder for unix sockets that only this user can enter, whatever the umask. The caller removes it."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > _LONGEST_PARENT and sys.platform != "win32":
        parent = Path("/tmp")  # noqa: S108  # the folder itself has an unpredictable name
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)


def sweep_socket_folders() -> None:
    """Removes the socket folders of this user's processes that were killed."""
    for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:  # noqa: S108  # where the others may be
        for folder in parent.glob(f"{_PREFIX}*"):
            number = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if _PROCESS_ID.fullmatch(number) and not psutil.pid_exists(int(number)):
                with contextlib.suppress(OSError):
                    _remove_dead(folder)


def _is_own(port: int) -> bool:
    """Whether a connection from this port comes from this process."""
    connections = psutil.Process().net_connections("tcp4")
    return any(each.laddr and each.laddr.port == port for each in connections)


def _remove_dead(folder: Path) -> None:
    """Removes a folder if it belongs to this user and contains only dead sockets. A live one may belong to a process in
    another namespace.
    """
    about = folder.lstat()
    if stat.S_ISDIR(about.st_mode) and about.st_uid == user_id():
        paths = list(folder.iterdir())
        if all(path.is_socket() and _is_unbound(path) for path in paths):
            shutil.rmtree(folder)


def _is_unbound(path: Path) -> bool:
    """Whether no process holds this unix stream socket, not even one in another network namespace, which /proc would
    not show.

    The probe is a datagram socket. It can't connect to a stream socket, so it does not disturb a listener.
    """
    if sys.platform == "win32":
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # unknown
    return False
