"""How a peer whose router accepts no connections is reached: it finds relays, and replaces them when they fail."""

import logging
import random
import time
from collections.abc import Callable

from dht.announcements import NodeInfo, Reachability
from dht.registry import Registry
from dht.swarm import Swarm
from peer.errors import DaemonError, UnreachableError
from peer.host import Host
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import is_public

logger: logging.Logger = logging.getLogger(__name__)

_SAMPLED = 24
"""How many DHT peers' records are read to find nodes that may be relays."""
_FIRST_PATIENCE_S, _LONGEST_PATIENCE_S = 30.0, 480.0


class RelayKeeper:
    """Keeps this peer reachable through relays: two over gRPC and, if p2pd runs, some over libp2p.

    Call `begin` when the peer has something to serve, `look` now and then, and `end` once others reach it without
    relays.
    """

    def __init__(
        self,
        swarm: Swarm,
        tunnel_relays: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tunnel_relays`: how many libp2p relays to keep, at most."""
        self.tunnel_addresses: tuple[Multiaddress, ...] = ()
        """Multiaddresses of its libp2p tunnel, at most 8."""
        self._swarm = swarm
        self._tunnel_relays = tunnel_relays
        self._rng = rng
        self._clock = clock
        self._backoff = RelayBackoff()

    @property
    def relay_addresses(self) -> tuple[Multiaddress, ...]:
        """The addresses of its current gRPC reservations."""
        return self._swarm.host.reservations.addresses

    @property
    def refusal(self) -> str:
        """Why the gRPC relay that was asked last does not lead here, in words; empty if that is not known."""
        return self._swarm.host.reservations.refusal

    async def begin(self) -> None:
        """Starts to use relays."""
        self._swarm.host.reservations.keep(self._candidates)
        await self._take_tunnel_relays()

    async def end(self) -> None:
        """Stops using relays."""
        self.tunnel_addresses = ()
        await self._swarm.host.reservations.drop()
        await self._restart_tunnel([])

    async def look(self) -> None:
        """Updates the addresses. Chooses other libp2p relays if the current ones no longer work."""
        self.tunnel_addresses = tuple(await self._swarm.host.tunnel_addresses())
        if self.tunnel_addresses:
            self._backoff.reset()
        elif self._backoff.is_due(self._clock()):
            await self._take_tunnel_relays()

    async def _candidates(self) -> list[NodeInfo]:
        """Nodes that others reach directly, in random order, and then nodes that don't know whether they are. A swarm's
        only node can't know, because nobody can test it.
        """
        nodes = await sample_nodes(self._swarm.host, self._swarm.registry, self._rng)
        return [
            node
            for kind in (Reachability.DIRECT, Reachability.UNKNOWN)
            for node in nodes
            if node.addresses and node.reachability is kind
        ]

    async def _take_tunnel_relays(self) -> None:
        """Chooses libp2p relays with public addresses, one per machine. Does nothing without p2pd."""
        if not self._swarm.host.runs_p2pd:
            return
        by_machine = {
            address.endpoint.ip: address
            for node in await self._candidates()
            for address in node.tunnel_addresses
            if address.is_public and not address.is_relayed
        }
        relays = list(by_machine.values())[: self._tunnel_relays]
        if relays:
            await self._restart_tunnel(relays)
        else:
            self._backoff.reset()

    async def _restart_tunnel(self, relays: list[Multiaddress]) -> None:
        try:
            await self._swarm.host.tunnel_through(relays)
        except DaemonError as error:  # it is tried again
            logger.warning("no relays over libp2p yet: %s", error)


class RelayBackoff:
    """When to replace relays that bring no calls. The pause doubles each time, because a change cuts all tunnels.

    Pure: `now` is an argument, in seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Call it after a check that found working relays, or when there are no others to choose."""
        self._patience_s = _FIRST_PATIENCE_S
        self._since: float | None = None

    def is_due(self, now: float) -> bool:
        """Call it at each check that found no working relay. If it returns True, choose other relays."""
        if self._since is None:
            self._since = now
        if now - self._since < self._patience_s:
            return False
        self._since = now
        self._patience_s = min(2 * self._patience_s, _LONGEST_PATIENCE_S)
        return True


async def sample_nodes(host: Host, registry: Registry, rng: random.Random) -> list[NodeInfo]:
    """Some nodes that this peer knows, drawn at random; none if the DHT does not answer."""
    peers = sorted(host.peers(), key=lambda peer: peer.to_bytes())
    sample = rng.sample(peers, min(_SAMPLED, len(peers)))
    try:
        found = await registry.nodes(sample)
    except UnreachableError:
        return []
    return list(found.values())


def is_hidden(host: str) -> bool:
    """Whether the internet can't reach that IP address or name. Loopback is not hidden: its whole swarm is on this
    machine.
    """
    return not (host.startswith(("127.", "::1")) or host == "localhost" or is_public(host))
