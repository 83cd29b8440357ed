"""How a peer whose router admits nobody is reached: through relays, which are found, kept and replaced."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress

from dht.announcements import NodeInfo
from dht.registry import Registry
from dht.swarm import Swarm
from peer.errors import DaemonError, UnreachableError
from peer.host import Host
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import is_public

logger = logging.getLogger(__name__)

_SAMPLED = 24
"""DHT peers whose records are read to find nodes, which may be relays."""
_TRIED_FOR_EACH = 3
"""Peers that are tried for each relay that is wanted."""
_RELAY_S = 15.0
"""Longest wait for a relay. Then the peer goes on without one and checks again later."""
_LOOK_S = 0.2
_FIRST_PATIENCE_S, _LONGEST_PATIENCE_S = 30.0, 480.0


class RelayKeeper:
    """Keeps relays for this trainer. `begin` when it has something to serve, then `look` now and then."""

    def __init__(
        self,
        swarm: Swarm,
        relays: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`relays`: how many to keep, at most."""
        self.addresses: tuple[Multiaddress, ...] = ()
        """Multiaddresses by which its tunnel is reached, at most 8."""
        self._swarm = swarm
        self._relays = relays
        self._rng = rng
        self._clock = clock
        self._backoff = RelayBackoff()

    async def begin(self) -> None:
        """Takes relays. Stops waiting for one after a while."""
        await self._take()

    async def look(self) -> None:
        """Updates `addresses`. Takes other relays if the current ones no longer work."""
        try:
            found = await self._swarm.host.tunnel_addresses()
        except UnreachableError:
            return
        self.addresses = tuple(a for a in found if a.is_relayed)
        if self.addresses:
            self._backoff.reset()
        elif self._backoff.is_due(self._clock()):
            await self._take()

    async def _take(self) -> None:
        host = self._swarm.host
        relays = await find_relays(host, self._swarm.registry, self._rng, self._relays)
        if not relays:
            self._backoff.reset()
            return
        try:
            await host.restart_as(serves_dht=False, relays=relays)
        except DaemonError as error:  # the host tries again
            logger.warning("could not take relays: %s", error)
            return
        self.addresses = await relayed_addresses(host)


class RelayBackoff:
    """When to replace relays through which nobody comes: after twice as long each time, because it cuts all tunnels.

    Pure: `now` is passed in, in seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """After a check that found working relays, or when there are no others to take."""
        self._patience_s = _FIRST_PATIENCE_S
        self._since: float | None = None

    def is_due(self, now: float) -> bool:
        """Ask at each check that found none working. After True, take other relays."""
        if self._since is None:
            self._since = now
        if now - self._since < self._patience_s:
            return False
        self._since = now
        self._patience_s = min(2 * self._patience_s, _LONGEST_PATIENCE_S)
        return True


async def find_relays(host: Host, registry: Registry, rng: random.Random, most: int) -> list[Multiaddress]:
    """Addresses of some reachable peers, on different machines. libp2p relays only over public addresses."""
    nodes = await some_nodes(host, registry, rng)
    listed = [address for node in nodes for address in node.bootstrap_addresses]
    usable = [
        a
        for a in (*listed, *host.bootstrapped_from, *host.bootstrap_candidates)
        if a.is_public and not a.is_relayed
    ]
    rng.shuffle(usable)
    by_machine = {address.endpoint.ip: address for address in usable if address.peer_id != host.peer_id}
    try:
        # p2pd dials its relays again and again, so none is a machine that is no peer
        found = await host.confirmed(list(by_machine.values())[: _TRIED_FOR_EACH * most])
    except UnreachableError:
        return []
    return found[:most]


async def some_nodes(host: Host, registry: Registry, rng: random.Random) -> list[NodeInfo]:
    """Some other nodes, in random order; none if the DHT does not answer."""
    peers = sorted(host.peers(), key=lambda peer: peer.to_bytes())
    sample = rng.sample(peers, min(_SAMPLED, len(peers)))
    try:
        found = await registry.nodes(sample)
    except UnreachableError:
        return []
    return list(found.values())


async def relayed_addresses(host: Host) -> tuple[Multiaddress, ...]:
    """The addresses by which others reach this peer through relays, at most 8. Waits a while for the first relay."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_RELAY_S):
            while True:  # p2pd has no event for this
                with suppress(UnreachableError):
                    if relayed := tuple(a for a in await host.tunnel_addresses() if a.is_relayed):
                        return relayed
                await asyncio.sleep(_LOOK_S)
    return ()


def is_hidden(host: str) -> bool:
    """Whether the internet can't reach that IP address or name. Loopback is not hidden: its whole swarm is there."""
    return not (host.startswith(("127.", "::1")) or host == "localhost" or is_public(host))
