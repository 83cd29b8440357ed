"""p2pd, the libp2p daemon: the one child process of a peer, and the tasks that hivemind runs for it.

What hivemind's connection to p2pd notes of calls, so that one that is broken off harms no other.
"""

import asyncio
import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    P2PHandlerError,
    raise_if_failed,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2

from peer.errors import DaemonError
from peer.identity import Identity
from peer.processes import die_with_parent
from peer.transport.addresses import NetworkConfig, multiaddress, multiaddress_bytes


class PendingCalls(dict[UUID, "asyncio.Future[Any]"]):
    """Calls of this peer, by id.

    Says that it has none that has ended: when the answer comes in the turn of the loop in which the call is broken off,
    hivemind's reader would set its result, and end by the error. No later call would get an answer.
    """

    def __contains__(self, call_id: object) -> bool:
        return super().__contains__(call_id) and not self[call_id].done()  # type: ignore[index]  # a UUID


class HandlerTasks(dict[UUID, "asyncio.Task[None]"]):
    """Calls of others, by id, while they are answered: hivemind forgets none that is broken off."""

    def __setitem__(self, call_id: UUID, task: "asyncio.Task[None]") -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


def patch_control_client(control: Any) -> None:
    """Gives a hivemind ControlClient, on which no calls are under way, these tables in place of its own."""
    control._pending_calls, control._handler_tasks = PendingCalls(), HandlerTasks()


START_DEADLINE_S = 60.0
_REINSTALL = (
    "if p2pd is missing or broken, `python -m pip install --force-reinstall --no-deps hivemind` brings it"
)
_ENDS_WITHIN_S = 3.0
"""Longest that p2pd may take to end when asked; then it is killed."""

_RELAY_BUFFER_BYTES = 256 * 2**10
"""Of each direction of a relayed connection. p2pd's default is 16 MiB."""
_RELAYED_BYTES = 2**40
_RELAYED_FOR = "24h"
"""After so many bytes or so long a relay ends a connection; a new one is made then."""

_ONE_AT_A_TIME = ("/usr/bin/env", "GOMAXPROCS=1")
"""How a p2pd that relays is started. It makes two relays, one after the other, and the last one counts: that with the
limits above, or one that ends each connection after 128 KiB. On several processors either may be the last.
"""

# what hivemind's calls raise when p2pd or the other peer does not do what was asked
TRANSPORT_ERRORS = (
    P2PDaemonError,
    P2PHandlerError,
    OSError,  # of it is TimeoutError
    EOFError,  # of it is asyncio.IncompleteReadError
    DecodeError,
)


class Daemon(P2P):  # type: ignore[misc]  # hivemind has no types
    """hivemind's P2P, which notices that p2pd has ended, and leaves no task behind.

    p2pd dies with us even when we are killed with SIGKILL.
    """

    _daemon_listen_maddr: Any = None  # hivemind's end reads both, also where no p2pd was found
    _client_listen_maddr: Any = None

    async def ended(self) -> int:
        """Waits until p2pd has ended; gives its exit status, negative after a signal."""
        status: int = await self._child.wait()
        self._has_ended()
        return status

    async def connect(self, peer_id: PeerID, addresses: Sequence[str], deadline_s: float) -> None:
        """Dials a peer at these multiaddresses, which may end with its PeerID.

        hivemind's own leaves its connection to p2pd open when it is broken off.
        """
        own = f"/p2p/{peer_id.to_base58()}"
        connect = p2pd_pb2.ConnectRequest(
            peer=peer_id.to_bytes(),
            addrs=[multiaddress_bytes(address.removesuffix(own)) for address in addresses],
            timeout=math.ceil(deadline_s),
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect)
        _, _, writer = await self._request(request, deadline_s)
        writer.close()

    async def open_stream(
        self, peer_id: PeerID, protocol: str, deadline_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to a peer that answers this protocol, through a relay if need be. hivemind's own leaks as above."""
        opening = p2pd_pb2.StreamOpenRequest(
            peer=peer_id.to_bytes(), proto=[protocol], timeout=math.ceil(deadline_s)
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening)
        _, reader, writer = await self._request(request, deadline_s)
        return reader, writer

    async def _request(
        self, request: p2pd_pb2.Request, deadline_s: float
    ) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
        """p2pd's answer, and the connection that it came by, which is the caller's now."""
        answer = p2pd_pb2.Response()
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(deadline_s):
                reader, writer = await self._client.control.daemon_connector.open_connection()
                await write_pbmsg(writer, request)
                await read_pbmsg_safe(reader, answer)
            raise_if_failed(answer)
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        return answer, reader, writer

    async def call_protobuf_handler(self, *arguments: Any, **options: Any) -> Any:
        if not self.is_alive:
            raise P2PDaemonError("p2pd has ended")  # hivemind would wait until its own deadline
        return await super().call_protobuf_handler(*arguments, **options)

    async def shutdown(self) -> None:
        tasks = self._tasks()
        self._has_ended()
        self._terminate()
        for task in tasks:
            task.cancel()
        # also those that failed when p2pd died: nobody else looks at their errors
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._child is None:
            return
        try:
            await asyncio.wait_for(self._child.wait(), _ENDS_WITHIN_S)
        except TimeoutError:
            self._child.kill()
            await self._child.wait()
        with contextlib.suppress(FileNotFoundError):  # hivemind leaves it behind when p2pd ended by itself
            os.remove(self._daemon_listen_maddr["unix"])

    def _has_ended(self) -> None:
        """Fails the calls that wait for an answer which can't come any more."""
        self._alive = False
        if self._client is not None:
            for call in self._client.control._pending_calls.values():
                if not call.done():
                    call.set_exception(P2PDaemonError("p2pd has ended"))
                    call.exception()  # its caller may have given up already

    def _tasks(self) -> list["asyncio.Task[Any]"]:
        tasks = [self._reader_task, self._listen_task]
        if self._client is not None:
            control = self._client.control
            tasks += [control._read_task, control._write_task, *control._handler_tasks.values()]
        return [task for task in tasks if task is not None]


async def start_daemon(identity: Identity, config: NetworkConfig) -> Daemon:
    """Starts p2pd. Raises DaemonError when this machine can't."""
    started: list[Daemon] = []

    class Noted(Daemon):
        """Can be ended when `create` is broken off: hivemind would leave p2pd and its sockets behind."""

        def __init__(self) -> None:
            super().__init__()
            started.append(self)

        @staticmethod
        def _make_process_args(*arguments: Any, **options: Any) -> list[str]:
            command = P2P._make_process_args(*arguments, **options, **_relaying(config))
            return die_with_parent([*_ONE_AT_A_TIME, *command] if config.serves_dht else command)

    task = asyncio.current_task()
    assert task is not None
    cancels = task.cancelling()
    daemon: Daemon | None = None
    try:
        created = await Noted.create(
            identity_path=str(identity.path),
            check_if_identity_free=False,  # the state folder's lock and the signed records stand for it
            host_maddrs=[multiaddress(config.listen, config.port)],
            announce_maddrs=None if config.announce is None else [config.announce],
            dht_mode="server" if config.serves_dht else "client",
            no_listen=not config.listens,
            nat_port_map=config.maps_port,
            auto_nat=True,  # p2pd punches holes only with it
            force_reachability="public" if config.serves_dht else "private",
            use_relay=True,
            use_auto_relay=bool(config.relays),
            trusted_relays=config.relays or None,
            startup_timeout=START_DEADLINE_S,
        )
        if task.cancelling() > cancels:  # hivemind's wait_for drops it on Python 3.11
            raise asyncio.CancelledError
        patch_control_client(created._client.control)
        daemon = created
    except P2PDaemonError as error:
        raise DaemonError(f"the libp2p daemon did not start: {error}; {_REINSTALL}") from error
    except (OSError, EOFError) as error:
        raise DaemonError(f"can't run the libp2p daemon: {error}; {_REINSTALL}") from error
    finally:
        if daemon is None:
            for half_started in started:
                await half_started.shutdown()
    return daemon


def _relaying(config: NetworkConfig) -> dict[str, Any]:
    """What p2pd takes, and hivemind has no arguments for."""
    return {
        "relayService": config.serves_dht,
        "relayBufferSize": _RELAY_BUFFER_BYTES,
        "relayDataLimit": _RELAYED_BYTES,
        "relayTimeLimit": _RELAYED_FOR,
        "relayDiscovery": False,  # else p2pd uses no relay for 3 minutes when it knows fewer than four
    }
