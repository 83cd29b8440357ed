"""How a user's commands reach their running process: by a unix socket in its folder, or over loopback with a secret.

If Python has no unix sockets, or the folder's path is too long for one, the process listens on loopback. It writes its
port and a random token into a file that only its user can read, and each client sends the token first.
"""

import asyncio
import contextlib
import hmac
import os
import secrets
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peer.files import write_atomically
from peer.platform.files import open_plainly, user_id

SOCKET = "control.sock"
TOKEN_FILE = "control.token"  # noqa: S105  # a name
_LOOPBACK = "127.0.0.1"
_TOKEN_BYTES = 32
_LONGEST_FILE = 1024
_LONGEST_PATH = 100
"""The longest path of a unix socket, in bytes, on systems without a short path to every open folder."""
_UCRED = struct.Struct("3i")
"""Linux's `struct ucred`: pid, uid, gid."""
_LOCAL_PEERCRED, _LOCAL_PEERPID = 1, 2
"""macOS's options of unix sockets, at level 0."""
_XUCRED = struct.Struct("=II68x")
"""macOS's `struct xucred`: version, uid, groups."""

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _Door(BaseModel):
    """The file that tells clients how to reach a process on loopback."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: int = Field(gt=0, lt=2**16)
    pid: int = Field(gt=0)
    token: str = Field(pattern=r"^[0-9a-f]{64}$")


class ControlListener:
    """The process's end. Its folder belongs to the user and is locked by this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._token = ""

    async def listen(self, accept: Accept, limit: int, backlog: int) -> asyncio.Server:
        """Raises OSError."""
        self.remove()  # a killed process leaves its socket behind
        if sys.platform != "win32" and _has_room(self._folder):
            return await self._listen_on_unix(accept, limit, backlog)
        server = await asyncio.start_server(accept, _LOOPBACK, 0, limit=limit, backlog=backlog)
        self._token = secrets.token_hex(_TOKEN_BYTES)
        door = _Door(port=server.sockets[0].getsockname()[1], pid=os.getpid(), token=self._token)
        try:
            write_atomically(self._folder / TOKEN_FILE, door.model_dump_json().encode(), 0o600)
        except OSError:
            server.close()
            raise
        return server

    async def admits(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the client belongs to this user or to root. Reads the token, if there is one."""
        if self._token:
            given = await reader.readuntil(b"\n")
            return hmac.compare_digest(given.rstrip(b"\n"), self._token.encode())
        _, uid = _credentials(writer.get_extra_info("socket"))
        return uid in {0, user_id()}

    def remove(self) -> None:
        for name in (SOCKET, TOKEN_FILE):
            (self._folder / name).unlink(missing_ok=True)

    if sys.platform != "win32":

        async def _listen_on_unix(self, accept: Accept, limit: int, backlog: int) -> asyncio.Server:
            listener = socket.socket(socket.AF_UNIX)
            try:
                with _short(self._folder) as path:
                    listener.bind(path)
                    os.chmod(path, 0o600)  # done before listening, so that nobody else can connect
            except OSError:
                listener.close()
                raise
            return await asyncio.start_unix_server(accept, sock=listener, limit=limit, backlog=backlog)


def connect(folder: Path, deadline_s: float) -> tuple[socket.socket, int]:
    """A connection to the process of this folder, and its process id. Raises OSError: FileNotFoundError or
    ConnectionRefusedError if no process listens. The port of a killed process may by now belong to another user.
    """
    door = _read_door(folder)
    if door is not None:
        if not psutil.pid_exists(door.pid):
            raise ConnectionRefusedError(f"{folder / TOKEN_FILE} was left by a process that has ended")
        made = socket.create_connection((_LOOPBACK, door.port), deadline_s)
        with _closing_on_error(made):
            made.sendall(door.token.encode() + b"\n")
        return made, door.pid
    if sys.platform == "win32":
        raise FileNotFoundError(folder / TOKEN_FILE)
    made = socket.socket(socket.AF_UNIX)
    with _closing_on_error(made):
        made.settimeout(deadline_s)
        with _short(folder) as path:
            made.connect(path)
        return made, _credentials(made)[0]


def _read_door(folder: Path) -> _Door | None:
    """None if there is no such file. Raises OSError, also if the file is not this user's."""
    try:
        with os.fdopen(open_plainly(folder / TOKEN_FILE, os.O_RDONLY), "rb") as file:
            return _Door.model_validate_json(file.read(_LONGEST_FILE))
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ConnectionRefusedError(f"{folder / TOKEN_FILE} is broken") from None


@contextlib.contextmanager
def _closing_on_error(made: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        made.close()
        raise


def _has_room(folder: Path) -> bool:
    """Whether the path of a unix socket in the folder is short enough. Linux has a short path to every open folder."""
    return sys.platform == "linux" or len(os.fsencode(folder / SOCKET)) <= _LONGEST_PATH


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A path to the socket, on Linux a short one: the kernel accepts at most 107 bytes."""
    if sys.platform != "linux":
        yield str(folder / SOCKET)
        return
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def _credentials(connected: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other end of a unix socket, from the kernel."""
    if sys.platform == "linux":
        pid, uid, _ = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    else:
        _, uid = _XUCRED.unpack(connected.getsockopt(0, _LOCAL_PEERCRED, _XUCRED.size))
        pid = connected.getsockopt(0, _LOCAL_PEERPID)
    return pid, uid
