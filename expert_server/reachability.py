"""Whether and how others reach this node: it asks them to dial back, and finds relays when they can't."""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from dht.announcements import NodeInfo, Reachability
from dht.relays import RelayBackoff, find_relays, relayed_addresses, some_nodes
from dht.swarm import Stage, Swarm
from expert_server.probe import DialledBack, call_dial_back
from expert_server.settings import NodeSettings
from peer.errors import DaemonError, UnreachableError
from peer.loop import tolerating
from peer.rpc.channels import ChannelPool
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import AddressScope, Endpoint, is_public

logger = logging.getLogger(__name__)

_ASKED = 3
"""Nodes that are asked to dial back."""
_ASK_S = 20.0
"""Longest that asking all of them may take."""
_ASK_AGAIN_S = 600.0
"""Time until other nodes are asked again."""
_UNANSWERED = 2
"""Rounds without an answer after which a machine with a private address takes itself for unreachable."""
_RELAYS = 4


@dataclass(frozen=True)
class DialledPorts:
    """What one other node said of its attempts to connect to this node's two ports."""

    service: DialledBack
    dht: DialledBack


@dataclass(frozen=True)
class Judgement:
    """Whether at least half of the nodes that tried reached the ports."""

    asked: int
    service: bool
    dht: bool
    reached_at: tuple[str, ...]
    """IP addresses at which at least half of them reached the expert service, the one seen most often first."""


def judge(dials: Sequence[DialledPorts]) -> Judgement:
    """A port counts as reached when at least half of the nodes reached it, so that a single liar changes little."""
    service = sum(dial.service.connected for dial in dials)
    dht = sum(dial.dht.connected for dial in dials)
    seen = Counter(dial.service.address for dial in dials if dial.service.connected)
    return Judgement(
        asked=len(dials),
        service=2 * service >= len(dials) > 0,
        dht=2 * dht >= len(dials) > 0,
        # so that no single liar has this node announce another machine's address
        reached_at=tuple(address for address, times in seen.most_common() if 2 * times >= service),
    )


@dataclass(frozen=True)
class ReachabilityStatus:
    """How others reach this node now."""

    kind: Reachability = Reachability.UNKNOWN
    relays: int = 0
    """Relays that lead to it."""
    looking: bool = False
    """Whether it looks for a relay: nobody reaches it until it has one."""
    asked: int = 0
    """Nodes that were asked to dial back."""

    @property
    def in_words(self) -> str:
        """Such as `direct` or `relayed by 3 relays`."""
        if self.looking:
            return "looking for a relay"
        if self.kind is Reachability.UNKNOWN:
            return "not known: no other node to ask yet"
        if self.kind is Reachability.RELAYED and self.relays:
            return f"relayed by {self.relays} relay{'' if self.relays == 1 else 's'}"
        return self.kind.name.lower()


def advice(status: ReachabilityStatus, host: str, dht_port: int, grpc_port: int) -> str:
    """What the owner can do so that others connect directly; empty when they do. A port is 0 when it changes."""
    if status.kind in {Reachability.UNKNOWN, Reachability.DIRECT}:
        return ""
    if not (dht_port and grpc_port):
        return f"pass --dht-port and --grpc-port, and forward both TCP ports on your router to {host}"
    ports = " and ".join(str(port) for port in sorted({dht_port, grpc_port}))
    if is_public(host):
        return f"let TCP ports {ports} in through the firewall"
    return f"forward TCP ports {ports} on your router to {host}"


class ReachabilityMonitor:
    """Keeps one node reachable, and knows how others reach it. Call `begin` once, and `check` now and then."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        self.status = ReachabilityStatus()
        self.tunnel_addresses: tuple[Multiaddress, ...] = ()
        self._settings = settings
        self._swarm = swarm
        self._host = ""
        self._port = 0
        self._addresses: tuple[Endpoint, ...] = ()
        self._rng = rng
        self._clock = clock
        self._next_at = float("-inf")
        self._backoff = RelayBackoff()
        self._unanswered = 0
        """How often in a row there was nobody to ask, or nobody answered."""
        self._doubts = 0
        """How often in a row others could not reach this node, which they had reached before."""
        ways = Gauge(
            "talkoot_reachability",
            "How others reach this node: 1 for what is so.",
            ["way"],
            registry=metrics,
        )
        for kind in Reachability:
            ways.labels(kind.name.lower()).set_function(partial(self._is, kind))

    @property
    def addresses(self) -> tuple[Endpoint, ...]:
        """`host:port` of the expert service, as it is announced."""
        return self._addresses

    @property
    def advice(self) -> str:
        """What the owner can do so that others connect directly; empty when they do."""
        settings = self._settings
        return advice(self.status, self._host, settings.dht_port, settings.grpc_port)

    def _is(self, kind: Reachability) -> bool:
        return self.status.kind is kind

    async def begin(self, host: str, port: int, stage: Stage = logger.info) -> None:
        """Finds out how others reach the expert service on this address and port. Raises UnreachableError."""
        self._host, self._port = host, port
        self._addresses = (self._own_address,)
        await self.check(stage)
        logger.info("others reach this node: %s", self.status.in_words)

    async def check(self, stage: Stage = logger.info) -> None:
        """Asks others when it is time, and looks for relays when there are none. Raises UnreachableError."""
        mode = self._settings.reachability
        if mode == "public" or (mode == "auto" and self._host.startswith(("127.", "::1"))):
            await self._need_no_relay(ReachabilityStatus(Reachability.DIRECT))
        elif mode == "private":
            await self._hide(Judgement(0, service=False, dht=False, reached_at=()), stage)
        elif self._clock() >= self._next_at:
            await self._ask(stage)
        if self.status.kind in {Reachability.PUNCHED, Reachability.RELAYED}:
            await self._note_relays(stage)

    async def _ask(self, stage: Stage) -> None:
        stage("asking others whether they reach this machine")
        judgement = judge(await self._dials())
        if not judgement.asked:
            self._unanswered += 1
            # what others said holds until they say something else: the line may be down for a while
            if self._unanswered >= _UNANSWERED and not self.status.asked and self._is_inside():
                await self._hide(judgement, stage)
            return  # the next announcement tries again
        self._unanswered = 0
        self._next_at = self._clock() + _ASK_AGAIN_S
        if judgement.service:
            self._doubts = 0
            self._addresses = self._announced(judgement)
            await self._need_no_relay(
                ReachabilityStatus(Reachability.DIRECT, asked=judgement.asked), serves_dht=judgement.dht
            )
            return
        self._doubts += 1
        if self.status.kind is Reachability.DIRECT and self._doubts == 1:
            # those who were asked may be wrong: ask others before anything changes
            self._next_at = float("-inf")
            return
        await self._hide(judgement, stage)

    def _is_inside(self) -> bool:
        """Whether this machine's address is private, though it knows public peers, which can't dial it."""
        host = self._swarm.host
        known = (*host.bootstrapped_from, *host.bootstrap_candidates)
        own = self._settings.announce_host or self._host
        return not is_public(own) and any(address.is_public for address in known)

    def _announced(self, judgement: Judgement) -> tuple[Endpoint, ...]:
        if self._settings.announce_host:
            return (self._own_address,)
        seen = (Endpoint.of(address, self._announced_port) for address in judgement.reached_at)
        return tuple(dict.fromkeys((*seen, self._own_address)))[:8]

    async def _need_no_relay(self, status: ReachabilityStatus, serves_dht: bool = True) -> None:
        """Gives up relays. A peer whose DHT port nobody reaches hosts no keys."""
        self.status = status
        self.tunnel_addresses = ()
        if self._swarm.host.config.serves_dht is not serves_dht:
            await self._move(serves_dht)

    async def _move(self, serves_dht: bool, relays: Sequence[Multiaddress] = ()) -> None:
        try:
            await self._swarm.host.restart_as(serves_dht=serves_dht, relays=relays)
        except DaemonError as error:  # the host tries again
            raise UnreachableError(str(error)) from error

    async def _hide(self, judgement: Judgement, stage: Stage) -> None:
        """Is reached through its tunnel from now on: by relays, or directly where others reach the DHT port."""
        self._addresses = tuple(Endpoint.of(a, self._announced_port) for a in judgement.reached_at)
        host = self._swarm.host
        if judgement.dht:
            await self._need_no_relay(ReachabilityStatus(Reachability.PUNCHED, asked=judgement.asked))
        elif host.config.serves_dht or not host.config.relays:
            await self._find_relays(stage)
        self.status = ReachabilityStatus(self._tunnelled_kind(), asked=judgement.asked)

    def _tunnelled_kind(self) -> Reachability:
        """Judged by the last stream that another peer opened."""
        directly = self._swarm.host.config.serves_dht or self._swarm.host.tunnels.last_relayed is False
        return Reachability.PUNCHED if directly else Reachability.RELAYED

    async def _note_relays(self, stage: Stage) -> None:
        host = self._swarm.host
        addresses = tuple(await host.tunnel_addresses())
        relayed = [address for address in addresses if address.is_relayed]
        if addresses:
            self._backoff.reset()
        elif self._backoff.is_due(self._clock()):
            await self._find_relays(stage)
        self.tunnel_addresses = addresses
        self.status = ReachabilityStatus(
            self._tunnelled_kind(), len(relayed), not addresses, self.status.asked
        )

    async def _find_relays(self, stage: Stage) -> None:
        """Takes other peers as relays, and waits a while for the first that accepts."""
        stage("looking for a relay")
        host, registry = self._swarm.host, self._swarm.registry
        relays = await find_relays(host, registry, self._rng, _RELAYS)
        if not relays:
            self._backoff.reset()
        if relays or host.config.serves_dht:
            await self._move(False, relays)
        if relays:
            await relayed_addresses(host)

    async def _dials(self) -> Sequence[DialledPorts]:
        some = await some_nodes(self._swarm.host, self._swarm.registry, self._rng)
        nodes = [node for node in some if node.addresses]
        nodes.sort(
            key=lambda node: node.addresses[0].scope is not AddressScope.GLOBAL
        )  # those of the internet first
        pool = ChannelPool(dialling=self._swarm.host.dialling)
        try:
            async with asyncio.timeout(_ASK_S):
                dials = await asyncio.gather(*(self._dial(pool, node) for node in nodes[:_ASKED]))
        except TimeoutError:
            return []
        finally:
            await pool.close()
        return [dial for dial in dials if dial is not None]

    async def _dial(self, pool: ChannelPool, node: NodeInfo) -> DialledPorts | None:
        swarm_id, settings = self._swarm.keys.swarm_id, self._settings
        dht_port = settings.announce_dht_port or self._swarm.host.config.port
        try:
            with tolerating("ask a node to dial back"):  # the others are asked all the same
                channel = await pool.reach(node)
                return DialledPorts(
                    await call_dial_back(channel, swarm_id, self._announced_port),
                    await call_dial_back(channel, swarm_id, dht_port),
                )
        except UnreachableError as error:
            logger.debug("%s did not dial back: %s", node.peer_id, error)
        return None

    @property
    def _announced_port(self) -> int:
        return self._settings.announce_grpc_port or self._port

    @property
    def _own_address(self) -> Endpoint:
        return Endpoint.of(self._settings.announce_host or self._host, self._announced_port)
