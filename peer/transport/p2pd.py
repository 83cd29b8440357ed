"""p2pd, the libp2p daemon: a peer's only child process, started and controlled through hivemind.

Everything we change in `hivemind.p2p` is in this module, the only one that imports it; import this module only to start
p2pd. p2pd ends with this process, even after SIGKILL. A cancelled request leaves no connection open.
"""

import asyncio
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from google.protobuf.message import DecodeError
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    P2PHandlerError,
    raise_if_failed,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler

from peer.errors import DaemonError, UnreachableError
from peer.identity import Identity, PeerID
from peer.loop import cancel_all
from peer.platform.p2pd import REINSTALL
from peer.platform.processes import die_with_parent
from peer.platform.sockets import private_socket_folder
from peer.transport.addresses import Multiaddress, RemoteEnd, known_bytes, multiaddress
from peer.transport.dialling import Dialling
from peer.transport.p2pd_setup import START_DEADLINE_S, Libp2pConfig
from peer.transport.pipes import Pipe
from peer.transport.tunnel import StreamHandler

_STOP_DEADLINE_S = 3.0
"""How long p2pd gets to stop when asked. Then it is killed."""

_RELAY_BUFFER_BYTES = 256 * 2**10
"""The buffer for each direction of a relayed connection. p2pd's default is 16 MiB."""
_RELAYED_BYTES = 2**40
_RELAYED_FOR = "24h"
"""A relay ends a connection after this many bytes or this long; the peers then open a new one."""

_ONE_PROCESSOR = "GOMAXPROCS=1"
"""The environment of a p2pd that relays. It starts two relay services, one with the limits above and one that ends each
connection after 128 KiB. The one that starts last is used, and with several processors that may be either.
"""
_RETURNS_MEMORY = "GOMEMLIMIT=128MiB"
"""Above this limit, Go's runtime collects at once the memory that strangers made p2pd take, and returns it to the
system.
"""
_CONNECTIONS = {"connLo": 192, "connHi": 256, "connGrace": "20s"}
"""Above the higher number, p2pd closes connections that are not new, the idle ones first."""

_FAILURES = (
    P2PDaemonError,
    P2PHandlerError,
    OSError,  # includes TimeoutError
    EOFError,  # includes asyncio.IncompleteReadError
    DecodeError,
)
"""What hivemind's calls raise when p2pd or the other peer fails."""


class Daemon(P2P):  # type: ignore[misc]  # hivemind has no types
    """hivemind's P2P, without its leaks of tasks. Requests raise UnreachableError if p2pd or the other peer fails."""

    # hivemind's `_terminate` reads both, even if no p2pd was found
    _daemon_listen_maddr: Any = None
    _client_listen_maddr: Any = None
    _sockets: tempfile.TemporaryDirectory[str] | None = None
    _dialling: Dialling

    async def ended(self) -> int:
        """Waits until p2pd has ended; returns its exit status, negative after a signal."""
        status: int = await self._child.wait()
        return status

    @property
    def memory_bytes(self) -> int:
        """The memory that p2pd takes; 0 if it has ended."""
        try:
            return int(psutil.Process(self._child.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def own_addresses(self, deadline_s: float) -> list[Multiaddress]:
        """The addresses of this peer that p2pd knows, without those of unknown kinds."""
        answer, _, writer = await self._request(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY), deadline_s)
        writer.close()
        return known_bytes(answer.identify.addrs, self.peer_id)

    async def connect(self, peer_id: PeerID, addresses: Sequence[Multiaddress], deadline_s: float) -> None:
        """Dials a peer at those of its addresses that may be dialled now. Does nothing if it is connected already.
        Raises UnreachableError.

        hivemind's own method leaks its connection to p2pd when it is cancelled.
        """
        connected = await self._connections(deadline_s)
        new = [a for a in addresses if not _is_there(a, connected)]
        addresses = [a for a in addresses if a not in new or self._dialling.begin(a.endpoint, a.dialled)]
        if not addresses:
            raise UnreachableError("none of the peer's addresses may be dialled now")
        connect = p2pd_pb2.ConnectRequest(
            peer=peer_id.to_bytes(),
            addrs=[address.to_bytes(without_peer=True) for address in addresses],
            timeout=math.ceil(deadline_s),
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect)
        _, _, writer = await self._request(request, deadline_s)
        writer.close()
        if new:
            connected = await self._connections(deadline_s)
            for address in new:
                if _is_there(address, connected):
                    self._dialling.reached(address.endpoint, address.dialled)

    async def _connections(self, deadline_s: float) -> dict[bytes, list[bytes]]:
        """PeerID → the multiaddresses of the other ends of the connections to that peer, in p2pd's encoding."""
        answer, _, writer = await self._request(
            p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS), deadline_s
        )
        writer.close()
        ends: dict[bytes, list[bytes]] = {}
        for peer in answer.peers:
            ends.setdefault(peer.id, []).extend(peer.addrs)
        return ends

    async def open_stream(self, peer_id: PeerID, protocol: str, deadline_s: float) -> Pipe:
        """A stream to a peer that serves this protocol, through a relay if needed. hivemind's own method leaks
        as well.
        """
        opening = p2pd_pb2.StreamOpenRequest(
            peer=peer_id.to_bytes(), proto=[protocol], timeout=math.ceil(deadline_s)
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening)
        _, reader, writer = await self._request(request, deadline_s)
        return reader, writer

    async def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        """Passes other peers' streams of this protocol to the handler from now on."""

        async def handle(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            caller, end = PeerID(info.peer_id.to_bytes()), RemoteEnd.decode(info.addr.to_bytes())
            await handler(caller, end, (reader, writer))

        try:
            async with asyncio.timeout(_STOP_DEADLINE_S):
                await self.add_binary_stream_handler(protocol, handle)
        except _FAILURES as error:
            raise UnreachableError(str(error) or "the libp2p daemon did not answer in time") from error

    async def _request(
        self, request: p2pd_pb2.Request, deadline_s: float
    ) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
        """p2pd's response, and the connection that it came by, which the caller must close."""
        answer = p2pd_pb2.Response()
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(deadline_s):
                reader, writer = await self._client.control.daemon_connector.open_connection()
                await write_pbmsg(writer, request)
                await read_pbmsg_safe(reader, answer)
            raise_if_failed(answer)
        except BaseException as error:
            if writer is not None:
                writer.close()
            if isinstance(error, _FAILURES):
                raise UnreachableError(str(error) or "the libp2p daemon did not answer in time") from error
            raise
        return answer, reader, writer

    async def shutdown(self) -> None:
        tasks = self._tasks()
        self._terminate()
        # also retrieves the errors of tasks that failed when p2pd died, because nobody else does
        await cancel_all(tasks)
        if self._child is not None:
            try:
                await asyncio.wait_for(self._child.wait(), _STOP_DEADLINE_S)
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
            # p2pd has ended, but its pipes stay open while any process holds their other ends
            self._child._transport.close()
        if self._sockets is not None:
            self._sockets.cleanup()

    def _tasks(self) -> list["asyncio.Task[Any]"]:
        tasks = [self._reader_task, self._listen_task]
        if self._client is not None:
            control = self._client.control
            tasks += [control._read_task, control._write_task]
        return [task for task in tasks if task is not None]


async def start_daemon(identity: Identity, config: Libp2pConfig, dialling: Dialling) -> Daemon:
    """Starts p2pd. Raises DaemonError when this machine can't.

    `dialling`: this process's rules for addresses that others wrote.
    """
    _quiet_hivemind()
    started: list[Daemon] = []
    sockets = private_socket_folder()

    class Started(Daemon):
        """Is recorded, so that it can be stopped if `create` is cancelled: hivemind would leave p2pd and its sockets
        behind.
        """

        # hivemind's own socket is in /tmp, where any user can connect unless the umask forbids it
        _UNIX_SOCKET_PREFIX = f"/unix{sockets.name}/"

        def __init__(self) -> None:
            super().__init__()
            self._sockets = sockets
            self._dialling = dialling
            started.append(self)

        @staticmethod
        def _make_process_args(*arguments: Any, **options: Any) -> list[str]:
            if not config.relays:
                # nothing here needs libp2p's own DHT, but p2pd requires one for finding relays
                options = {name: value for name, value in options.items() if not name.startswith("dht")}
            command = P2P._make_process_args(*arguments, **options, **_relay_options(config))
            environment = [_RETURNS_MEMORY, *([_ONE_PROCESSOR] if config.public else [])]
            return die_with_parent(["/usr/bin/env", *environment, *command])

    task = asyncio.current_task()
    assert task is not None
    cancels = task.cancelling()
    daemon: Daemon | None = None
    try:
        created = await Started.create(
            identity_path=str(identity.path),
            check_if_identity_free=False,  # the lock of the state folder ensures that
            host_maddrs=[config.listening],
            announce_maddrs=None if config.announce is None else [multiaddress(config.announce)],
            dht_mode="client",
            no_listen=not config.listens,
            nat_port_map=config.maps_port,
            auto_nat=True,  # p2pd punches holes only with this
            force_reachability="public" if config.public else "private",
            use_relay=True,
            use_auto_relay=bool(config.relays),
            trusted_relays=config.relays or None,
            startup_timeout=START_DEADLINE_S,
        )
        if task.cancelling() > cancels:  # wait_for of Python 3.11, used by hivemind, loses the cancellation
            raise asyncio.CancelledError
        created.peer_id = identity.peer_id  # of this package's own type
        daemon = created
    except P2PDaemonError as error:
        raise DaemonError(
            f"the libp2p daemon did not start: {error}; if p2pd is broken, {REINSTALL}"
        ) from error
    except (OSError, EOFError) as error:
        raise DaemonError(f"can't run the libp2p daemon: {error}; if p2pd is broken, {REINSTALL}") from error
    finally:
        if daemon is None:
            for half_started in started:
                await half_started.shutdown()
    return daemon


def _is_there(address: Multiaddress, connected: Mapping[bytes, Sequence[bytes]]) -> bool:
    """Whether one of the connections is to the peer at this address, and leads there."""
    end = address.endpoint_bytes()
    return any(data.startswith(end) for data in connected.get(address.dialled.to_bytes(), ()))


def _quiet_hivemind() -> None:
    """Removes hivemind's own log handler, so that its errors appear as our log lines."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(os.environ.get("HIVEMIND_LOGLEVEL", "ERROR"))


def _relay_options(config: Libp2pConfig) -> dict[str, Any]:
    """p2pd's options that hivemind has no arguments for."""
    return {
        "relayService": config.public and config.relays_others,
        "relayBufferSize": _RELAY_BUFFER_BYTES,
        "relayDataLimit": _RELAYED_BYTES,
        "relayTimeLimit": _RELAYED_FOR,
        "relayDiscovery": False,  # otherwise p2pd waits 3 minutes unless it knows four relays
        **_CONNECTIONS,
    }
