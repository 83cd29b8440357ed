"""One peer of the network: its libp2p daemon (p2pd), its DHT node and its tunnels, restarted when p2pd dies."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self

from prometheus_client import CollectorRegistry, Counter

from peer.clock import CLOCK
from peer.errors import DaemonError, UnreachableError, UserError
from peer.formatting import counted
from peer.identity import Identity, PeerID
from peer.kademlia.hivemind import DHTNode, RecordValidatorBase
from peer.kademlia.node import BootstrapReply, bootstrap, known_peers, start_dht, stop_dht
from peer.kademlia.storage import StoreBounds, StoreMetrics
from peer.loop import keep_running
from peer.metrics import total
from peer.parsing import ParseGuard
from peer.processes import raise_descriptor_limit, sweep_socket_folders
from peer.rates import upload_limit
from peer.transport.addresses import Multiaddress, NetworkConfig, require_free_port
from peer.transport.dialling import Dialling, nearest_scope, resolved
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.p2pd import START_DEADLINE_S, TRANSPORT_ERRORS, Daemon, start_daemon
from peer.transport.tunnel import OpenExit, Pipe, Tunnels

logger = logging.getLogger(__name__)

DIAL_DEADLINE_S = 3.0
_RESTART_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Before p2pd is started again. The last one holds for all later tries: whoever can end p2pd must not end its node."""
_STEADY_S = 60.0
"""A p2pd that ran for so long died of something new, and the pauses start from the first."""
_MOST_DAEMON_BYTES = 256 * 2**20
"""A p2pd that takes more memory is started again. Usually it takes about 60 MiB."""
_WATCH_EVERY_S = 1.0
_DOWN = "the libp2p daemon has ended; it is being started again"


class Host:
    """A running peer. Made by `start`; `stop` it when done."""

    def __init__(
        self,
        identity: Identity,
        config: NetworkConfig,
        validator: RecordValidatorBase | None,
        store_bounds: StoreBounds | None = None,
        metrics: CollectorRegistry | None = None,
        dialling: Dialling | None = None,
        guard: ParseGuard | None = None,
    ) -> None:
        self.identity = identity
        self.dialling = dialling or Dialling(AddressScope.LOOPBACK)
        """Which of the addresses that others write are dialled; for all that this process dials."""
        self.config = config
        self.tunnels = Tunnels(self._open_stream, metrics=metrics)
        self.bootstrapped_from: tuple[Multiaddress, ...] = ()
        """Addresses of the peers that answered at the start."""
        self._restarts = Counter(
            "talkoot_p2pd_restarts",
            "Times that the libp2p daemon died and was started again.",
            registry=metrics,
        )
        self._store_bounds = store_bounds or StoreBounds()
        served = metrics if config.serves_dht else None
        self._store_metrics = StoreMetrics(served)
        self.upload = upload_limit(self._store_bounds.upload_mbit, served)
        """Of all that this peer sends, in the DHT and elsewhere."""
        self._validator = validator
        self._guard = guard or ParseGuard()
        self._daemon: Daemon | None = None
        self._dht: DHTNode | None = None
        self._remembered: tuple[Multiaddress, ...] = ()
        self._ready = False
        self._supervisor: asyncio.Task[None] | None = None
        self._restarted = asyncio.Event()
        self._problem = ""
        """Why p2pd can't be started, as logged last."""

    @classmethod
    async def start(
        cls,
        identity: Identity,
        config: NetworkConfig,
        *,
        bootstrap: Sequence[Multiaddress] = (),
        remembered: Sequence[Multiaddress] = (),
        validator: RecordValidatorBase | None = None,
        store_bounds: StoreBounds | None = None,
        metrics: CollectorRegistry | None = None,
        guard: ParseGuard | None = None,
    ) -> Self:
        """Joins the DHT by the addresses in `bootstrap` and `remembered`, or starts a new one.

        If there is no `bootstrap`, it may be that none of the remembered peers answers. Raises StartError when this
        machine can't start it, and UnreachableError when no bootstrap address answers.
        """
        given = await resolved(bootstrap)
        own = (
            []
            if bootstrap
            else await resolved([config.announce or Endpoint.of(config.listen, config.port or 1)])
        )
        named = [address.endpoint for address in given or (remembered if bootstrap else ())]
        dialling = Dialling(nearest_scope(named or own), [a.endpoint for a in given], metrics)
        host = cls(identity, config, validator, store_bounds, metrics, dialling, guard)
        try:
            await host._start(bootstrap, remembered)
        except BaseException:
            await host.stop()
            raise
        return host

    async def stop(self) -> None:
        """Leaves the DHT and ends p2pd. Stopping twice is harmless."""
        await self._dismiss_supervisor()
        await self.tunnels.close()
        await self._end()

    async def restart_as(self, *, serves_dht: bool, relays: Sequence[Multiaddress] = ()) -> None:
        """Restarts p2pd on its port: as a peer to which others connect, or as a client that they reach by relays.

        Raises DaemonError when it does not start; then it is restarted as if it had died.
        """
        await self._dismiss_supervisor()
        await self._end()
        self.config = replace(self.config, serves_dht=serves_dht, relays=tuple(relays))
        try:
            await self._start_daemon()
            await self.join(self.bootstrap_candidates)
            self._ready = True
            self._restarted.set()
        except BaseException:
            await self._end()
            raise
        finally:
            self._start_supervisor()

    async def serve_tunnel(self, open_exit: OpenExit, most_streams: int = 256) -> None:
        """Forwards other peers' gRPC that comes through libp2p to this peer's server."""
        self.tunnels.set_exit(open_exit, most_streams)
        try:
            await self.tunnels.serve_on(self.p2p)
        except (UnreachableError, *TRANSPORT_ERRORS) as error:
            logger.warning("the tunnel is served when the libp2p daemon runs again: %s", error)

    @property
    def restarts(self) -> int:
        """How often p2pd died and was started again."""
        return int(total(self._restarts))

    @property
    def bootstrap_candidates(self) -> tuple[Multiaddress, ...]:
        """Addresses of peers by which this one joins after a restart of p2pd."""
        return self._remembered

    def remember(self, addresses: Sequence[Multiaddress]) -> None:
        """From now on these are the candidates."""
        self._remembered = tuple(addresses)

    @property
    def peer_id(self) -> PeerID:
        return self.identity.peer_id

    @property
    def alive(self) -> bool:
        """Whether p2pd runs. False while it is restarted and joins."""
        return self._ready

    @property
    def p2p(self) -> Daemon:
        """The current p2pd. Raises UnreachableError while there is none."""
        if self._daemon is None:
            raise UnreachableError(_DOWN)
        return self._daemon

    @property
    def dht(self) -> DHTNode:
        """The current DHT node; don't keep it. Raises UnreachableError while p2pd is restarted."""
        if self._dht is None or not self._ready:
            raise UnreachableError(_DOWN)
        return self._dht

    def peers(self) -> frozenset[PeerID]:
        """The DHT peers in the routing table."""
        if self._dht is None or not self._ready:
            return frozenset()
        return known_peers(self._dht)

    async def join(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        """Dials peers and joins their DHT. Returns the addresses of those that answered."""
        return list(_addresses(await self._bootstrap(await self._accepting(addresses))))

    async def confirmed(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        """Those of the addresses at which the peers are, as far as can be told: it is there that they are connected.

        Peers that are not connected are dialled. Raises UnreachableError if p2pd does not answer.
        """
        daemon = self.p2p
        by_peer: dict[PeerID, list[Multiaddress]] = {}
        for address in addresses:
            by_peer.setdefault(address.peer_id, []).append(address)

        async def dial(peer_id: PeerID) -> None:
            with contextlib.suppress(*TRANSPORT_ERRORS):
                await daemon.connect(peer_id, by_peer[peer_id], DIAL_DEADLINE_S)

        try:
            connected = await daemon.connected_ips(DIAL_DEADLINE_S)
            await asyncio.gather(*map(dial, by_peer.keys() - connected.keys()))
            connected = await daemon.connected_ips(DIAL_DEADLINE_S)
        except TRANSPORT_ERRORS as error:
            raise UnreachableError("the libp2p daemon does not answer") from error
        return [
            address
            for address in addresses
            if self.dialling.allows(address.endpoint)
            and address.endpoint.ip in connected.get(address.peer_id, ())
        ]

    async def wait_for_restart(self, longest_s: float) -> None:
        """Sleeps for `longest_s`, or until p2pd was restarted: then everything has to be announced again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._restarted.wait()
        self._restarted.clear()

    async def bootstrap_addresses(self) -> list[Multiaddress]:
        """Multiaddresses by which others can join; loopback ones only if there are no others. A client has none.

        Raises UnreachableError when p2pd does not answer.
        """
        if not self.config.serves_dht:
            return []
        direct = [a for a in await self._visible() if not a.is_relayed]
        further = [a for a in direct if a.endpoint.scope is not AddressScope.LOOPBACK]
        return (further or direct)[:8]

    async def tunnel_addresses(self) -> list[Multiaddress]:
        """Multiaddresses by which other peers open streams to this one: its own, or those of its relays.

        Raises UnreachableError when p2pd does not answer.
        """
        if self.config.serves_dht:
            return await self.bootstrap_addresses()
        return [a for a in await self._visible() if a.is_relayed or a.is_public][:8]

    async def _visible(self) -> list[Multiaddress]:
        try:
            return await self.p2p.own_addresses(DIAL_DEADLINE_S)
        except TRANSPORT_ERRORS as error:
            raise UnreachableError("the libp2p daemon does not answer") from error

    async def _open_stream(
        self, peer_id: PeerID, addresses: Sequence[Multiaddress], protocol: str, deadline_s: float
    ) -> Pipe:
        """Raises UnreachableError."""
        if self._daemon is None:
            raise UnreachableError(_DOWN)
        try:
            with contextlib.suppress(*TRANSPORT_ERRORS):  # they may be connected by other addresses
                await self._daemon.connect(peer_id, addresses, deadline_s)
            return await self._daemon.open_stream(peer_id, protocol, deadline_s)
        except TRANSPORT_ERRORS as error:
            raise UnreachableError(f"no stream to {peer_id}: {error}") from error

    async def _start(self, bootstrap: Sequence[Multiaddress], remembered: Sequence[Multiaddress]) -> None:
        raise_descriptor_limit()
        sweep_socket_folders()
        if self.config.serves_dht:
            require_free_port(self.config.listen, self.config.port)
        accepting = await self._accepting((*bootstrap, *remembered))
        if bootstrap and not accepting:
            raise UnreachableError(
                f"no bootstrap address answers, of {', '.join(bootstrap)}; does this machine "
                "have a network connection? If it has, they may be gone for good: ask for a new invite"
            )
        await self._start_daemon()
        # a busy peer may be late, so all are asked twice
        replies = await self._bootstrap(accepting) or await self._bootstrap(accepting)
        if bootstrap and not replies:
            raise UnreachableError(
                f"a bootstrap address accepts connections, but no DHT peer answered there: {', '.join(bootstrap)}; "
                "other programs may have their ports now: ask for a new invite"
            )
        for warning in self._doubts(replies):
            logger.warning("%s", warning)
        self.remember((*bootstrap, *remembered))
        self.bootstrapped_from = _addresses(replies)
        self._ready = True
        self._start_supervisor()

    def _doubts(self, replies: Sequence[BootstrapReply]) -> Iterator[str]:
        """What others say against this peer. They may be wrong or lie, so none of it keeps a peer from starting."""
        if CLOCK.warning:
            yield CLOCK.warning
        if self.config.serves_dht and replies and not any(reply.reaches_us for reply in replies):
            yield (
                f"none of the {counted(len(replies), 'peer')} asked can reach this one: open its DHT port to the "
                "others, or pass the address by which they reach this machine as --host"
            )

    async def _start_daemon(self) -> None:
        """Starts p2pd, on the port it had before, and a DHT node that knows nobody. Raises DaemonError."""
        config = self.config
        daemon = self._daemon = await start_daemon(self.identity, config, self.dialling)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                self._dht = await start_dht(
                    daemon,
                    self._validator,
                    config.serves_dht,
                    self._store_bounds,
                    self._store_metrics,
                    self.upload,
                    self._guard,
                )
                await self.tunnels.serve_on(daemon)
                addresses = await self._visible() if config.listens else []
        except (*TRANSPORT_ERRORS, UnreachableError) as error:
            raise DaemonError(
                "the libp2p daemon does not answer: is this machine very busy? Start this again"
            ) from error
        own = next((address for address in addresses if not address.is_relayed), None)
        if not config.port and own is not None:
            # what is announced need not be where it listens
            self.config = replace(config, port=own.endpoint.port)

    async def _end(self) -> None:
        self._ready = False
        dht, self._dht = self._dht, None
        if dht is not None:
            stop_dht(dht)
        if self._daemon is not None:
            await self._daemon.shutdown()
            self._daemon = None

    def _start_supervisor(self) -> None:
        self._supervisor = asyncio.create_task(keep_running("supervise the libp2p daemon", self._supervise))

    async def _dismiss_supervisor(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    async def _bootstrap(self, addresses: Sequence[Multiaddress]) -> list[BootstrapReply]:
        if self._daemon is None or self._dht is None:
            raise UnreachableError(_DOWN)
        return await bootstrap(self._daemon, self._dht, addresses, DIAL_DEADLINE_S)

    async def _accepting(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        """Those of the addresses that may be dialled and at which something accepts a connection, in the same order.

        Names are looked up: only the owner and the invite give any.
        """

        async def accepts(address: Multiaddress) -> bool:
            endpoint = address.endpoint
            if not self.dialling.begin(endpoint, address.dialled):
                return False
            try:
                async with asyncio.timeout(DIAL_DEADLINE_S):
                    _, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            except OSError:
                return False
            writer.close()
            return True

        numeric = await resolved(addresses)
        results = await asyncio.gather(*map(accepts, numeric))
        return [address for address, ok in zip(numeric, results, strict=True) if ok]

    async def _supervise(self) -> None:
        """Restarts p2pd whenever it ends or takes too much memory."""
        tries = 0
        while True:
            if self._daemon is not None and self._ready:
                began = time.monotonic()
                logger.warning("the libp2p daemon %s; starting it again", await _failure(self._daemon))
                if time.monotonic() - began > _STEADY_S:
                    tries = 0
            restarted = False
            while not restarted:
                await self._end()
                await asyncio.sleep(_RESTART_PAUSES_S[min(tries, len(_RESTART_PAUSES_S) - 1)])
                tries += 1
                restarted = await self._restart()

    async def _restart(self) -> bool:
        """Whether it succeeded."""
        try:
            await self._start_daemon()
            joined = await self.join(self.bootstrap_candidates)
        except (*TRANSPORT_ERRORS, UserError) as error:
            if str(error) != self._problem:
                logger.warning("the libp2p daemon can't be started again: %s; trying on", error)
            self._problem = str(error)
            return False
        self._problem = ""
        self._ready = True
        self._restarts.inc()
        self._restarted.set()
        logger.warning("the libp2p daemon runs again and has joined by %d known addresses", len(joined))
        return True


async def _failure(daemon: Daemon) -> str:
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


def _addresses(replies: Iterable[BootstrapReply]) -> tuple[Multiaddress, ...]:
    return tuple(address for reply in replies for address in reply.addresses)
