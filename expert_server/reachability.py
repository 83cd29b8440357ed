"""Whether and how others reach this node: it asks them to dial back, and finds relays if they can't."""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

from prometheus_client import CollectorRegistry, Gauge

from dht.announcements import NodeInfo, Reachability
from dht.relays import RelayKeeper, sample_nodes
from dht.swarm import Stage, Swarm
from expert_server.probe import DialledBack, call_dial_back
from expert_server.settings import NodeSettings
from peer.errors import UnreachableError
from peer.loop import first_few, tolerating
from peer.rpc.channels import ChannelPool
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import AddressScope, Endpoint, is_public

logger: logging.Logger = logging.getLogger(__name__)

_ASKED = 3
"""How many nodes must say whether they could dial back. Nodes are asked until so many have answered."""
_ASK_S = 20.0
"""The longest time for asking all nodes."""
_ASK_ONE_S = 9.0
"""The longest time for asking one node."""
_ASK_AGAIN_S = 600.0
"""Time until other nodes are asked again."""
_UNANSWERED = 2
"""After this many rounds without an answer, a machine with a private address considers itself unreachable."""
_TUNNEL_RELAYS = 4


@dataclass(frozen=True)
class Judgement:
    """The result of asking nodes: whether at least half of those that tried reached the port."""

    asked: int
    reached: bool
    reached_at: tuple[str, ...]
    """IP addresses where at least half of them reached it, the one reported most often first."""


def judge(dials: Sequence[DialledBack]) -> Judgement:
    """The port counts as reached if at least half of the nodes reached it, so that a single liar can't decide."""
    reached = sum(dial.connected for dial in dials)
    seen = Counter(dial.address for dial in dials if dial.connected)
    return Judgement(
        asked=len(dials),
        reached=2 * reached >= len(dials) > 0,
        # a single liar must not make this node announce another machine's address
        reached_at=tuple(address for address, times in seen.most_common() if 2 * times >= reached),
    )


def in_order(nodes: Iterable[NodeInfo]) -> list[NodeInfo]:
    """The order in which nodes are asked: those on the internet first, and one of each neighbourhood before a second,
    because one person may run many nodes.
    """
    seen = Counter[str]()
    found: list[tuple[bool, int, NodeInfo]] = []
    for node in nodes:
        if node.addresses:
            first = node.addresses[0]
            found.append((first.scope is not AddressScope.GLOBAL, seen[first.near], node))
            seen[first.near] += 1
    return [node for _, _, node in sorted(found, key=itemgetter(0, 1))]


@dataclass(frozen=True)
class ReachabilityStatus:
    """How others reach this node now."""

    kind: Reachability = Reachability.UNKNOWN
    relays: int = 0
    """How many relays lead to it, over gRPC and over libp2p."""
    looking: bool = False
    """Whether it is looking for a relay: nobody reaches it until it has one."""
    asked: int = 0
    """How many nodes were asked to dial back."""
    why_unasked: str = ""
    """Why no node is asked, in words; empty if nodes are asked."""
    refusal: str = ""
    """The reason of the last relay that refused; empty if none has refused."""

    @property
    def in_words(self) -> str:
        """How the node is reached, such as `direct` or `relayed by 3 relays`. It is `direct` only if others have
        dialled back.
        """
        if self.why_unasked:
            return f"not checked: {self.why_unasked}"
        if self.looking:
            return f"looking for a relay{self.refusal and f': {self.refusal}'}"
        if self.kind is Reachability.UNKNOWN:
            return "not known: no other node to ask yet"
        if self.kind is Reachability.RELAYED and self.relays:
            return f"relayed by {self.relays} relay{'' if self.relays == 1 else 's'}"
        return self.kind.name.lower()


def advice(status: ReachabilityStatus, host: str, port: int, router: str = "") -> str:
    """What the owner can do so that others connect directly; empty if they already do. `port`: 0 if it changes.
    `router`: what the router does, in words, if it was asked.
    """
    if status.kind in {Reachability.UNKNOWN, Reachability.DIRECT}:
        return ""
    if not port:
        fix = f"pass --port, and forward that TCP port on your router to {host}"
    elif is_public(host):
        fix = f"let TCP port {port} in through the firewall"
    else:
        fix = f"forward TCP port {port} on your router to {host}"
    return f"{router}: {fix}" if router else fix


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
        self.status: ReachabilityStatus = ReachabilityStatus()
        self.tunnel_addresses: tuple[Multiaddress, ...] = ()
        """The addresses by which others open libp2p streams to it."""
        self._settings = settings
        self._swarm = swarm
        self._host = ""
        self._port = 0
        self._addresses: tuple[Endpoint, ...] = ()
        self._rng = rng
        self._clock = clock
        self._next_at = float("-inf")
        self._relays = RelayKeeper(swarm, _TUNNEL_RELAYS, rng, clock)
        self._forwarded: Endpoint | None = None
        """Where, according to the router, the internet reaches this node."""
        self._is_hidden = False
        self._unanswered = 0
        """Consecutive rounds in which there was nobody to ask, or nobody answered."""
        self._doubts = 0
        """Consecutive rounds in which others could not reach this node, although they had before."""
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
        """The expert service's announced addresses."""
        return self._addresses

    @property
    def advice(self) -> str:
        """What the owner can do so that others connect directly; empty if they already do."""
        return advice(self.status, self._host, self._settings.port, self._router)

    @property
    def in_words(self) -> str:
        """How the node is reached, such as `direct: the router at 192.168.1.1 forwards port 31337` or `relayed by 3
        relays`.
        """
        is_forwarded = self._forwarded is not None and self._is(Reachability.DIRECT)
        return f"{self.status.in_words}: {self._router}" if is_forwarded else self.status.in_words

    @property
    def _router(self) -> str:
        mapping = self._swarm.host.port_mapping
        return "" if mapping is None else mapping.in_words

    @property
    def relay_addresses(self) -> tuple[Multiaddress, ...]:
        """The addresses by which others reach its server through relays over gRPC."""
        return self._relays.relay_addresses if self._is_hidden else ()

    def _is(self, kind: Reachability) -> bool:
        return self.status.kind is kind

    async def begin(self, host: str, port: int, stage: Stage = logger.info) -> None:
        """Finds out how others reach the expert service at this address and port. Raises UnreachableError."""
        self._host, self._port = host, port
        self._addresses = self._unproven
        await self.check(stage)
        logger.info("reached: %s", self.in_words)

    async def check(self, stage: Stage = logger.info) -> None:
        """Asks others when it is time, and looks for relays if there are none. Raises UnreachableError."""
        mode = self._settings.reachability
        self._note_router()
        if mode == "public" or (mode == "auto" and self._host.startswith(("127.", "::1"))):
            self._addresses = self._unproven
            why = (
                'reachability = "public" is set' if mode == "public" else "only this machine is in the swarm"
            )
            await self._need_no_relay(ReachabilityStatus(why_unasked=why))
        elif mode == "private":
            await self._hide(Judgement(0, reached=False, reached_at=()), stage)
        elif self._clock() >= self._next_at:
            await self._ask(stage)
        if self._is_hidden:
            await self._note_relays()
        else:
            self.tunnel_addresses = tuple(await self._swarm.host.tunnel_addresses())

    def _note_router(self) -> None:
        """Asks other nodes again when the router starts, changes or stops its forwarding."""
        mapping = self._swarm.host.port_mapping
        forwarded = None if mapping is None else mapping.external
        if forwarded != self._forwarded:
            self._forwarded = forwarded
            self._next_at = float("-inf")

    async def _ask(self, stage: Stage) -> None:
        if not self._unanswered:  # otherwise it has been said, and nobody could be asked
            stage("asking others whether they reach this machine")
        judgement = judge(await self._dials())
        if not judgement.asked:
            self._unanswered += 1
            # what others said counts until they say something else: the line may be down for a while
            if not self.status.asked:
                if self._unanswered >= _UNANSWERED and self._is_inside():
                    await self._hide(judgement, stage)
                elif not self._is_hidden and self._addresses != self._unproven:
                    self._addresses = self._unproven
                    await self._swarm.host.announce_at(self._addresses)
            return  # it is tried again with the next announcement
        self._unanswered = 0
        self._next_at = self._clock() + _ASK_AGAIN_S
        if judgement.reached:
            self._doubts = 0
            self._addresses = self._announced(judgement)
            await self._need_no_relay(ReachabilityStatus(Reachability.DIRECT, asked=judgement.asked))
            return
        self._doubts += 1
        if (mapping := self._swarm.host.port_mapping) is not None:
            mapping.renew()  # the router may have forgotten the mapping
        if self.status.kind is Reachability.DIRECT and self._doubts == 1:
            # the nodes that were asked may be wrong: ask others before anything changes
            self._next_at = float("-inf")
            return
        await self._hide(judgement, stage)

    def _is_inside(self) -> bool:
        """Whether this machine's address is private although it knows public peers, which can't dial it."""
        is_inside = not any(is_public(address.host) for address in self._unproven)
        return is_inside and any(a.is_public for a in self._swarm.host.bootstrapped_from)

    def _announced(self, judgement: Judgement) -> tuple[Endpoint, ...]:
        if self._settings.announce_host:
            return (self._own_address,)
        seen = (Endpoint.of(address, self._announced_port) for address in judgement.reached_at)
        return tuple(dict.fromkeys((*seen, self._own_address)))[:8]

    async def _need_no_relay(self, status: ReachabilityStatus) -> None:
        """Serves the DHT itself, and gives up relays."""
        self.status = status
        host = self._swarm.host
        await host.announce_at(self._addresses)
        host.serve_dht(True)
        if self._is_hidden:
            self._is_hidden = False
            await self._relays.end()

    async def _hide(self, judgement: Judgement, stage: Stage) -> None:
        """Uses relays from now on, and becomes a client of the DHT."""
        self._addresses = tuple(Endpoint.of(a, self._announced_port) for a in judgement.reached_at)
        self._swarm.host.serve_dht(False)
        if not self._is_hidden:
            self._is_hidden = True
            stage("looking for a relay")
            await self._relays.begin()
        self.status = replace(self.status, kind=self._hidden_kind(), asked=judgement.asked)

    def _hidden_kind(self) -> Reachability:
        """How a node behind a router is reached, judged by the last libp2p stream that another peer opened."""
        punched = self._swarm.host.tunnels.last_relayed is False
        return Reachability.PUNCHED if punched else Reachability.RELAYED

    async def _note_relays(self) -> None:
        await self._relays.look()
        self.tunnel_addresses = self._relays.tunnel_addresses
        relayed = [a for a in (*self.relay_addresses, *self.tunnel_addresses) if a.is_relayed]
        self.status = ReachabilityStatus(
            self._hidden_kind(),
            len(relayed),
            not relayed and not self.tunnel_addresses,
            self.status.asked,
            refusal=self._relays.refusal,
        )

    async def _dials(self) -> Sequence[DialledBack]:
        some = await sample_nodes(self._swarm.host, self._swarm.registry, self._rng)
        pool = ChannelPool(dialling=self._swarm.host.dialling)
        dials: list[DialledBack] = []

        async def ask(node: NodeInfo) -> DialledBack | None:
            dial = await self._dial(pool, node)
            dials.extend([] if dial is None else [dial])
            return dial

        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ASK_S):
                    await first_few(map(ask, in_order(some)), _ASKED, _ASK_S)
        finally:
            await pool.close()
        return dials

    async def _dial(self, pool: ChannelPool, node: NodeInfo) -> DialledBack | None:
        try:
            # the others are asked all the same
            with tolerating("ask a node to dial back"), suppress(TimeoutError):
                async with asyncio.timeout(_ASK_ONE_S):
                    return await self._ask_to_dial(pool, node)
        except UnreachableError as error:
            logger.debug("%s did not dial back: %s", node.peer_id, error)
        return None

    async def _ask_to_dial(self, pool: ChannelPool, node: NodeInfo) -> DialledBack:
        channel = await pool.reach(node)
        return await call_dial_back(channel, self._swarm.keys.swarm_id, self._announced_port)

    @property
    def _announced_port(self) -> int:
        if self._forwarded is not None:
            return self._forwarded.port
        return self._settings.announce_port or self._port

    @property
    def _unproven(self) -> tuple[Endpoint, ...]:
        """The addresses where others can probably reach it, before any of them has confirmed it."""
        return (self._own_address,) if self._forwarded is None else (self._forwarded, self._own_address)

    @property
    def _own_address(self) -> Endpoint:
        settings = self._settings
        return Endpoint.of(settings.announce_host or self._host, settings.announce_port or self._port)
