"""A running node's control socket: it exchanges JSON lines with its own user's commands, on the same machine.

A connection carries one request and one reply. Lines, clients and waits are bounded, whatever a client does.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expert_server.settings import NodeSettings
from peer.errors import ControlError, StartError, TalkootError, UserError
from peer.loop import TaskSet
from peer.platform.control import ControlListener, connect
from peer.settings import describe_validation_error
from talkoot.terminal import option_text

if TYPE_CHECKING:
    from expert_server.status import NodeStatus

logger: logging.Logger = logging.getLogger(__name__)

LOG_FILE = "node.log"
CONTROL_VERSION = 2
MAX_LINE_BYTES = 4096
MAX_CLIENTS = 8
MAX_PAUSE_S = 30 * 86400.0

_ALONE_NAMED = 32
"""The most experts that a status names, because a reply is a short line."""
_READ_DEADLINE_S = 2.0
"""A client's deadline for sending its request, and for taking the reply."""
_ACT_DEADLINE_S = 60.0
_CLIENT_DEADLINE_S = 65.0
"""How long a client waits: a little longer than a node may take."""

ControlCommand = Literal["status", "pause", "resume", "stop", "invite"]


class ControllableNode(Protocol):
    """What the control socket needs of a node."""

    async def pause(self, reason: str, for_s: float | None) -> None: ...

    async def resume(self) -> None: ...

    def status(self) -> "NodeStatus": ...


class ControlVersion(BaseModel):
    """Reads only the version of a request, so that another version is not mistaken for a broken line."""

    version: int


class ControlRequest(BaseModel):
    """A client's request."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    version: int = CONTROL_VERSION
    command: ControlCommand
    for_s: float | None = Field(default=None, gt=0, le=MAX_PAUSE_S, allow_inf_nan=False)
    """How long a pause lasts, in seconds; None: until resumed."""


class ControlStatus(BaseModel):
    """What a node is doing. Fields added by newer nodes are ignored."""

    state: str
    pid: int
    experts: int = 0
    capacity: int = 0
    updates: int = 0
    rows: int = 0
    peers: int = 0
    pause_reason: str = ""
    """The reason of the pause, in words."""
    alone: int = 0
    """Experts that no other node serves."""
    alone_uids: tuple[str, ...] = ()
    """Some of the experts that no other node serves."""
    offline: int | None = None
    """How many of the experts that it gave up last no other node took over; None: not known."""
    invite: str = ""
    """An invite without a token, by which one can look at its swarm. Only if it was asked for."""


class ControlReply(BaseModel):
    """A node's answer: an error in words, or its status."""

    version: int = CONTROL_VERSION
    error: str = ""
    status: ControlStatus | None = None


class ControlServer:
    """Listens from the time when a node begins to join until it has left. A context manager, on the node's loop."""

    def __init__(self, state: Path) -> None:
        """This process must hold the lock on `state`."""
        self._state = state
        self._listener = ControlListener(state)
        self._node: ControllableNode | None = None
        self._make_invite: Callable[[], Awaitable[object]] | None = None
        self._clients, self._commands = TaskSet(), TaskSet()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Raises StartError if there can be no socket in the state folder."""
        try:
            # no other node uses the folder, because it is locked
            self._server = await self._listener.listen(self._serve_client, MAX_LINE_BYTES, MAX_CLIENTS)
        except OSError as error:
            raise StartError(
                f"can't listen in {self._state} for commands: {error.strerror}; pass another --state"
            ) from error
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        self._listener.remove()
        await self._clients.aclose()
        await self._commands.aclose()
        await self._server.wait_closed()

    def attach(self, node: ControllableNode, make_invite: Callable[[], Awaitable[object]]) -> None:
        """Sends requests to this node from now on. Until then the node is joining its swarm."""
        self._node, self._make_invite = node, make_invite

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with self._clients.including_current():
                reply = await self._reply(reader, writer)
                async with asyncio.timeout(_READ_DEADLINE_S):
                    writer.write(reply.model_dump_json().encode() + b"\n")
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            logger.debug("a client of the control socket went away: %r", error)
        finally:
            writer.close()

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> ControlReply:
        try:
            async with asyncio.timeout(_READ_DEADLINE_S):
                if not await self._listener.admits(reader, writer):
                    return ControlReply(error="this node belongs to another user")
                if len(self._clients) > MAX_CLIENTS:
                    return ControlReply(error=f"{MAX_CLIENTS} other clients control this node now: try again")
                line = await reader.readuntil(b"\n")
            return await self._act(_parse(line))
        except TimeoutError:
            return ControlReply(error=f"no request came within {_READ_DEADLINE_S:.0f} s")
        except asyncio.LimitOverrunError:
            return ControlReply(error=f"a request has at most {MAX_LINE_BYTES} bytes")
        except ValidationError as error:
            return ControlReply(error=f"no request: {describe_validation_error(error, ControlRequest)}")
        except TalkootError as error:
            return ControlReply(error=str(error))

    async def _act(self, request: ControlRequest) -> ControlReply:
        command = self._commands.spawn(self._run(request), request.command)
        try:
            async with asyncio.timeout(_ACT_DEADLINE_S):
                # if it were cancelled half-way, a pause would leave the node neither hosting nor paused
                return ControlReply(status=await asyncio.shield(command))
        except TimeoutError:
            return ControlReply(
                error=f"it is still at it: `talkoot logs{state_option(self._state)}` shows how far"
            )

    async def _run(self, request: ControlRequest) -> ControlStatus:
        if request.command == "stop":
            logger.info("asked to stop")
            signal.raise_signal(signal.SIGTERM)  # as `kill` does
        elif request.command != "status":
            if self._node is None or self._make_invite is None:
                raise UserError("it is still joining its swarm: try again when it is serving")
            if request.command == "invite":
                return self._status().model_copy(update={"invite": str(await self._make_invite())})
            if request.command == "pause":
                await self._node.pause("by its owner", request.for_s)
            else:
                await self._node.resume()
        return self._status()

    def _status(self) -> ControlStatus:
        if self._node is None:
            return ControlStatus(state="joining", pid=os.getpid())
        status = self._node.status()
        return ControlStatus.model_validate(
            asdict(status)
            | {"state": status.state.value, "pid": os.getpid()}
            | {"alone": len(status.alone), "alone_uids": status.alone[:_ALONE_NAMED]},
            extra="ignore",
        )


class ControlClient:
    """A connection to a running node, for one request. A context manager; its calls block."""

    def __init__(self, state: Path) -> None:
        """Raises ControlError if no node runs with this state folder."""
        self._state = state
        try:
            self._socket, self.pid = connect(state, _CLIENT_DEADLINE_S)
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(
                f"no node runs with the state folder {state}: start one with `talkoot node`, or pass the --state "
                "that it was started with"
            ) from None
        except OSError as error:
            advice = (
                "run this as the user who runs the node"
                if isinstance(error, PermissionError)
                else "pass the --state that it was started with"
            )
            raise ControlError(f"can't reach the node of {state}: {error.strerror}; {advice}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    @property
    def _logs(self) -> str:
        return f"`talkoot logs{state_option(self._state)}` may say why"

    def ask(self, command: ControlCommand, *, for_s: float | None = None) -> ControlStatus:
        """Raises UserError with the node's words if it refuses."""
        request = ControlRequest(command=command, for_s=for_s)
        try:
            with contextlib.suppress(BrokenPipeError):  # a node with too many clients replies first
                self._socket.sendall(request.model_dump_json().encode() + b"\n")
            with self._socket.makefile("rb") as answers:
                line = answers.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise ControlError(f"the node did not answer: {error}; {self._logs}") from error
        try:
            reply = ControlReply.model_validate_json(line)
        except ValidationError:
            raise ControlError(f"the node's answer can't be understood: {self._logs}") from None
        if reply.status is None:
            raise UserError(f"the node says: {reply.error}")
        return reply.status


def node_folder(state: Path | None) -> Path:
    """A node's state folder: the given one, or else that of the environment, or else the default one."""
    # not NodeSettings.load: other variables may only be valid together with options that this command does not have
    given = state or os.environ.get(f"{NodeSettings.env_prefix}STATE")
    return Path(given) if given else platformdirs.user_state_path("talkoot") / "node"


def state_option(folder: Path) -> str:
    """The `--state` that commands for the node of this folder need, with a space before it; empty if they need none."""
    return option_text("--state", None if folder == node_folder(None) else folder)


def invite_of_running(state: Path) -> str | None:
    """An invite to the swarm of the node that runs with this state folder; None if none runs. Raises UserError if the
    node refuses.
    """
    try:
        with ControlClient(state) as control:
            return control.ask("invite").invite
    except ControlError:
        return None


def is_running(state: Path) -> bool:
    """Whether a node runs with this state folder."""
    try:
        ControlClient(state).__exit__()
    except ControlError:
        return False
    return True


def _parse(line: bytes) -> ControlRequest:
    """Raises UserError for another version, and ValidationError for anything that is not a request."""
    version = ControlVersion.model_validate_json(line).version
    if version != CONTROL_VERSION:
        raise UserError(
            f"this command speaks control version {version}, but the node speaks {CONTROL_VERSION}: restart the node "
            "with the same version of Talkoot"
        )
    return ControlRequest.model_validate_json(line)
