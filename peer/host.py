"""One peer of the network: its gRPC server, its DHT node, and the ways by which others reach it."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, repeat
from typing import Self

from prometheus_client import CollectorRegistry

from peer import clock
from peer.bounded import BoundedDict
from peer.errors import DaemonError, StartError, UnreachableError
from peer.identity import VALID_FROM, Identity, PeerID
from peer.kademlia.bootstrap import BootstrapReply, join_through
from peer.kademlia.contacts import ContactBook
from peer.kademlia.node import KademliaNode
from peer.kademlia.server import DHTServer
from peer.kademlia.storage import StoreBounds, StoreMetrics
from peer.kademlia.transport import GrpcTransport
from peer.kademlia.validation import Validator
from peer.loop import Restarts, TaskSet
from peer.parsing import ParseGuard
from peer.platform.p2pd import is_offered, why_unavailable
from peer.platform.processes import raise_descriptor_limit
from peer.platform.sockets import sweep_socket_folders
from peer.rates import RateLimit, upload_limit
from peer.relays.client import RelayClient
from peer.relays.dialler import RelayDialler
from peer.relays.reservations import Reservations
from peer.relays.service import RelayServicer
from peer.rpc.channels import ChannelPool
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Admission, Sessions
from peer.transport.addresses import Multiaddress
from peer.transport.contacts import OwnContact
from peer.transport.dialling import Dialling, accepts, nearest_scope, resolved
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig
from peer.transport.pipes import Exit
from peer.transport.port_mapping import PortMapping
from peer.transport.tunnel import Tunnels

logger: logging.Logger = logging.getLogger(__name__)

DIAL_DEADLINE_S = 3.0
_PATIENCE_S = (5.0, 10.0)
"""Deadlines of two more attempts at peers that accept connections but have not answered: their machines may be busy.
The first of these may wait for the same connection as the call before it, and fail with it.
"""
_OTHERWISE = (
    "join through another node with --bootstrap ADDRESS: the address that its log names, or its invite. Or ask the "
    "swarm's founder for a new invite"
)
"""What helps if nobody answers at the addresses in an invite. Its token, if there is one, stays valid."""
_LOOKED_UP = 16
"""The most endpoints of which it is remembered where they led."""
_P2PD_PAUSES_S = (5.0, 30.0, 120.0, 600.0)
"""Pauses between attempts to start p2pd for the first time. The last one is used for all later attempts."""


@dataclass(frozen=True)
class NetworkConfig:
    """Where a peer listens, how others reach it, and what it does for them."""

    listen: str
    """The IP address to listen on."""
    port: int = 0
    """The TCP port of its gRPC server; 0: any free one."""
    announce: Endpoint | None = None
    """Where others reach the server, if that is not where it listens."""
    serves_dht: bool = True
    """Whether others connect to it and it stores DHT keys for them. If not, it is only a client and has no server here.
    """
    most_calls: int = 64
    """Calls to its services at the same time, not counting those of the DHT and of relays."""
    relay_mbit: float = 0.0
    """Mbit/s that it relays for peers behind routers; 0: it does not relay."""
    p2pd: bool = False
    """Starts p2pd if this machine can run it, for streams to and from peers behind routers."""
    p2pd_port: int = 0
    """p2pd's TCP port; 0: any free one."""
    maps_port: bool = False
    """Asks the router to forward the server's port (UPnP), and p2pd's (UPnP, NAT-PMP)."""
    upload_mbit: float | None = None
    """The limit of everything that it sends, in Mbit/s; None: no limit."""
    store: StoreBounds = field(default_factory=StoreBounds)
    """What others may store and look up at it."""

    @property
    def libp2p(self) -> Libp2pConfig:
        """p2pd's settings. Its port, if it is fixed, is announced at the same host as the server's."""
        announce = None
        if self.announce is not None and self.p2pd_port:
            announce = Endpoint.of(self.announce.host, self.p2pd_port)
        return Libp2pConfig(
            self.listen,
            self.p2pd_port,
            public=self.serves_dht,
            announce=announce,
            maps_port=self.maps_port,
            relays_others=self.relay_mbit > 0,
        )


class Host:
    """A running peer. Made by `start`; `stop` it when done."""

    def __init__(
        self,
        identity: Identity,
        config: NetworkConfig,
        *,
        swarm_id: str,
        admission: Admission | None,
        validator: Validator | None,
        metrics: CollectorRegistry | None,
        dialling: Dialling,
        guard: ParseGuard | None,
    ) -> None:
        self.identity = identity
        self.peer_id: PeerID = identity.peer_id
        self.config = config
        self.dialling: Dialling = dialling
        """Which of the addresses that other peers write may be dialled. For everything that this process dials."""
        self.restarts: Restarts = Restarts(metrics)
        """Restarts failed tasks of this process."""
        self.certificate: bytes = identity.make_certificate()
        served = metrics if config.serves_dht else None
        self.upload: RateLimit = upload_limit(config.upload_mbit, served)
        """Limits everything that this peer sends, in the DHT and elsewhere."""
        self.bootstrapped_from: tuple[Multiaddress, ...] = ()
        """The addresses that answered when this peer joined."""
        self._guard = guard or ParseGuard()
        self.contacts: ContactBook = ContactBook(metrics=metrics, guard=self._guard)
        self._own = OwnContact(identity, self.certificate)
        self._transport = GrpcTransport(identity, swarm_id, self.contacts, self._own, self.dialling)
        self.dht: KademliaNode = KademliaNode(
            self._transport,
            validator,
            serves_dht=config.serves_dht,
            bounds=config.store,
            metrics=StoreMetrics(served),
            upload=self.upload,
        )
        self.sessions: Sessions = Sessions(swarm_id, identity.peer_id, admission, metrics=served)
        self.server: RpcServer | None = None
        """Roles add their services to it. None: this peer is a client, and serves nothing here."""
        if config.serves_dht:
            self.server = RpcServer(self.sessions, config.most_calls, metrics, self.restarts)
            self._transport.add_to(self.server.services, self.sessions)
            relaying = RelayServicer(
                self.sessions, self.server.connections, config.relay_mbit, self.upload, metrics
            )
            relaying.add_to(self.server.services)
        self._libp2p = Libp2p(identity, config.libp2p, self.dialling, metrics)
        self.tunnels: Tunnels = Tunnels(self._libp2p.open_stream, metrics=metrics)
        self._relay_client = RelayClient(
            identity,
            swarm_id,
            self.dialling,
            self.contacts.certificate_of,
            metrics,
            self._own_endpoint,
            admission,
        )
        self.relays: RelayDialler = RelayDialler(self._relay_client, metrics)
        """Dials others through their relays."""
        self.reservations: Reservations = Reservations(self._relay_client, metrics, self.restarts)
        """Relays by which others reach this peer."""
        self.port_mapping: PortMapping | None = None
        """The router's port mapping; None: the router is not asked for one."""
        self.port: int = 0
        """The server's port; 0 without one."""
        self._starting: asyncio.Task[None] | None = None
        """The task that starts p2pd, finished or not; None: there is no p2pd."""
        self._announced: tuple[Endpoint, ...] = ()
        self._led_to = BoundedDict[Endpoint, list[Endpoint]](_LOOKED_UP)
        """Where the owner's endpoints led when they were looked up last."""
        self._tasks = TaskSet(self.restarts)

    @classmethod
    async def start(
        cls,
        identity: Identity,
        config: NetworkConfig,
        *,
        bootstrap: Sequence[Multiaddress] = (),
        remembered: Sequence[Multiaddress] = (),
        swarm_id: str = "",
        admission: Admission | None = None,
        validator: Validator | None = None,
        metrics: CollectorRegistry | None = None,
        guard: ParseGuard | None = None,
    ) -> Self:
        """Joins the DHT by the addresses in `bootstrap` and `remembered`, or starts a new one.

        Without `bootstrap`, none of the remembered peers needs to answer. `admission`: who may call this peer's
        services; None: everybody. Raises StartError if this machine can't start it, and UnreachableError if no
        bootstrap address answers.
        """
        given = await resolved(bootstrap)
        own = (
            []
            if bootstrap
            else await resolved([config.announce or Endpoint.of(config.listen, config.port or 1)])
        )
        named = [address.endpoint for address in given or (remembered if bootstrap else ())]
        host = cls(
            identity,
            config,
            swarm_id=swarm_id,
            admission=admission,
            validator=validator,
            metrics=metrics,
            dialling=Dialling(nearest_scope(named or own), [a.endpoint for a in given], metrics),
            guard=guard,
        )
        try:
            await host._start(bootstrap, remembered)
        except BaseException:
            await host.stop()
            raise
        return host

    async def stop(self, grace_s: float | None = None) -> None:
        """Leaves the DHT and ends everything. `grace_s`: for calls in progress. A second call does nothing."""
        await self._tasks.aclose()
        if self.port_mapping is not None:
            await self.port_mapping.end()
        await self.reservations.close()
        await self.relays.close()
        await self._relay_client.close()
        await self.tunnels.close()
        if self.server is not None:
            await self.server.stop(grace_s)
        await self.dht.close()
        await self._transport.close()
        await self._libp2p.stop()

    def channels(self, limit: int) -> ChannelPool:
        """Channels to other peers, by all the ways that this peer has. Close them when done."""
        return ChannelPool(limit, self.tunnels if self.config.p2pd else None, self.dialling, self.relays)

    def peers(self) -> frozenset[PeerID]:
        """The DHT peers in the routing table."""
        return frozenset(peer_id for _, peer_id in self.dht.table)

    def has_failed(self, peer_id: PeerID) -> bool:
        """Whether the peer did not answer this one's last call to its DHT node. False if it was never called."""
        return self.dht.backoff.pause_s(peer_id) > 0

    async def join(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        """Dials peers and joins their DHT. Returns the addresses of those that answered."""
        accepting = await self._accepting(addresses)
        return list(_addresses(await join_through(self.dht, accepting, DIAL_DEADLINE_S)))

    def reached_at(self, peer_id: PeerID) -> list[Multiaddress]:
        """Where this peer has reached another; empty if it has not."""
        contact = self.contacts.get(peer_id)
        endpoints = () if contact is None else contact.addresses
        return [Multiaddress.of(e, peer_id) for e in endpoints if self.dialling.is_known(e, peer_id)]

    async def announce_at(self, endpoints: Iterable[Endpoint]) -> None:
        """Announces that others reach the server there, the best address first. Host names are looked up."""
        self._announced = tuple(endpoints)
        self._own.set(await self.look_up(self._announced))

    async def look_up(self, endpoints: Iterable[Endpoint]) -> list[Endpoint]:
        """The owner's endpoints, with the IP addresses to which host names lead. A name that can't be looked up now
        leads where it led last: otherwise nobody could call this peer while a name server is down.
        """
        found: list[Endpoint] = []
        for endpoint in endpoints:
            led = self._led_to[endpoint] = await resolved([endpoint]) or self._led_to.get(endpoint, [])
            found += led
        return list(dict.fromkeys(found))

    def serve_dht(self, serves: bool) -> None:
        """Makes this peer a node of the DHT, or only a client, for example while nobody can reach its server."""
        self.dht.serves_dht = serves and self.server is not None

    def bootstrap_addresses(self) -> list[Multiaddress]:
        """Multiaddresses by which others can join; loopback ones only if there are no others. A client has none."""
        if not self.dht.serves_dht:
            return []
        further = [each for each in self._announced if each.scope is not AddressScope.LOOPBACK]
        return [Multiaddress.of(each, self.peer_id) for each in further or self._announced][:8]

    async def serve_tunnel(self, open_exit: Exit, most_streams: int = 256) -> None:
        """Forwards other peers' gRPC that arrives through libp2p or relays to a server of this peer."""
        self.tunnels.set_exit(open_exit, most_streams)
        self.reservations.set_exit(open_exit)
        await self.tunnels.serve_on(self._libp2p)

    async def tunnel_addresses(self) -> list[Multiaddress]:
        """Multiaddresses by which other peers open libp2p streams to this one; empty while there is no p2pd."""
        if not self._libp2p.alive:
            return []
        with contextlib.suppress(UnreachableError):
            return await self._libp2p.addresses()
        return []

    @property
    def runs_p2pd(self) -> bool:
        """Whether this peer starts p2pd, and restarts it whenever it ends. It may be down now."""
        return self._starting is not None

    async def tunnel_through(self, relays: Sequence[Multiaddress]) -> None:
        """Restarts p2pd, if it runs: with these relays, or, if there are none, as a peer that relays for others.

        Raises DaemonError if it does not start. Further attempts follow.
        """
        public, now = self.dht.serves_dht and not relays, self._libp2p.config
        if self._starting is None or (public, tuple(relays)) == (now.public, now.relays):
            return
        self._starting.cancel()
        await asyncio.wait([self._starting])
        await self._libp2p.restart_as(public=public, relays=relays)

    async def _start(self, bootstrap: Sequence[Multiaddress], remembered: Sequence[Multiaddress]) -> None:
        if (now := clock.now()) < VALID_FROM.timestamp():
            day = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d}"
            raise StartError(
                f"this machine's clock says that it is {day}: set it right, for no certificate is valid at that time"
            )
        raise_descriptor_limit()
        sweep_socket_folders()
        accepting = await self._accepting((*bootstrap, *remembered))
        if bootstrap and not accepting:
            if all(address.peer_id == self.peer_id for address in bootstrap):
                raise UnreachableError(
                    "this invite leads to this node itself: if you founded the swarm, start the node with --new again; "
                    "otherwise ask for the invite of another node"
                )
            raise UnreachableError(
                f"none of the bootstrap addresses answers: {', '.join(bootstrap)}; check that this machine has a "
                "network connection, and that its firewall allows connections to these ports. Or these peers are gone: "
                f"{_OTHERWISE}"
            )
        if self.server is not None:
            await self._listen(self.server)
        if self.config.p2pd:
            # not awaited: the swarm is joined without it
            self._starting = self._tasks.spawn(self._start_libp2p(), "start the libp2p daemon")
        replies: list[BootstrapReply] = []
        for deadline_s in (DIAL_DEADLINE_S, *_PATIENCE_S):
            if replies := await join_through(self.dht, accepting, deadline_s):
                break
        if bootstrap and not replies:
            said = (self._transport.refusal_of(address.peer_id) for address in accepting)
            if refusals := {refusal for refusal in said if refusal}:
                raise UnreachableError(
                    "no peer at the bootstrap addresses accepts calls from this one "
                    f"({'; '.join(sorted(refusals)[:3])}); "
                    "update Talkoot, or ask for a new invite"
                )
            raise UnreachableError(
                f"a bootstrap address accepts connections, but no DHT peer answered there: {', '.join(bootstrap)}. "
                "If it is only busy, trying again in a minute helps. If another program uses the port now, "
                f"{_OTHERWISE}"
            )
        for warning in self._doubts(replies):
            logger.warning("%s", warning)
        self.bootstrapped_from = _addresses(replies)

    async def _listen(self, server: RpcServer) -> None:
        """Raises PortError."""
        config = self.config
        await DHTServer(self.dht, self._guard).start()
        credentials = server_credentials(self.identity, self.certificate)
        self.port = await server.start(credentials, config.listen, config.port)
        await self.announce_at([config.announce or Endpoint.of(config.listen, self.port)])
        if config.maps_port and PortMapping.helps(config.listen):
            self.port_mapping = PortMapping(config.listen, self.port)
            # not awaited: until then, others reach this peer by its relays
            self._tasks.supervise("ask the router to forward the port", self.port_mapping.keep)

    async def _start_libp2p(self) -> None:
        said = ""
        for pause_s in chain(_P2PD_PAUSES_S, repeat(_P2PD_PAUSES_S[-1])):
            try:
                await self._libp2p.start()
                return
            except DaemonError as error:
                if str(error) != said:
                    said = str(error)
                    logger.log(
                        logging.WARNING if is_offered() else logging.INFO,
                        "peers behind routers are reached by relays only: %s",
                        error,
                    )
            if why_unavailable():
                break
            await asyncio.sleep(pause_s)  # the machine may have been busy, or the port taken
        self._starting = None

    def _doubts(self, replies: Sequence[BootstrapReply]) -> Iterator[str]:
        """Problems that others report about this peer. They may be wrong or lie, so this peer starts anyway."""
        if clock.CLOCK.warning:  # others take this peer's contact for outdated, and don't dial it
            yield clock.CLOCK.warning
        elif self.server is not None and replies and not any(reply.reaches_us for reply in replies):
            asked = len(replies)
            said = "the peer asked can't" if asked == 1 else f"none of the {asked} peers asked can"
            yield (
                f"{said} reach this one: open its port to the others, or pass the address by which they reach this "
                "machine as --host"
            )

    def _own_endpoint(self) -> Endpoint | None:
        """The address of this peer's own server, which may be the relay of a peer that it calls."""
        return Endpoint.of(self.config.listen, self.port) if self.port else None

    async def _accepting(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        """The addresses that may be dialled and accept a connection, in the same order.

        Host names are looked up: only the owner and the invite give any.
        """

        async def dial(address: Multiaddress) -> bool:
            endpoint = address.endpoint
            return self.dialling.begin(endpoint, address.dialled) and await accepts(endpoint, DIAL_DEADLINE_S)

        numeric = await resolved(addresses)
        results = await asyncio.gather(*map(dial, numeric))
        return [address for address, ok in zip(numeric, results, strict=True) if ok]


def _addresses(replies: Iterable[BootstrapReply]) -> tuple[Multiaddress, ...]:
    return tuple(address for reply in replies for address in reply.addresses)
