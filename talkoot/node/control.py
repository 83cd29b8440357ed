"""The control socket of a running node: JSON lines on a unix socket in its state folder, for its own user alone.

One request and one reply to a connection. A client is not trusted to be well-behaved: lines, clients and waits are
bounded.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expert_server.settings import NodeSettings
from peer.errors import StartError, TalkootError, UnreachableError, UserError
from peer.settings import describe_validation_error

if TYPE_CHECKING:
    from expert_server.status import NodeStatus

logger = logging.getLogger(__name__)

LOG_FILE = "node.log"
CONTROL_VERSION = 1
MAX_LINE_BYTES = 4096
MAX_CLIENTS = 8
MAX_PAUSE_S = 30 * 86400.0

_READ_DEADLINE_S = 2.0
"""Longest that a client may take to say what it wants, or to take the reply."""
_ACT_DEADLINE_S = 60.0
_CLIENT_DEADLINE_S = 65.0
"""Longest that a client waits: a bit longer than a node may take."""
_SOCKET = "control.sock"
_UCRED = struct.Struct("3i")
"""Linux's `struct ucred`: pid, uid, gid."""

ControlCommand = Literal["status", "pause", "resume", "stop"]


class ControllableNode(Protocol):
    """What the control socket needs of a node."""

    async def pause(self, reason: str, for_s: float | None) -> None: ...

    async def resume(self) -> None: ...

    def status(self) -> "NodeStatus": ...


class _Versioned(BaseModel):
    """Only the version, so that a line of another one is told from a broken one."""

    version: int


class Request(BaseModel):
    """What a client asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = CONTROL_VERSION
    deed: ControlCommand
    for_s: float | None = Field(default=None, gt=0, le=MAX_PAUSE_S, allow_inf_nan=False)
    """How long a pause lasts, in seconds; None: until resumed."""


class ControlStatus(BaseModel):
    """What a node does now. Fields that a newer node adds are left out."""

    state: str
    pid: int
    experts: int = 0
    capacity: int = 0
    updates: int = 0
    rows: int = 0
    peers: int = 0
    why: str = ""
    """Why it is paused, in words."""


class Reply(BaseModel):
    """What a node answers: an error in words, or what it does now."""

    version: int = CONTROL_VERSION
    error: str = ""
    standing: ControlStatus | None = None


class ControlServer:
    """Listens from the moment a node begins to join until it is gone. A context manager, on the node's loop."""

    def __init__(self, state: Path, *, stop: Callable[[], None] | None = None) -> None:
        """`state` must be held by this process. `stop`: asks the process to leave in order."""
        self._state = state
        self._stop = stop or _send_sigterm
        self._node: ControllableNode | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._deeds: set[asyncio.Task[ControlStatus]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Raises StartError when there can be no socket in the state folder."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            # who was killed leaves its socket behind; the lock on the state folder says that nobody else is here
            (self._state / _SOCKET).unlink(missing_ok=True)
            with _short(self._state) as path:
                listener.bind(path)
                os.chmod(path, 0o600)  # before it listens, so nobody gets in between
        except OSError as error:
            listener.close()
            raise StartError(
                f"can't make {self._state / _SOCKET}: {error.strerror}; pass another --state"
            ) from error
        self._server = await asyncio.start_unix_server(
            self._meet, sock=listener, limit=MAX_LINE_BYTES, backlog=MAX_CLIENTS
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        (self._state / _SOCKET).unlink(missing_ok=True)
        tasks = [*self._clients, *self._deeds]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def steer(self, node: ControllableNode) -> None:
        """From now on requests go to this node. Before, it is still joining."""
        self._node = node

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        try:
            reply = await self._reply(reader, writer)
            async with asyncio.timeout(_READ_DEADLINE_S):
                writer.write(reply.model_dump_json().encode() + b"\n")
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            logger.debug("a client of the control socket went away: %r", error)
        finally:
            writer.close()

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Reply:
        _, uid, _ = _credentials(writer.get_extra_info("socket"))
        if uid not in {0, os.geteuid()}:
            return Reply(error="this node belongs to another user")
        if len(self._clients) > MAX_CLIENTS:
            return Reply(error=f"{MAX_CLIENTS} others steer this node now: try again")
        try:
            async with asyncio.timeout(_READ_DEADLINE_S):
                line = await reader.readuntil(b"\n")
            return await self._act(_parse(line))
        except TimeoutError:
            return Reply(error=f"no request came within {_READ_DEADLINE_S:.0f} s")
        except asyncio.LimitOverrunError:
            return Reply(error=f"a request has at most {MAX_LINE_BYTES} bytes")
        except ValidationError as error:
            return Reply(error=f"no request: {describe_validation_error(error, Request)}")
        except TalkootError as error:
            return Reply(error=str(error))

    async def _act(self, request: Request) -> Reply:
        deed = asyncio.create_task(self._do(request))
        self._deeds.add(deed)
        deed.add_done_callback(self._deeds.discard)
        try:
            async with asyncio.timeout(_ACT_DEADLINE_S):
                # broken off half-way, a pause would leave the node neither here nor there
                return Reply(standing=await asyncio.shield(deed))
        except TimeoutError:
            return Reply(error="it is still at it: `talkoot logs` shows how far")

    async def _do(self, request: Request) -> ControlStatus:
        if request.deed == "stop":
            logger.info("asked to stop")
            self._stop()
        elif request.deed != "status":
            if self._node is None:
                raise UserError("it is still joining its swarm: try again when it serves")
            if request.deed == "pause":
                await self._node.pause("by its owner", request.for_s)
            else:
                await self._node.resume()
        return self._standing()

    def _standing(self) -> ControlStatus:
        if self._node is None:
            return ControlStatus(state="joining", pid=os.getpid())
        status = self._node.status()
        return ControlStatus.model_validate(
            asdict(status) | {"state": status.state.value, "pid": os.getpid()}, extra="ignore"
        )


class ControlClient:
    """A client's connection to a running node, good for one request. A context manager; it blocks."""

    def __init__(self, state: Path) -> None:
        """Raises UnreachableError when no node runs with this state folder."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_CLIENT_DEADLINE_S)
        try:
            with _short(state) as path:
                self._socket.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            self._socket.close()
            raise UnreachableError(
                f"no node runs with the state folder {state}: start one with `talkoot node`, or pass the --state "
                "that it was started with"
            ) from None
        except OSError as error:
            self._socket.close()
            raise UnreachableError(f"can't reach the node of {state}: {error.strerror}") from error
        self.pid = _credentials(self._socket)[0]
        """The node's process, by the kernel's word."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def ask(self, deed: ControlCommand, *, for_s: float | None = None) -> ControlStatus:
        """Raises UserError with what the node said when it did not do it."""
        request = Request(deed=deed, for_s=for_s)
        try:
            with contextlib.suppress(BrokenPipeError):  # who has too many clients answers before it is asked
                self._socket.sendall(request.model_dump_json().encode() + b"\n")
            with self._socket.makefile("rb") as answers:
                line = answers.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise UnreachableError(f"the node did not answer: {error}; `talkoot logs` may say why") from error
        try:
            reply = Reply.model_validate_json(line)
        except ValidationError:
            raise UnreachableError(
                "the node gave no answer that this version understands: `talkoot logs` may say why"
            ) from None
        if reply.standing is None:
            raise UserError(f"the node says: {reply.error}")
        return reply.standing


def node_folder(state: Path | None) -> Path:
    """A node's state folder: the one given, else the environment's, else the usual one."""
    given = state or os.environ.get(
        f"{NodeSettings.env_prefix}STATE"
    )  # it alone: others may lack what is an option
    return Path(given) if given else platformdirs.user_state_path("talkoot") / "node"


def is_running(state: Path) -> bool:
    """Whether a node runs with this state folder."""
    try:
        ControlClient(state).__exit__()
    except UnreachableError:
        return False
    return True


def _parse(line: bytes) -> Request:
    """Raises UserError for another version, and ValidationError for what is no request."""
    version = _Versioned.model_validate_json(line).version
    if version != CONTROL_VERSION:
        raise UserError(
            f"this command speaks control version {version}, the node {CONTROL_VERSION}: restart the node "
            "once both are of one version of Talkoot"
        )
    return Request.model_validate_json(line)


@contextlib.contextmanager
def _short(state: Path) -> Iterator[str]:
    """A path to the socket that is short whatever the folder's is: the kernel takes 107 bytes at most."""
    folder = os.open(state, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{_SOCKET}"
    finally:
        os.close(folder)


def _credentials(connected: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(packed)
    return pid, uid, gid


def _send_sigterm() -> None:
    """The same orderly way out as for `kill`."""
    os.kill(os.getpid(), signal.SIGTERM)
