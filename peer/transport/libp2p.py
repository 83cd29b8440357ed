"""libp2p in addition to gRPC: streams to peers behind routers, by hole punching or through libp2p relays.

p2pd, a Go process, opens them; hivemind brings it, on platforms that it supports. A peer works without p2pd: it then
reaches peers behind routers by relays over gRPC, which is a longer way. So nothing here prevents a peer from starting,
and if p2pd ends, nothing else does. hivemind is imported only when p2pd starts.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter

from peer.errors import DaemonError, PortError, UnreachableError, UserError
from peer.identity import Identity, PeerID
from peer.loop import is_cancelled, keep_running
from peer.platform.p2pd import REINSTALL, why_unavailable
from peer.platform.processes import raise_descriptor_limit
from peer.platform.sockets import sweep_socket_folders
from peer.transport.addresses import Multiaddress, require_free_port
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope
from peer.transport.p2pd_setup import START_DEADLINE_S, Libp2pConfig
from peer.transport.pipes import Pipe
from peer.transport.tunnel import StreamHandler

if TYPE_CHECKING:
    from peer.transport.p2pd import Daemon

logger: logging.Logger = logging.getLogger(__name__)

CALL_DEADLINE_S = 3.0
"""The deadline for what p2pd answers by itself, and for a dial that may fail."""
_MOST_ADDRESSES = 8
_RESTART_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)
"""The pauses before p2pd is started again. The last one is used for all later attempts."""
_STEADY_S = 60.0
"""If p2pd ran this long before it died, the pauses begin again with the first."""
_MOST_DAEMON_BYTES = 256 * 2**20
"""If p2pd takes more memory than this, it is restarted. Usually it takes about 60 MiB."""
_WATCH_EVERY_S = 1.0
_DOWN = "the libp2p daemon does not run now"


class Libp2p:
    """This peer's p2pd, restarted whenever it ends or takes too much memory.

    `start` and `restart_as` run one at a time; `stop` ends either at any moment.
    """

    def __init__(
        self,
        identity: Identity,
        config: Libp2pConfig,
        dialling: Dialling,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        self.config: Libp2pConfig = config
        self._identity = identity
        self._dialling = dialling
        self.restarts: Counter = Counter(
            "talkoot_p2pd_restarts",
            "Times that the libp2p daemon died and was started again.",
            registry=metrics,
        )
        self._handlers: dict[str, StreamHandler] = {}
        self._daemon: Daemon | None = None
        self._ready = False
        self._task: asyncio.Task[None] | None = None
        """The task that starts p2pd now, or supervises it."""
        self._problem = ""
        """The last logged reason why p2pd can't be started."""

    async def start(self) -> None:
        """Raises DaemonError, which says what to do, if this machine can't run p2pd; then nothing of it is left
        behind.
        """
        if problem := why_unavailable():
            raise DaemonError(problem)
        try:
            if self.config.public:
                require_free_port(self.config.listen, self.config.port)
        except PortError as error:
            raise DaemonError(f"the libp2p daemon {error}") from error
        await self._begin(keep_trying=False)

    async def stop(self) -> None:
        """Ends p2pd, even while it starts. Stopping twice is harmless."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._end()

    async def restart_as(self, *, public: bool, relays: Sequence[Multiaddress] = ()) -> None:
        """Restarts p2pd on its port: as a public peer, to which others connect, or as one that they reach through these
        relays.

        Raises DaemonError if it does not start. It is then restarted as if it had died.
        """
        await self.stop()
        self.config = replace(self.config, public=public, relays=tuple(relays))
        await self._begin(keep_trying=True)

    @property
    def alive(self) -> bool:
        """Whether p2pd runs. False while it is being started or restarted."""
        return self._ready

    async def addresses(self) -> list[Multiaddress]:
        """Multiaddresses by which others open streams to this peer: its own if it is public, else those of its relays.

        At most eight, and loopback ones only if there are no others. Raises UnreachableError if p2pd does not answer.
        """
        found = await self._running().own_addresses(CALL_DEADLINE_S)
        if self.config.public:
            direct = [a for a in found if not a.is_relayed]
            found = [a for a in direct if a.endpoint.scope is not AddressScope.LOOPBACK] or direct
        else:
            found = [a for a in found if a.is_relayed or a.is_public]
        return found[:_MOST_ADDRESSES]

    async def open_stream(
        self, peer_id: PeerID, addresses: Sequence[Multiaddress], protocol: str, deadline_s: float
    ) -> Pipe:
        """A stream to a peer that serves this protocol, through a relay if needed. Raises UnreachableError.

        `addresses`: where to dial the peer if it is not connected. `deadline_s`: for dialling, and again for opening.
        """
        daemon = self._running()
        try:
            with contextlib.suppress(UnreachableError):  # the peer may be connected by other addresses
                await daemon.connect(peer_id, addresses, deadline_s)
            return await daemon.open_stream(peer_id, protocol, deadline_s)
        except UnreachableError as error:
            raise UnreachableError(f"no stream to {peer_id}: {error}") from error

    async def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        """Passes other peers' streams of this protocol to the handler from now on, whenever p2pd runs."""
        self._handlers[protocol] = handler
        if self._ready:
            try:
                await self._running().serve_streams(protocol, handler)
            except UnreachableError as error:
                logger.warning("%s will be served when the libp2p daemon runs again: %s", protocol, error)

    def _running(self) -> "Daemon":
        """Raises UnreachableError."""
        if self._daemon is None or not self._ready:
            raise UnreachableError(_DOWN)
        return self._daemon

    async def _begin(self, *, keep_trying: bool) -> None:
        """Starts p2pd, and supervises it from then on. With `keep_trying`, it does so even if the start fails."""
        starting = self._task = asyncio.create_task(self._launch())
        try:
            await starting
        except BaseException as error:
            if self._task is starting:
                self._task = None
                if keep_trying:
                    self._supervise_from_now_on()
                else:
                    await self._end()
            elif isinstance(error, asyncio.CancelledError) and not is_cancelled():
                raise DaemonError("the libp2p daemon was stopped before it had started") from None
            raise
        if self._task is starting:
            self._supervise_from_now_on()

    def _supervise_from_now_on(self) -> None:
        self._task = asyncio.create_task(keep_running("supervise the libp2p daemon", self._supervise))

    async def _launch(self) -> None:
        """Starts p2pd on its previous port, with the handlers. Raises DaemonError; then nothing of it is left
        behind.
        """
        raise_descriptor_limit()
        sweep_socket_folders()
        # in a thread, because the first time takes a tenth of a second or more of CPU time
        p2pd = await asyncio.to_thread(_import_p2pd)
        config = self.config
        self._daemon = daemon = await p2pd.start_daemon(self._identity, config, self._dialling)
        try:
            for protocol, handler in self._handlers.items():
                await daemon.serve_streams(protocol, handler)
            addresses = await daemon.own_addresses(START_DEADLINE_S) if config.listens else []
        except BaseException as error:
            await self._end()
            if isinstance(error, UnreachableError):
                raise DaemonError(
                    "the libp2p daemon does not answer: is this machine very busy? Start this again"
                ) from error
            raise
        own = next((address for address in addresses if not address.is_relayed), None)
        # the announced address may not be where it listens
        if own is not None and not config.port and config.announce is None:
            self.config = replace(config, port=own.endpoint.port)
        self._ready = True

    async def _end(self) -> None:
        self._ready = False
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            await daemon.shutdown()

    async def _supervise(self) -> None:
        """Restarts p2pd whenever it ends or takes too much memory."""
        tries = 0
        while True:
            if self._daemon is not None and self._ready:
                began = time.monotonic()
                logger.warning("the libp2p daemon %s; starting it again", await _failure(self._daemon))
                if time.monotonic() - began > _STEADY_S:
                    tries = 0
            await self._end()
            await asyncio.sleep(_RESTART_PAUSES_S[min(tries, len(_RESTART_PAUSES_S) - 1)])
            tries += 1
            try:
                await self._launch()
            except UserError as error:
                if str(error) != self._problem:
                    logger.warning("the libp2p daemon can't be restarted: %s; still trying", error)
                self._problem = str(error)
            else:
                self._problem = ""
                self.restarts.inc()
                logger.warning("the libp2p daemon runs again")


def _import_p2pd() -> "ModuleType":
    """Raises DaemonError."""
    try:
        with _locks_without_a_process():
            from peer.transport import p2pd
    except ImportError as error:
        raise DaemonError(f"can't import hivemind: {error}; {REINSTALL}") from error
    return p2pd


@contextlib.contextmanager
def _locks_without_a_process() -> Iterator[None]:
    """hivemind makes locks between processes when it is imported. Unless new processes are forked, which is not the
    default from Python 3.14 on, such locks start another process.
    """
    usual = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(usual, force=True)


async def _failure(daemon: "Daemon") -> str:
    """Waits until p2pd ends or takes too much memory, and says which."""
    ended = asyncio.ensure_future(daemon.ended())
    try:
        while not ended.done():
            if (taken := daemon.memory_bytes) > _MOST_DAEMON_BYTES:
                return f"takes {taken / 2**20:.0f} MiB of memory, which is too much"
            await asyncio.wait([ended], timeout=_WATCH_EVERY_S)
        return f"ended with status {ended.result()}"
    finally:
        ended.cancel()
