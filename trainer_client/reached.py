"""How other trainers reach one whose router lets nobody in: by relays, which are looked after."""

import logging
import random
import time
from collections.abc import Callable

from dht.relays import RelayPatience, find_relays, relayed_addresses
from dht.swarm import Swarm
from peer.errors import DaemonError, UnreachableError
from peer.transport.addresses import is_public, is_relayed, multiaddress

logger = logging.getLogger(__name__)


def is_hidden(host: str) -> bool:
    """Whether the internet does not reach that IP address or name. Loopback is reached by all that are there."""
    return not (host.startswith(("127.", "::1")) or host == "localhost" or is_public(multiaddress(host, 0)))


class Relayed:
    """This trainer's tunnel. `begin` when it has something to serve, then `look` now and then."""

    def __init__(
        self,
        swarm: Swarm,
        relays: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`relays`: how many it takes, at most."""
        self.addresses: tuple[str, ...] = ()
        """Multiaddresses by which its tunnel is reached, at most 8."""
        self._swarm = swarm
        self._relays = relays
        self._rng = rng
        self._clock = clock
        self._patience = RelayPatience()

    async def begin(self, most_streams: int) -> None:
        """Lets others in and takes relays; gives up waiting for one after a while."""
        await self._swarm.host.serve_tunnel(most_streams)
        await self._take()

    async def look(self) -> None:
        """By which addresses it is reached now. Takes other relays when those before are of no use any more."""
        try:
            found = await self._swarm.host.tunnel_addresses()
        except UnreachableError:
            return
        self.addresses = tuple(filter(is_relayed, found))
        if self.addresses:
            self._patience.begin_anew()
        elif self._patience.is_over(self._clock()):
            await self._take()

    async def _take(self) -> None:
        host = self._swarm.host
        relays = await find_relays(host, self._swarm.registry, self._rng, self._relays)
        if not relays:
            self._patience.begin_anew()
            return
        try:
            await host.move(serves_dht=False, relays=relays)
        except DaemonError as error:  # the host tries again
            logger.warning("could not take relays: %s", error)
            return
        self.addresses = await relayed_addresses(host)
